// TokenMapper: passes over the ids of tokens. Counts logical experts, and rewrites logical experts as physical ones.

import LPLBTopology

/// Passes over ids of logical experts: -1 ("no expert") ..< nLogical. Other ids are counted as invalid and come back as -1.
/// O(ids + nLogical) each, of either width; `out` may be `ids`. Fewer than 2^31 ids a call. Not for use by two threads at once.
/// Nothing allocates after `init`.
public final class TokenMapper {
    public let nLogical: Int

    /// All arrays below have an entry for -1, one for each expert, and one for all invalid ids, in this order.
    private let entries: Int
    /// [entries][histograms]: interleaved histograms, so that runs of equal ids do not wait for their own last increment.
    private let histogram: UnsafeMutablePointer<Int32>
    private static let histograms = 4
    /// [entries]: the slot to write (upper half) and how many more tokens it takes (lower half).
    private let state: UnsafeMutablePointer<UInt64>
    /// [nLogical]: the place after the one that `state` is at.
    private let next: UnsafeMutablePointer<Int32>
    private let arena = Arena()

    public init(nLogical: Int) {
        self.nLogical = nLogical
        entries = nLogical + 2
        histogram = arena.filled(entries * TokenMapper.histograms, 0)
        state = arena.filled(entries, 0)
        next = arena.filled(nLogical, 0)
    }

    // MARK: Counting

    /// Tokens per logical expert. Returns the number of invalid ids.
    /// - Parameters:
    ///   - counts: [nLogical], overwritten.
    ///   - cumulative: nil, or [chunks][nLogical]: row i counts the chunks 0 ... i, of `TokenMapper.chunkLength` ids each.
    ///   - chunks: at least 1 if `cumulative` is given.
    public func count(
        _ ids: UnsafePointer<Int32>, _ nIds: Int, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>? = nil,
        chunks: Int = 1
    ) -> Int64 { histogram(ids, nIds, counts, cumulative, chunks) }
    public func count(
        _ ids: UnsafePointer<Int64>, _ nIds: Int, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>? = nil,
        chunks: Int = 1
    ) -> Int64 { histogram(ids, nIds, counts, cumulative, chunks) }

    /// Ids of one chunk when `nIds` are cut into `chunks` of them.
    public static func chunkLength(_ nIds: Int, chunks: Int) -> Int {
        let length = nIds / chunks &+ (nIds % chunks == 0 ? 0 : 1)
        return (length &+ 1023) / 1024 &* 1024
    }

    @inline(__always)
    private func histogram<T: FixedWidthInteger>(
        _ ids: UnsafePointer<T>, _ nIds: Int, _ counts: UnsafeMutablePointer<Int32>, _ cumulative: UnsafeMutablePointer<Int32>?,
        _ chunks: Int
    ) -> Int64 {
        let histograms = TokenMapper.histograms
        histogram.update(repeating: 0, count: entries &* histograms)
        if let cumulative {
            let length = TokenMapper.chunkLength(nIds, chunks: chunks)
            var from = 0
            for chunk in 0..<chunks {
                let to = min(nIds, from &+ length)
                tally(ids + from, to &- from)
                from = to
                collect(cumulative + chunk &* nLogical)
            }
            counts.update(from: cumulative + (chunks &- 1) &* nLogical, count: nLogical)
        } else {
            tally(ids, nIds)
            collect(counts)
        }
        var invalid: Int64 = 0
        for i in 0..<histograms { invalid &+= Int64(UInt32(bitPattern: histogram[(entries &- 1) &* histograms &+ i])) }
        return invalid
    }

    @inline(__always)
    private func tally<T: FixedWidthInteger>(_ ids: UnsafePointer<T>, _ nIds: Int) {
        let histogram = histogram, last = UInt(entries &- 1)
        var i = 0
        while i &+ 4 <= nIds {
            histogram[entry(ids[i], last) &* 4] &+= 1
            histogram[entry(ids[i &+ 1], last) &* 4 &+ 1] &+= 1
            histogram[entry(ids[i &+ 2], last) &* 4 &+ 2] &+= 1
            histogram[entry(ids[i &+ 3], last) &* 4 &+ 3] &+= 1
            i &+= 4
        }
        while i < nIds {
            histogram[entry(ids[i], last) &* 4] &+= 1
            i &+= 1
        }
    }

    private func collect(_ counts: UnsafeMutablePointer<Int32>) {
        for e in 0..<nLogical {
            let of = histogram + (e &+ 1) &* 4
            counts[e] = of[0] &+ of[1] &+ of[2] &+ of[3]
        }
    }

    /// Where an id stands in the arrays.
    @inline(__always)
    private func entry<T: FixedWidthInteger>(_ id: T, _ last: UInt) -> Int {
        Int(bitPattern: min(UInt(bitPattern: Int(truncatingIfNeeded: id) &+ 1), last))
    }

    // MARK: Rewriting

    /// Rewrites by a plan: the k-th occurrence of an expert goes to the first place with take[first place] + ... + take[it] > k,
    /// occurrences beyond all to the first place. Returns the number of invalid ids.
    /// - Parameter take: [nPlaces], or nil: everything to the first places.
    public func redirect(
        _ ids: UnsafePointer<Int32>, _ nIds: Int, to out: UnsafeMutablePointer<Int32>, network: Network, take: UnsafePointer<Int64>?
    ) -> Int64 { rewrite(ids, nIds, out, network, take) }
    public func redirect(
        _ ids: UnsafePointer<Int64>, _ nIds: Int, to out: UnsafeMutablePointer<Int64>, network: Network, take: UnsafePointer<Int64>?
    ) -> Int64 { rewrite(ids, nIds, out, network, take) }

