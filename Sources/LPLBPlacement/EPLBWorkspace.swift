// EPLBWorkspace: the three steps of EPLB for one layer (sum and pack the groups, replicate, pack the slots), on memory that is allocated
// once.
//
// All arithmetic is float32 and in the order of the public PyTorch program, so that the results agree even where rounding decides.
// Loads are non-negative, and such floats compare like their bit patterns read as integers. So a load and an index fit into one 64-bit
// key, "smallest load, ties to the lowest index" is the minimum of keys, and sorting needs no comparison of floats.

import LPLBTopology

/// The sizes of one EPLB problem, checked by `checkedSizes` and with the global policy turned into one group on one node.
struct EPLBSizes {
    let nLogical: Int, nPhysical: Int, nGroups: Int, nNodes: Int, nRanks: Int
}

/// Scratch memory and, after `balance`, the result for one layer.
struct EPLBWorkspace: ~Copyable {
    let sizes: EPLBSizes
    /// [nPhysical]: the expert of each slot, and which of its replicas the slot is.
    let slotExpert: UnsafeMutablePointer<Int32>
    let slotReplica: UnsafeMutablePointer<Int32>
    /// [nLogical]: replicas of each expert.
    let count: UnsafeMutablePointer<Int32>

    private let nodeExpert: UnsafeMutablePointer<Int32>  // [nLogical]: experts in the order of the nodes that they were packed to
    private let item: UnsafeMutablePointer<Int32>  // [nPhysical / nNodes]: replicas of a node: expert within the node
    private let itemReplica: UnsafeMutablePointer<Int32>  // and which of its replicas
    private let packed: UnsafeMutablePointer<Int32>  // [max(nPhysical / nNodes, nGroups)]: items by pack
    private let filled: UnsafeMutablePointer<Int32>  // [max(nRanks / nNodes, nNodes)]: items in each pack
    private let replicas: UnsafeMutablePointer<Int32>  // [nLogical / nNodes]: replicas of the experts of a node
    private let load: UnsafeMutablePointer<Float>  // [nLogical / nNodes]: tokens of the experts of a node
    private let loadPerReplica: UnsafeMutablePointer<Float>  // [max(nLogical / nNodes, nGroups)]: of experts, or load of groups
    private let keys: UnsafeMutablePointer<UInt64>  // [max(nPhysical / nNodes, nGroups)]
    private let otherKeys: UnsafeMutablePointer<UInt64>  // the same, for sorting
    private let tree: UnsafeMutablePointer<UInt64>  // tournament over experts or packs
    private let histogram: UnsafeMutablePointer<UInt32>  // [4][256]

    private static let full = UInt64.max

    init(_ sizes: EPLBSizes) {
        self.sizes = sizes
        let nodeLogical = sizes.nLogical / sizes.nNodes, nodeSlots = sizes.nPhysical / sizes.nNodes
        let nItems = max(nodeSlots, sizes.nGroups), nPacks = max(sizes.nRanks / sizes.nNodes, sizes.nNodes)
        slotExpert = .allocate(capacity: sizes.nPhysical)
        slotReplica = .allocate(capacity: sizes.nPhysical)
        count = .allocate(capacity: sizes.nLogical)
        nodeExpert = .allocate(capacity: sizes.nLogical)
        item = .allocate(capacity: nodeSlots)
        itemReplica = .allocate(capacity: nodeSlots)
        packed = .allocate(capacity: nItems)
        filled = .allocate(capacity: nPacks)
        replicas = .allocate(capacity: nodeLogical)
        load = .allocate(capacity: nodeLogical)
        loadPerReplica = .allocate(capacity: max(nodeLogical, sizes.nGroups))
        keys = .allocate(capacity: nItems)
        otherKeys = .allocate(capacity: nItems)
        tree = .allocate(capacity: 2 * Self.leaves(max(nodeLogical, nPacks)))
        histogram = .allocate(capacity: 4 * 256)
    }

    deinit {
        slotExpert.deallocate()
        slotReplica.deallocate()
        count.deallocate()
        nodeExpert.deallocate()
        item.deallocate()
        itemReplica.deallocate()
        packed.deallocate()
        filled.deallocate()
        replicas.deallocate()
        load.deallocate()
        loadPerReplica.deallocate()
        keys.deallocate()
        otherKeys.deallocate()
        tree.deallocate()
        histogram.deallocate()
    }

