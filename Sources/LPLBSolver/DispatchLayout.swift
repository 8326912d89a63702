// DispatchLayout: where the rows of a dispatch go. Sorts choices by the rank and the buffer row that they go to, and tells what arrives.

import LPLBTopology

/// The rows of a dispatch under one placement, see lplb.h, section 9. A *key* is rank * rows + row; `nKeys` stands for "no expert".
///
/// O(ids + nPhysical + nKeys) a call. Not for use by two threads at once. Allocates when there are more keys than ever before.
public final class DispatchLayout {
    /// What `sort` found wrong with the ids.
    public struct Findings {
        /// Ids that are neither -1 nor a slot with a row.
        public var badIds: Int64 = 0
        /// Slots that do not hold the expert they should.
        public var otherExperts: Int64 = 0
        /// The rows sent are not those that the plan takes.
        public var otherPlan = false
    }

    private let shape: ExpertShape
    /// [nPhysical] the expert whose place a slot is; -1: of none.
    private let expertOfSlot: UnsafeMutablePointer<Int32>
    /// [nPhysical] -1: a slot whose row is out of range.
    private let keyOfSlot: UnsafeMutablePointer<Int32>
    private let arena = Arena()
    /// [nKeys + 1] and room for more.
    private var next: UnsafeMutablePointer<Int64>
    private var room = 0
    private var nRows = 0
    private var nKeys: Int { shape.epSize * nRows }

    public init(_ network: Network) {
        shape = network.shape
        expertOfSlot = arena.filled(shape.nPhysical, -1)
        keyOfSlot = arena.filled(shape.nPhysical, -1)
        next = arena.filled(1, 0)
        for expert in 0..<shape.nLogical {
            for place in network.places(of: expert) { expertOfSlot[Int(network.placeSlot[place])] = Int32(expert) }
        }
    }

    /// Sets what the other calls go by. rowOf(slot): its row in the buffers of its rank, of `nRows`.
    public func setRows(_ nRows: Int, _ rowOf: (Int) -> Int64) {
        self.nRows = nRows
        for slot in 0..<shape.nPhysical {
            let row = rowOf(slot)
            keyOfSlot[slot] = row >= 0 && row < Int64(nRows) ? Int32(slot / shape.nLocal * nRows) + Int32(row) : -1
        }
        if room < nKeys + 1 {
            room = nKeys + 1
            next = arena.filled(room, 0)
        }
    }

    /// order [nIds]: the choices by key, stable; sent [nKeys]: choices of each key.
    /// - Parameters:
    ///   - experts: nil, or [nIds]: the experts that the slots must hold.
    ///   - take: nil, or tokens of each place that the plan takes from here, to be compared with `sent`.
    public func sort<Id: FixedWidthInteger>(
        _ ids: UnsafePointer<Id>, _ nIds: Int, experts: UnsafePointer<Id>?, order: UnsafeMutablePointer<Int64>,
        sent: UnsafeMutablePointer<Int32>, take: (network: Network, tokens: UnsafePointer<Int64>)?
    ) -> Findings {
        var found = Findings()
        next.update(repeating: 0, count: nKeys + 1)
        for i in 0..<nIds {
            let key = key(ids[i])
            next[key] &+= 1
            if key == nKeys && ids[i] != -1 {
                found.badIds &+= 1
            } else if let experts, expert(at: ids[i]) != valid(experts[i]) {
                found.otherExperts &+= 1
            }
        }
        var before: Int64 = 0
        for key in 0...nKeys {
            let count = next[key]
            if key < nKeys { sent[key] = Int32(truncatingIfNeeded: count) }
            next[key] = before
            before &+= count
        }
        for i in 0..<nIds {
            let key = key(ids[i])
            order[Int(next[key])] = Int64(i)
            next[key] &+= 1
        }
        if let take { found.otherPlan = differs(sent, take.network, take.tokens) }
        return found
    }

    /// received [nKeys], by the rank that sends and the row here: tokens. add(visit) calls visit(from, slot, tokens) for each slot that
    /// gets some.
    public func receive(_ received: UnsafeMutablePointer<Int32>, _ add: ((Int, Int, Int64) -> Void) -> Void) {
        received.update(repeating: 0, count: nKeys)
        add { from, slot, tokens in
            let key = keyOfSlot[slot]
            if key >= 0 {
                let at = from * nRows + Int(key) % nRows
                received[at] = Int32(clamping: Int64(received[at]) + tokens)
            }
        }
    }

    /// byRow [n]: the rows as they come, by rank and then row, brought together by row and then rank; behind them i itself.
    public func gather(_ received: UnsafePointer<Int32>, to byRow: UnsafeMutablePointer<Int64>, _ n: Int) {
        var from: Int64 = 0
        for at in 0..<nKeys {
            next[at] = from
            from &+= Int64(max(received[at], 0))
        }
        var i = 0
        for row in 0..<nRows {
            for rank in 0..<shape.epSize {
                let at = rank * nRows + row
                let end = min(n, i + Int(max(received[at], 0)))
                let shift = next[at] - Int64(i)
                while i < end {
                    byRow[i] = Int64(i) + shift
                    i += 1
                }
            }
        }
        while i < n {
            byRow[i] = Int64(i)
            i += 1
        }
    }

    @inline(__always)
    private func key<Id: FixedWidthInteger>(_ id: Id) -> Int {
        guard id >= 0 && id < Id(shape.nPhysical) else { return nKeys }
        let key = Int(keyOfSlot[Int(id)])
        return key >= 0 ? key : nKeys
    }

    @inline(__always)
    private func expert<Id: FixedWidthInteger>(at slot: Id) -> Int32 { slot == -1 ? -1 : expertOfSlot[Int(slot)] }

    @inline(__always)
    private func valid<Id: FixedWidthInteger>(_ expert: Id) -> Int32 {
        expert >= 0 && expert < Id(shape.nLogical) ? Int32(truncatingIfNeeded: expert) : -1
    }

    private func differs(_ sent: UnsafePointer<Int32>, _ network: Network, _ tokens: UnsafePointer<Int64>) -> Bool {
        next.update(repeating: 0, count: nKeys + 1)
        for place in 0..<network.nPlaces {
            let key = keyOfSlot[Int(network.placeSlot[place])]
            if key >= 0 { next[Int(key)] &+= tokens[place] }
        }
        return (0..<nKeys).contains { next[$0] != Int64(sent[$0]) }
    }
}
