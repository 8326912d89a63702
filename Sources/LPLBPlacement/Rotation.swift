// Rotation: which rank gets which part of a layer's placement, so that over all layers no rank has more copies to send than others.
//
// In one layer the ranks differ: a hub gives weights to most ranks and gets their gradients. What the ranks are called is free, so each
// layer's hubs can be others. Layers that are refreshed together then burden all ranks alike.

import LPLBTopology

/// Gives the parts of each layer to ranks such that the sums over all layers of pulls and of pushes are as equal as it finds. Only ranks
/// of one class take each other's part.
/// - Parameters:
///   - layers: [nLayers][nRanks * width], rewritten.
///   - classes: blocks that may take each other's part, by number.
///   - block: ranks that stay together; 1, or those of a host.
func rotate(_ layers: inout [[Int32]], classes: [[Int]], shape: ExpertShape, block: Int = 1) throws(RuleViolation) {
    guard layers.count > 1 else { return }
    let width = shape.nLocal * block
    var counts: [BlockCounts] = []
    for phy2log in layers { counts.append(BlockCounts(try CopyCounts(Placement(shape: shape, phy2log: phy2log)), block: block)) }
    var rotation = Rotation(nBlocks: shape.epSize / block, classes: classes)
    var target = counts.map { rotation.add($0, target: nil) }
    for layer in counts.indices { target[layer] = rotation.add(counts[layer], target: target[layer]) }
    for layer in layers.indices {
        let old = layers[layer]
        for (part, to) in target[layer].enumerated() {
            layers[layer].replaceSubrange(to * width..<(to + 1) * width, with: old[part * width..<(part + 1) * width])
        }
    }
}

/// Pulls and pushes of blocks of ranks.
private struct BlockCounts {
    let pulls: [Int], pushes: [Int]

    init(_ counts: CopyCounts, block: Int) {
        func summed(_ ofRanks: [Int]) -> [Int] {
            stride(from: 0, to: ofRanks.count, by: block).map { ofRanks[$0..<$0 + block].reduce(0, +) }
        }
        (pulls, pushes) = (summed(counts.pulls), summed(counts.pushes))
    }
}

private struct Rotation {
    /// [nBlocks]: sums over the layers that have been added.
    private var pulls: [Int], pushes: [Int]
    private let classes: [[Int]]
    /// How often all pairs of blocks are looked at, at most, for one layer.
    private static let passes = 3

    init(nBlocks: Int, classes: [[Int]]) {
        pulls = [Int](repeating: 0, count: nBlocks)
        pushes = pulls
        self.classes = classes
    }

    /// Adds a layer, where `target` is given after taking it off from there: the part with the most copies goes to the block that has the
    /// fewest so far, then pairs of blocks swap parts while the sum of squares falls.
    /// - Returns: the block of each part.
    mutating func add(_ counts: BlockCounts, target former: [Int]?) -> [Int] {
        if let former { for (part, block) in former.enumerated() { account(counts, part, block, -1) } }
        var target = former ?? Array(pulls.indices)
        let isFirst = !pulls.contains { $0 > 0 } && !pushes.contains { $0 > 0 }
        for blocks in classes where !isFirst {
            let parts = blocks.sorted { (counts.pushes[$0], counts.pulls[$0], $1) > (counts.pushes[$1], counts.pulls[$1], $0) }
            let places = blocks.sorted { (pushes[$0], pulls[$0], $0) < (pushes[$1], pulls[$1], $1) }
            for (part, place) in zip(parts, places) { target[part] = place }
            swapPairs(counts, parts, &target)
        }
        for (part, block) in target.enumerated() { account(counts, part, block, 1) }
        return target
    }

    private mutating func account(_ counts: BlockCounts, _ part: Int, _ block: Int, _ sign: Int) {
        pulls[block] += sign * counts.pulls[part]
        pushes[block] += sign * counts.pushes[part]
    }

    private func swapPairs(_ counts: BlockCounts, _ parts: [Int], _ target: inout [Int]) {
        for _ in 0..<Rotation.passes {
            var swapped = false
            for (index, one) in parts.enumerated() {
                for other in parts[(index + 1)...] {
                    let a = target[one], b = target[other]
                    let gain = (pulls[a] - pulls[b]) * (counts.pulls[one] - counts.pulls[other])
                        + (pushes[a] - pushes[b]) * (counts.pushes[one] - counts.pushes[other])
                    guard gain > 0 else { continue }
                    (target[one], target[other]) = (b, a)
                    swapped = true
                }
            }
            if !swapped { return }
        }
    }
}