    /// Balances one layer: weight [nLogical], finite (or +infinity) and not negative.
    func balance(_ weight: UnsafePointer<Float>) {
        groupsToNodes(weight)
        let nodeLogical = sizes.nLogical / sizes.nNodes, nodeSlots = sizes.nPhysical / sizes.nNodes
        for node in 0..<sizes.nNodes {
            let experts = nodeExpert + node &* nodeLogical
            for i in 0..<nodeLogical {
                load[i] = weight[Int(experts[i])] + 0  // -0 becomes +0, whose bits are in order
            }
            replicate(nodeLogical, nodeSlots)
            pack(itemCount: nodeSlots, packCount: sizes.nRanks / sizes.nNodes) { self.loadPerReplica[Int(self.item[$0])] }

            for i in 0..<nodeLogical { count[Int(experts[i])] = replicas[i] }
            let expertOf = slotExpert + node &* nodeSlots, replicaOf = slotReplica + node &* nodeSlots
            for s in 0..<nodeSlots {
                let i = Int(packed[s])
                expertOf[s] = experts[Int(item[i])]
                replicaOf[s] = itemReplica[i]
            }
        }
    }

    // MARK: - Steps

    /// Step 1: equal numbers of expert groups to each node, heaviest group first to the lightest node. Fills `nodeExpert`.
    private func groupsToNodes(_ weight: UnsafePointer<Float>) {
        let groupSize = sizes.nLogical / sizes.nGroups
        if sizes.nGroups > sizes.nNodes {
            for group in 0..<sizes.nGroups { loadPerReplica[group] = sumInLanes(weight + group &* groupSize, groupSize) }
        }
        pack(itemCount: sizes.nGroups, packCount: sizes.nNodes) { self.loadPerReplica[$0] }
        var position = 0
        for i in 0..<sizes.nGroups {
            let first = Int(packed[i]) &* groupSize
            for expert in first..<first &+ groupSize {
                nodeExpert[position] = Int32(truncatingIfNeeded: expert)
                position &+= 1
            }
        }
    }

    /// Step 2: one replica of each expert, then one more at a time for the expert with the largest load per replica (ties: lowest index).
    /// Fills `item`, `itemReplica`, `replicas` and `loadPerReplica`.
    private func replicate(_ nExperts: Int, _ nItems: Int) {
        for i in 0..<nExperts {
            item[i] = Int32(truncatingIfNeeded: i)
            itemReplica[i] = 0
            replicas[i] = 1
            loadPerReplica[i] = load[i]
        }
        if nItems == nExperts { return }

        // Tournament for the largest load per replica: leaf i holds it and the inverted index, each inner node the larger of its two.
        let half = Self.leaves(nExperts)
        for i in 0..<nExperts { tree[half &+ i] = UInt64(loadPerReplica[i].bitPattern) &<< 32 | UInt64(~UInt32(truncatingIfNeeded: i)) }
        for i in nExperts..<half { tree[half &+ i] = 0 }
        for i in stride(from: half &- 1, to: 0, by: -1) { tree[i] = max(tree[2 &* i], tree[2 &* i &+ 1]) }
        for j in nExperts..<nItems {
            let winner = ~UInt32(truncatingIfNeeded: tree[1])
            let i = Int(winner)
            item[j] = Int32(bitPattern: winner)
            itemReplica[j] = replicas[i]
            replicas[i] &+= 1
            loadPerReplica[i] = load[i] / Float(replicas[i])
            var key = UInt64(loadPerReplica[i].bitPattern) &<< 32 | UInt64(~winner)
            var at = half &+ i
            tree[at] = key
            while at > 1 {
                key = max(key, tree[at ^ 1])
                at &>>= 1
                tree[at] = key
            }
        }
    }

    /// Steps 1 and 3: items, heaviest first (ties: lowest index), each to the lightest pack that still has room (ties: lowest index), every
    /// pack getting equally many. Fills `packed` with the items pack by pack, in the order in which they came. With one item a pack,
    /// item i goes to pack i.
    @inline(__always)
    private func pack(itemCount: Int, packCount: Int, weight: (Int) -> Float) {
        let perPack = itemCount / packCount
        if perPack == 1 {
            for i in 0..<itemCount { packed[i] = Int32(truncatingIfNeeded: i) }
            return
        }
        for i in 0..<itemCount { keys[i] = UInt64(~weight(i).bitPattern) &<< 32 | UInt64(UInt32(truncatingIfNeeded: i)) }
        let sorted = sortByHighHalf(itemCount)
        if packCount == 1 {
            for i in 0..<itemCount { packed[i] = Int32(truncatingIfNeeded: sorted[i]) }
            return
        }
        // Tournament for the lightest pack: leaf p holds its load and p, or `full`.
        let half = Self.leaves(packCount)
        for p in 0..<half { tree[half &+ p] = p < packCount ? UInt64(UInt32(truncatingIfNeeded: p)) : Self.full }
        for i in stride(from: half &- 1, to: 0, by: -1) { tree[i] = min(tree[2 &* i], tree[2 &* i &+ 1]) }
        for p in 0..<packCount { filled[p] = 0 }
        for s in 0..<itemCount {
            let lightest = tree[1]
            let p = Int(UInt32(truncatingIfNeeded: lightest))
            let total = Float(bitPattern: UInt32(lightest &>> 32)) + Float(bitPattern: ~UInt32(sorted[s] &>> 32))
            let filledTo = Int(filled[p])
            packed[p &* perPack &+ filledTo] = Int32(truncatingIfNeeded: sorted[s])
            filled[p] = Int32(truncatingIfNeeded: filledTo &+ 1)
            var key = filledTo &+ 1 == perPack ? Self.full : UInt64(total.bitPattern) &<< 32 | UInt64(UInt32(truncatingIfNeeded: p))
            var at = half &+ p
            tree[at] = key
            while at > 1 {
                key = min(key, tree[at ^ 1])
                at &>>= 1
                tree[at] = key
            }
        }
    }

