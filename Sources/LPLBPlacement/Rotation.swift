// Rotation: which rank gets which part of a layer's placement, so that over all layers no rank has more copies to send than others.
//
// In one layer the ranks differ: a hub gives weights to most ranks and gets their gradients. What the ranks are called is free, so each
// layer's hubs can be others. Layers that are refreshed together then burden all ranks alike.

import LPLBTopology

/// Gives the parts of each layer to ranks such that the sums over all layers of pulls and of pushes are as equal as it finds. Only ranks
/// of one class take each other's part. A single layer stays as it is.
/// - Parameters:
///   - layers: [nLayers][nRanks * width], rewritten.
///   - classes: ranks with equally many slots, which may take each other's part.
func rotate(_ layers: inout [[Int32]], classes: [[Int]], shape: ExpertShape) throws(RuleViolation) {
    guard layers.count > 1 else { return }
    let width = shape.nLocal
    var counts: [CopyCounts] = []
    for phy2log in layers { counts.append(try CopyCounts(Placement(shape: shape, phy2log: phy2log))) }
    var rotation = Rotation(nRanks: shape.epSize, classes: classes)
    var target = counts.map { rotation.add($0, target: nil) }
    for layer in counts.indices { target[layer] = rotation.add(counts[layer], target: target[layer]) }
    for layer in layers.indices {
        let old = layers[layer]
        for part in 0..<shape.epSize {
            let to = target[layer][part] * width
            layers[layer].replaceSubrange(to..<to + width, with: old[part * width..<(part + 1) * width])
        }
    }
}

private struct Rotation {
    /// [nRanks]: sums over the layers that have been added.
    private var pulls: [Int], pushes: [Int]
    private let classes: [[Int]]
    /// How often all pairs of ranks are looked at, at most, for one layer.
    private static let passes = 3

    init(nRanks: Int, classes: [[Int]]) {
        pulls = [Int](repeating: 0, count: nRanks)
        pushes = pulls
        self.classes = classes
    }

    /// Adds a layer, where `target` is given after taking it off from there: the part with the most copies goes to the rank that has the
    /// fewest so far, then pairs of ranks swap parts while the sum of squares falls.
    /// - Returns: the rank of each part.
    mutating func add(_ counts: CopyCounts, target former: [Int]?) -> [Int] {
        if let former { for (part, rank) in former.enumerated() { account(counts, part, rank, -1) } }
        var target = former ?? Array(pulls.indices)
        let isFirst = !pulls.contains { $0 > 0 } && !pushes.contains { $0 > 0 }
        for ranks in classes where !isFirst {
            let parts = ranks.sorted { (counts.pushes[$0], counts.pulls[$0], $1) > (counts.pushes[$1], counts.pulls[$1], $0) }
            let places = ranks.sorted { (pushes[$0], pulls[$0], $0) < (pushes[$1], pulls[$1], $1) }
            for (part, place) in zip(parts, places) { target[part] = place }
            swapPairs(counts, parts, &target)
        }
        for (part, rank) in target.enumerated() { account(counts, part, rank, 1) }
        return target
    }

    private mutating func account(_ counts: CopyCounts, _ part: Int, _ rank: Int, _ sign: Int) {
        pulls[rank] += sign * counts.pulls[part]
        pushes[rank] += sign * counts.pushes[part]
    }

    private func swapPairs(_ counts: CopyCounts, _ parts: [Int], _ target: inout [Int]) {
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
