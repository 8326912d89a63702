// DeviceImage: a network packed for the kernels, as the layout in cuda/tables.h says. Each section has one function of its name there.

import CLPLBKernels
import LPLBSolver

/// Packs the network of one placement. Not for the hot path: allocates.
struct DeviceImage {
    private let shape: lplbk_shape
    private let layout: lplbk_layout
    private let network: Network
    private var words: [Int32]

    init(shape: lplbk_shape, layout: lplbk_layout, network: Network) {
        (self.shape, self.layout, self.network) = (shape, layout, network)
        words = [Int32](repeating: 0, count: Int(layout.words))
    }

    /// [layout.words]
    consuming func words(digest: Int32) -> [Int32] {
        put(layout.digest, 0, digest)
        replicated()
        classBundles()
        var listed = 0
        let others = singles()
        for group in 0..<Int(shape.n_groups) {
            image(group)
            experts(group, others[group], &listed)
        }
        return words
    }

    private mutating func put(_ section: Int32, _ index: Int, _ word: Int32) { words[Int(section) + index] = word }

    private func image(of group: Int) -> Int32 { layout.image + Int32(group) * layout.image_words }
    private func group(of expert: Int) -> Int { Int(network.placeRank[Int(network.expertStart[expert])] / shape.group_size) }

    // MARK: Experts

    private mutating func put(expert: Int, _ section: Int32, _ index: Int) {
        let first = Int(network.expertStart[expert]), bundle = network.expertBundle[expert], copy = network.expertCopy[expert]
        var place = -1 - network.placeRank[first]
        if bundle >= 0 { place = number(ofBundle: Int(bundle), in: group(of: expert)) }
        words.withUnsafeMutableBufferPointer { words in
            lplbk_expert(
                words.baseAddress! + Int(section) + 4 * index, Int32(expert), place, network.placeSlot[first],
                copy >= 0 ? copy : Int32(LPLBK_NO_SLOT), network.expertClass[expert])
        }
    }

    /// Counted over all groups, as many for each.
    private func number(ofBundle bundle: Int, in group: Int) -> Int32 {
        Int32(group) * shape.max_bundles + Int32(bundle) - network.groupBundleStart[group]
    }

    /// replicated with its lengths, and code, which leads there.
    private mutating func replicated() {
        let besideTheirCopy = (0..<shape.n_logical).filter { network.expertClass[Int($0)] >= 0 && network.expertBundle[Int($0)] < 0 }
        let experts = Array(network.bundleExpert) + besideTheirCopy
        put(layout.n_bundled, 0, Int32(network.bundleExpert.count))
        put(layout.n_replicated, 0, Int32(experts.count))
        for expert in 0..<Int(shape.n_logical) { put(layout.code, expert, network.placeSlot[Int(network.expertStart[expert])]) }
        for (index, expert) in experts.enumerated() {
            put(layout.code, Int(expert), -1 - Int32(index))
            put(expert: Int(expert), layout.replicated, index)
        }
    }

    /// By group, the experts with one place, by its slot.
    private func singles() -> [[Int]] {
        var expertOfSlot = [Int](repeating: -1, count: Int(shape.n_physical))
        for expert in 0..<Int(shape.n_logical) where network.expertBundle[expert] < 0 {
            expertOfSlot[Int(network.placeSlot[Int(network.expertStart[expert])])] = expert
        }
        var singles = [[Int]](repeating: [], count: Int(shape.n_groups))
        for expert in expertOfSlot where expert >= 0 { singles[group(of: expert)].append(expert) }
        return singles
    }

    /// A group's part of expert. `listed`: those of the groups before it.
    private mutating func experts(_ group: Int, _ singles: [Int], _ listed: inout Int) {
        let bundles = network.bundles(of: group)
        let bundled = network.bundleExpert[
            bundles.lowerBound * network.bundleExperts..<bundles.upperBound * network.bundleExperts]
        put(image(of: group), Int(LPLBK_IMAGE_FIRST_EXPERT), Int32(listed))
        put(image(of: group), Int(LPLBK_IMAGE_EXPERTS), Int32(bundled.count + singles.count))
        for expert in bundled.map({ Int($0) }) + singles {
            put(expert: expert, layout.expert, listed)
            listed += 1
        }
    }