    /// Rewrites by ratios: of the c occurrences of an expert with a slot class, the first floor(ratio * c + 0.5) go to the original, the
    /// others to the copy. Ratios are clamped to 0 ... 1, NaN counts as 1. Returns the number of invalid ids.
    /// - Parameters:
    ///   - ratios: [n_group][group_size][nRedundant]
    ///   - totals: [nLogical]: c.
    public func redirect(
        _ ids: UnsafePointer<Int32>, _ nIds: Int, to out: UnsafeMutablePointer<Int32>, network: Network, ratios: UnsafePointer<Float>,
        totals: UnsafePointer<Int32>
    ) -> Int64 { rewrite(ids, nIds, out, network, ratios, totals) }
    public func redirect(
        _ ids: UnsafePointer<Int64>, _ nIds: Int, to out: UnsafeMutablePointer<Int64>, network: Network, ratios: UnsafePointer<Float>,
        totals: UnsafePointer<Int32>
    ) -> Int64 { rewrite(ids, nIds, out, network, ratios, totals) }

    /// More tokens than a call can have.
    private static let endless = UInt64(UInt32.max)

    @inline(__always)
    private func pack(_ slot: Int32, _ tokens: UInt64) -> UInt64 {
        UInt64(UInt32(bitPattern: slot)) &<< 32 | tokens
    }

    @inline(__always)
    private func rewrite<T: FixedWidthInteger>(
        _ ids: UnsafePointer<T>, _ nIds: Int, _ out: UnsafeMutablePointer<T>, _ network: Network, _ take: UnsafePointer<Int64>?
    ) -> Int64 {
        let start = network.expertStart, slots = network.placeSlot
        let state = state + 1, next = next
        for expert in 0..<nLogical {
            let first = Int(start[expert]), end = Int(start[expert &+ 1])
            state[expert] = pack(slots[first], TokenMapper.endless)
            if let take, end &- first > 1 {
                advance(expert, first, first, end, slots, take)
            }
        }
        return rewriteEach(ids, nIds, out) { expert in
            let place = Int(next[expert])
            guard let take else { return }
            advance(expert, place, Int(start[expert]), Int(start[expert &+ 1]), slots, take)
        }
    }

    /// Goes on to the first place of `place ..< end` that takes tokens, or for good to the expert's first place.
    private func advance(
        _ expert: Int, _ place: Int, _ first: Int, _ end: Int, _ slots: Network.Table, _ take: UnsafePointer<Int64>
    ) {
        var place = place
        while place < end && take[place] <= 0 { place &+= 1 }
        if place < end {
            state[expert &+ 1] = pack(slots[place], min(UInt64(bitPattern: take[place]), TokenMapper.endless))
            next[expert] = Int32(truncatingIfNeeded: place &+ 1)
        } else {
            state[expert &+ 1] = pack(slots[first], TokenMapper.endless)
        }
    }

    @inline(__always)
    private func rewrite<T: FixedWidthInteger>(
        _ ids: UnsafePointer<T>, _ nIds: Int, _ out: UnsafeMutablePointer<T>, _ network: Network, _ ratios: UnsafePointer<Float>,
        _ totals: UnsafePointer<Int32>
    ) -> Int64 {
        let start = network.expertStart, slots = network.placeSlot, classes = network.expertClass, copies = network.expertCopy
        let state = state + 1
        for expert in 0..<nLogical {
            let original = slots[Int(start[expert])]
            state[expert] = pack(original, TokenMapper.endless)
            if classes[expert] < 0 { continue }
            let ratio = ratios[Int(classes[expert])]
            let total = max(0, totals[expert])
            // NaN fails the comparison and counts as 1.
            if !(ratio < 1) { continue }
            let kept = UInt64(Double(max(0, ratio)) * Double(total) + 0.5)
            state[expert] = kept == 0 ? pack(copies[expert], TokenMapper.endless) : pack(original, kept)
        }
        return rewriteEach(ids, nIds, out) { expert in state[expert] = pack(copies[expert], TokenMapper.endless) }
    }

    /// The pass itself. `exhausted(expert)`: the expert's slot has got all its tokens.
    @inline(__always)
    private func rewriteEach<T: FixedWidthInteger>(
        _ ids: UnsafePointer<T>, _ nIds: Int, _ out: UnsafeMutablePointer<T>, exhausted: (Int) -> Void
    ) -> Int64 {
        let state = state, last = UInt(entries &- 1)
        let none = pack(-1, TokenMapper.endless)
        state[0] = none
        state[entries &- 1] = none
        var i = 0
        while i < nIds {
            let entry = entry(ids[i], last)
            let value = state[entry]
            out[i] = T(truncatingIfNeeded: Int64(bitPattern: value) &>> 32)
            state[entry] = value &- 1
            if UInt32(truncatingIfNeeded: value) == 1 { exhausted(entry &- 1) }
            i &+= 1
        }
        return Int64(none &- state[entries &- 1])
    }
}
