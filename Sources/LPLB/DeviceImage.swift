// DeviceImage: a network packed for the kernels, as the layout in cuda/kernels.h says. Each section has one function of its name there.

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
        experts()
        places()
        bundleExperts()
        if shape.n_redundant > 0 { home() }
        put(layout.expert_class, network.expertClass)
        put(layout.expert_copy, network.expertCopy)
        for group in 0..<Int(shape.n_groups) {
            if shape.pair_slots > 0 { lanes(group) }
            image(group)
        }
        return words
    }

    private mutating func put(_ section: Int32, _ index: Int, _ word: Int32) { words[Int(section) + index] = word }

    private mutating func put(_ section: Int32, _ all: [Int32]) { for (index, word) in all.enumerated() { put(section, index, word) } }

    private func group(ofPlace place: Int) -> Int { Int(network.placeRank[place] / shape.group_size) }
    private func rankInGroup(ofArc arc: Int) -> Int32 { network.arcRank[arc] % shape.group_size }

    // MARK: Experts

    private mutating func experts() {
        for expert in 0..<Int(shape.n_logical) {
            let places = network.places(of: expert), bundle = network.expertBundle[expert]
            let first = places.lowerBound, group = group(ofPlace: places.lowerBound)
            let bundleInGroup = bundle - network.groupBundleStart[group]
            put(layout.expert, 4 * expert, bundle < 0 ? -1 - network.placeRank[first] % shape.group_size : bundleInGroup)
            put(layout.expert, 4 * expert + 1, Int32(places.count | group << 16))
            put(layout.expert, 4 * expert + 2, Int32(first))
            put(layout.expert, 4 * expert + 3, network.placeSlot[first])
        }
    }

    private mutating func places() {
        for place in 0..<network.nPlaces {
            put(layout.place, 2 * place, network.placeSlot[place])
            put(layout.place, 2 * place + 1, network.placeRank[place])
        }
    }

    /// bundle_expert with its starts and its length, and code, which leads there. Behind the bundles' experts stand those whose copy is
    /// beside their original: they have one place, but a slot of their own for redirect_by_ratio.
    private mutating func bundleExperts() {
        let selfCopies = (0..<shape.n_logical).filter {
            network.expertClass[Int($0)] >= 0 && network.expertBundle[Int($0)] < 0
        }
        let listed = network.bundleExpert + selfCopies
        put(layout.n_replicated, 0, Int32(listed.count))
        put(layout.bundle_expert, listed)
        for expert in 0..<Int(shape.n_logical) { put(layout.code, expert, network.placeSlot[Int(network.expertStart[expert])]) }
        for (index, expert) in listed.enumerated() { put(layout.code, Int(expert), -1 - Int32(index)) }
        for group in 0..<Int(shape.n_groups) {
            let bundles = network.bundles(of: group), first = group * Int(shape.max_bundles)
            // The last group's end is the end of all; the starts between two groups mean nothing.
            let last = group + 1 == Int(shape.n_groups) ? bundles.upperBound : bundles.upperBound - 1
            for bundle in stride(from: bundles.lowerBound, through: last, by: 1) {
                put(layout.bundle_expert_start, first + bundle - bundles.lowerBound, network.bundleExpertStart[bundle])
            }
        }
    }

    /// A topology's experts by original slot.
    private mutating func home() {
        let nLocal = shape.n_physical / shape.ep_size, nOwn = shape.n_logical / shape.ep_size
        var record: [Int32] = [0, 0, 0, 0]
        for expert in 0..<shape.n_logical {
            let first = Int(network.expertStart[Int(expert)])
            let slot = network.placeSlot[first]
            let offset = slot % nLocal, rank = slot / nLocal % shape.group_size
            let isPair = network.expertBundle[Int(expert)] >= 0
            lplbk_home(
                &record, expert, isPair ? 1 : 0, rank, rank * shape.n_redundant + offset % shape.n_redundant, slot,
                isPair ? network.placeSlot[first + 1] : -1)
            for (index, word) in record.enumerated() { put(layout.home, 4 * Int(slot / nLocal * nOwn + offset) + index, word) }
        }
    }

    // MARK: Lanes

    /// A topology's bundles go by their slot class.
    private mutating func lanes(_ group: Int) {
        let firstClass = Int32(group) * shape.group_size * shape.n_redundant
        let section = layout.lanes + Int32(group) * shape.pair_slots * 32
        lanes(section, nColours: Int(shape.pair_slots), group) { [network] bundle in
            network.expertClass[Int(network.bundleExpert[Int(network.bundleExpertStart[bundle])])] - firstClass
        }
    }

    /// The same inside the image of a group that is all pairs, for planners without lanes by slot class. Bundles go by their number.
    private mutating func pairLanes(_ group: Int, _ image: Int32) {
        let first = network.groupBundleStart[group]
        lanes(image + layout.pair_lanes, nColours: Int(LPLBK_MAX_COLOURS), group) { Int32($0) - first }
        put(image, Int(LPLBK_IMAGE_PAIRS), 1)
    }

    /// For each colour and rank, where the bundle's other place is.
    private mutating func lanes(_ section: Int32, nColours: Int, _ group: Int, slotClass: (Int) -> Int32) {
        for lane in 0..<32 * nColours { put(section, lane, lplbk_no_lane(Int32(lane % 32))) }
        for (colour, bundles) in network.colours(of: group).enumerated() {
            for bundle in bundles {
                let arc = Int(network.bundleStart[bundle])
                let u = rankInGroup(ofArc: arc), v = rankInGroup(ofArc: arc + 1)
                put(section, 32 * colour + Int(u), lplbk_lane(v, slotClass(bundle), 0))
                put(section, 32 * colour + Int(v), lplbk_lane(u, slotClass(bundle), 1))
            }
        }
    }

    // MARK: Images

    private mutating func image(_ group: Int) {
        let image = layout.image + Int32(group) * layout.image_words
        let bundles = network.bundles(of: group), colours = network.colours(of: group)
        let firstArc = Int(network.bundleStart[bundles.lowerBound])
        put(image, Int(LPLBK_IMAGE_BUNDLES), Int32(bundles.count))
        put(image, Int(LPLBK_IMAGE_ARCS), network.bundleStart[bundles.upperBound] - Int32(firstArc))
        put(image, Int(LPLBK_IMAGE_COLOURS), Int32(colours.count))
        for (colour, its) in colours.enumerated() {
            put(image, Int(LPLBK_IMAGE_COLOUR) + colour + 1, Int32(its.upperBound - bundles.lowerBound))
        }
        for bundle in bundles {
            put(image + layout.bundle_start, bundle - bundles.lowerBound, network.bundleStart[bundle] - Int32(firstArc))
            arcs(bundle, bundle - bundles.lowerBound, firstArc, image)
        }
        put(image + layout.bundle_start, bundles.count, network.bundleStart[bundles.upperBound] - Int32(firstArc))
        rankArcs(group, bundles.lowerBound, firstArc, image)
        if shape.pair_slots == 0 && shape.group_size <= 32 && !colours.isEmpty { pairLanes(group, image) }
    }

    /// arc_rank, arc_slot and mask.
    private mutating func arcs(_ bundle: Int, _ bundleInGroup: Int, _ firstArc: Int, _ image: Int32) {
        let expert = Int(network.bundleExpert[Int(network.bundleExpertStart[bundle])])
        for (place, arc) in zip(network.places(of: expert), network.arcs(of: bundle)) {
            let rank = rankInGroup(ofArc: arc), isFirst = arc == Int(network.bundleStart[bundle])
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