    private mutating func classBundles() {
        for slotClass in 0..<Int(shape.ep_size * shape.n_redundant) { put(layout.class_bundle, slotClass, -1) }
        for expert in network.bundleExpert.map({ Int($0) }) where network.expertClass[expert] >= 0 {
            let bundle = number(ofBundle: Int(network.expertBundle[expert]), in: group(of: expert))
            put(layout.class_bundle, Int(network.expertClass[expert]), bundle)
        }
    }

    // MARK: Images

    private mutating func image(_ group: Int) {
        let image = image(of: group)
        let bundles = network.bundles(of: group), colours = network.colours(of: group)
        let firstArc = Int(network.bundleStart[bundles.lowerBound])
        put(image, Int(LPLBK_IMAGE_BUNDLES), Int32(bundles.count))
        put(image, Int(LPLBK_IMAGE_ARCS), network.bundleStart[bundles.upperBound] - Int32(firstArc))
        put(image, Int(LPLBK_IMAGE_COLOURS), Int32(colours.count))
        for (colour, its) in colours.enumerated() {
            put(image, Int(LPLBK_IMAGE_COLOUR) + colour + 1, Int32(its.upperBound - bundles.lowerBound))
        }
        if shape.group_size <= 32 { lanes(colours, bundles.lowerBound, image) }
        if shape.colours > 0 { return }
        for bundle in bundles {
            put(image + layout.bundle_start, bundle - bundles.lowerBound, network.bundleStart[bundle] - Int32(firstArc))
            arcs(bundle, bundle - bundles.lowerBound, firstArc, image)
        }
        put(image + layout.bundle_start, bundles.count, network.bundleStart[bundles.upperBound] - Int32(firstArc))
        rankArcs(group, bundles.lowerBound, firstArc, image)
    }

    /// For each colour and rank, where the bundle's other place is.
    private mutating func lanes(_ colours: [Range<Int>], _ firstBundle: Int, _ image: Int32) {
        let section = image + layout.lanes
        put(image, Int(LPLBK_IMAGE_PAIRS), colours.isEmpty ? 0 : 1)
        for lane in 0..<32 * (shape.colours == 2 || shape.colours == 4 ? 4 : Int(LPLBK_MAX_COLOURS)) {
            put(section, lane, lplbk_no_lane(Int32(lane % 32)))
        }
        for (colour, bundles) in colours.enumerated() {
            for bundle in bundles {
                let arc = Int(network.bundleStart[bundle]), number = Int32(bundle - firstBundle)
                let u = network.arcRank[arc], v = network.arcRank[arc + 1]
                put(section, 32 * colour + Int(u), lplbk_lane(v, number, 0))
                put(section, 32 * colour + Int(v), lplbk_lane(u, number, 1))
            }
        }
    }

    /// arc_rank, arc_slot and mask.
    private mutating func arcs(_ bundle: Int, _ bundleInGroup: Int, _ firstArc: Int, _ image: Int32) {
        let expert = Int(network.bundleExpert[bundle * network.bundleExperts])
        for (place, arc) in zip(network.places(of: expert), network.arcs(of: bundle)) {
            let rank = network.arcRank[arc], isFirst = arc == Int(network.bundleStart[bundle])
            put(image + layout.arc_rank, arc - firstArc, rank)
            put(image + layout.arc_slot, arc - firstArc, network.placeSlot[place] | (isFirst ? 0 : Int32.min))
            if layout.mask_words > 0 {
                let word = Int(image + layout.mask) + bundleInGroup * Int(layout.mask_words) + Int(rank / 32)
                words[word] |= Int32(bitPattern: 1 << UInt32(rank % 32))
            }
        }
    }

    /// rank_start and rank_arc.
    private mutating func rankArcs(_ group: Int, _ firstBundle: Int, _ firstArc: Int, _ image: Int32) {
        let firstRank = group * Int(shape.group_size)
        let firstEntry = network.rankStart[firstRank]
        for rank in 0...Int(shape.group_size) {
            put(image + layout.rank_start, rank, network.rankStart[firstRank + rank] - firstEntry)
        }
        for entry in Int(firstEntry)..<Int(network.rankStart[firstRank + Int(shape.group_size)]) {
            let arc = network.rankArc[entry], bundle = network.arcBundle[Int(arc)]
            let arcs = network.arcs(of: Int(bundle))
            let flip = arcs.count == 2 && network.arcRank[arcs.lowerBound] > network.arcRank[arcs.lowerBound + 1]
            let word = (arc - Int32(firstArc)) | (bundle - Int32(firstBundle)) << 13 | (flip ? Int32.min : 0)
            put(image + layout.rank_arc, entry - Int(firstEntry), word)
        }
    }
}