    // MARK: - Tools

    /// The smallest power of two that is >= n >= 1.
    private static func leaves(_ n: Int) -> Int {
        n <= 1 ? 1 : 1 &<< (Int.bitWidth &- (n &- 1).leadingZeroBitCount)
    }

    /// Sorts the first n of `keys` by their upper 32 bits, ascending and stable. The result is in one of the two key arrays.
    private func sortByHighHalf(_ n: Int) -> UnsafeMutablePointer<UInt64> {
        if n <= 40 {
            for i in 1..<max(n, 1) {
                let key = keys[i]
                var j = i
                // The lower halves are ascending at the start, so comparing whole keys keeps the order of equal upper halves.
                while j > 0 && keys[j &- 1] > key {
                    keys[j] = keys[j &- 1]
                    j &-= 1
                }
                keys[j] = key
            }
            return keys
        }
        histogram.update(repeating: 0, count: 4 * 256)
        for i in 0..<n {
            let high = UInt32(truncatingIfNeeded: keys[i] &>> 32)
            histogram[Int(high & 255)] &+= 1
            histogram[256 &+ Int(high &>> 8 & 255)] &+= 1
            histogram[512 &+ Int(high &>> 16 & 255)] &+= 1
            histogram[768 &+ Int(high &>> 24)] &+= 1
        }
        var from = keys, to = otherKeys
        for digit in 0..<4 {
            let bins = histogram + digit &* 256
            let shift = UInt64(truncatingIfNeeded: 32 &+ 8 &* digit)
            if Int(bins[Int(from[0] &>> shift & 255)]) == n { continue }  // all equal here
            var sum: UInt32 = 0
            for b in 0..<256 {
                let c = bins[b]
                bins[b] = sum
                sum &+= c
            }
            for i in 0..<n {
                let key = from[i]
                let b = Int(key &>> shift & 255)
                to[Int(bins[b])] = key
                bins[b] &+= 1
            }
            swap(&from, &to)
        }
        return from
    }
}

/// The float32 sum in the order in which PyTorch sums a contiguous row on x86-64: 4 vectors of 8 lanes, and 4 single lanes for rows
/// shorter than 8 (observed with 2.11, the same for AVX-512, AVX2 and neither; rows of 512 and more are cut differently there). Whole
/// numbers that sum to less than 2^24 are exact in any order.
func sumInLanes(_ x: UnsafePointer<Float>, _ n: Int) -> Float {
    if n < 8 {
        var lanes = SIMD4<Float>(repeating: 0)
        let whole = n & ~3
        if whole == 4 { lanes += SIMD4(x[0], x[1], x[2], x[3]) }  // +=, so that -0 becomes +0
        for i in whole..<n { lanes[0] += x[i] }
        return lanes[0] + lanes[1] + lanes[2] + lanes[3]
    }
    let vectors = UnsafeRawPointer(x)
    func vector(_ i: Int) -> SIMD8<Float> { vectors.loadUnaligned(fromByteOffset: i &* 32, as: SIMD8<Float>.self) }
    let nVectors = n / 8, whole = nVectors & ~3
    var a = SIMD8<Float>(repeating: 0), b = a, c = a, d = a
    for i in stride(from: 0, to: whole, by: 4) {
        a += vector(i)
        b += vector(i &+ 1)
        c += vector(i &+ 2)
        d += vector(i &+ 3)
    }
    for i in whole..<nVectors { a += vector(i) }
    a = ((a + b) + c) + d
    var sum: Float = 0
    for i in nVectors &* 8..<n { sum += x[i] }
    for lane in 0..<8 { sum += a[lane] }
    return sum
}
