// DeviceImage: a network packed for the kernels, as the layout in cuda/tables.h says. Each section has one function of its name there.

import CLPLBKernels
import LPLBSolver

/// Packs the network of one placement.
struct DeviceImage {
    private let shape: lplbk_shape
    private let layout: lplbk_layout
    private let network: Network
    private let capacities: RankCapacities?
    /// [layout.words]
    private let words: UnsafeMutablePointer<Int32>

    /// [layout.words]
    static func words(
        _ network: Network, shape: lplbk_shape, layout: lplbk_layout, digest: Int32, capacities: RankCapacities? = nil
    ) -> [Int32] {
        let count = Int(layout.words)
        return [Int32](unsafeUninitializedCapacity: count) { words, initialized in
            words.initialize(repeating: 0)
            initialized = count
            DeviceImage(shape: shape, layout: layout, network: network, capacities: capacities, words: words.baseAddress!).pack(digest)
        }
    }

    private func pack(_ digest: Int32) {
        put(layout.digest, 0, digest)
        replicated()
        slotExperts()
        classBundles()
        experts()
        ranks()
        for group in 0..<network.shape.nGroups { image(group) }
    }

    private func put(_ section: Int32, _ index: Int, _ word: Int32) { words[Int(section) &+ index] = word }

    private func image(of group: Int) -> Int32 { layout.image + Int32(group) * layout.image_words }
    private func slot(of expert: Int) -> Int { Int(network.placeSlot[Int(network.expertStart[expert])]) }

    // MARK: Experts

    private func put(expert: Int, _ section: Int32, _ index: Int) {
        let first = Int(network.expertStart[expert]), copy = network.expertCopy[expert]
        let place = network.expertBundle[expert] < 0 ? network.expertBundle[expert] : number(ofBundleOf: expert)
        lplbk_expert(
            words + Int(section) + 4 * index, Int32(expert), place, network.placeSlot[first], copy >= 0 ? copy : Int32(LPLBK_NO_SLOT),
            network.expertClass[expert])
    }

    /// Counted over all groups, as many for each.
    private func number(ofBundleOf expert: Int) -> Int32 {
        let group = network.placeRank[Int(network.expertStart[expert])] / shape.group_size
        return group * shape.max_bundles + network.expertBundle[expert] - network.groupBundleStart[Int(group)]
    }

    /// replicated with its lengths, and code, which leads there.
    private func replicated() {
        var count = 0
        func add(_ expert: Int) {
            put(layout.code, expert, -1 - Int32(count))
            put(expert: expert, layout.replicated, count)
            count += 1
        }
        for expert in network.bundleExpert { add(Int(expert)) }
        put(layout.n_bundled, 0, Int32(count))
        for expert in 0..<network.shape.nLogical where network.expertBundle[expert] < 0 {
            // An expert beside its copy is replicated too.
            if network.expertClass[expert] >= 0 { add(expert) } else { put(layout.code, expert, Int32(slot(of: expert))) }
        }
        put(layout.n_replicated, 0, Int32(count))
    }

    /// expert, and each group's part of it: its bundles' experts, then those with one place by its slot.
    private func experts() {
        var single = [Int32](repeating: -1, count: network.shape.nPhysical)
        for expert in 0..<network.shape.nLogical where network.expertBundle[expert] < 0 { single[slot(of: expert)] = Int32(expert) }
        let slotsOfGroup = network.shape.nLocal * network.shape.groupSize
        var count = 0
        func add(_ expert: Int32) {
            put(expert: Int(expert), layout.expert, count)
            count += 1
        }
        for group in 0..<network.shape.nGroups {
            let first = count, bundles = network.bundles(of: group)
            for index in bundles.lowerBound * network.bundleExperts..<bundles.upperBound * network.bundleExperts {
                add(network.bundleExpert[index])
            }
            for slot in group * slotsOfGroup..<(group + 1) * slotsOfGroup where single[slot] >= 0 { add(single[slot]) }
            put(image(of: group), Int(LPLBK_IMAGE_FIRST_EXPERT), Int32(first))
            put(image(of: group), Int(LPLBK_IMAGE_EXPERTS), Int32(count - first))
        }
    }

    /// ranked, speed and fixed.
    private func ranks() {
        put(layout.ranked, 0, capacities == nil ? 0 : 1)
        for rank in 0..<network.shape.epSize {
            put(layout.speed, rank, capacities?.speed[rank] ?? RankCapacities.normalSpeed)
            put(layout.fixed, rank, capacities?.fixed[rank] ?? 0)
        }
    }

    private func slotExperts() {
        for slot in 0..<network.shape.nPhysical { put(layout.slot_expert, slot, -1) }
        for expert in 0..<network.shape.nLogical {
            for place in network.places(of: expert) { put(layout.slot_expert, Int(network.placeSlot[place]), Int32(expert)) }
        }
    }

    private func classBundles() {
        for slotClass in 0..<Int(shape.ep_size * shape.n_redundant) { put(layout.class_bundle, slotClass, -1) }
        for expert in network.bundleExpert where network.expertClass[Int(expert)] >= 0 {
            put(layout.class_bundle, Int(network.expertClass[Int(expert)]), number(ofBundleOf: Int(expert)))
        }
    }

    // MARK: Images

    private func image(_ group: Int) {
        let image = image(of: group), bundles = network.bundles(of: group), arcs = network.arcs(ofGroup: group)
        put(image, Int(LPLBK_IMAGE_BUNDLES), Int32(bundles.count))
        put(image, Int(LPLBK_IMAGE_ARCS), Int32(arcs.count))
        if shape.group_size <= 32 {
            for lane in 0..<32 * (shape.colours == 2 || shape.colours == 4 ? 4 : Int(LPLBK_MAX_COLOURS)) {
                put(image + layout.lanes, lane, lplbk_no_lane(Int32(lane % 32)))
            }
        }
        colours(group, bundles.lowerBound, image)
        if shape.colours > 0 { return }
        for bundle in bundles {
            put(image + layout.bundle_start, bundle - bundles.lowerBound, network.bundleStart[bundle] - Int32(arcs.lowerBound))
            self.arcs(bundle, bundle - bundles.lowerBound, arcs.lowerBound, image)
        }
        put(image + layout.bundle_start, bundles.count, Int32(arcs.count))
        rankArcs(group, bundles.lowerBound, arcs.lowerBound, image)
    }

    /// The colours and, in lanes, for each of them and each rank where the bundle's other place is.
    private func colours(_ group: Int, _ firstBundle: Int, _ image: Int32) {
        let colours = network.colours(of: group)
        put(image, Int(LPLBK_IMAGE_COLOURS), Int32(colours.count))
        if shape.group_size <= 32 { put(image, Int(LPLBK_IMAGE_PAIRS), colours.isEmpty ? 0 : 1) }
        var bundle = firstBundle
        for (index, colour) in colours.enumerated() {
            let section = image + layout.lanes + 32 * Int32(index)
            while shape.group_size <= 32 && bundle < network.colourEnd[colour] {
                let arc = Int(network.bundleStart[bundle]), number = Int32(bundle - firstBundle)
                let u = network.arcRank[arc], v = network.arcRank[arc + 1]
                put(section, Int(u), lplbk_lane(v, number, 0))
                put(section, Int(v), lplbk_lane(u, number, 1))
                bundle += 1
            }
            put(image, Int(LPLBK_IMAGE_COLOUR) + index + 1, network.colourEnd[colour] - Int32(firstBundle))
        }
    }

    /// arc_rank, arc_slot and mask.
    private func arcs(_ bundle: Int, _ bundleInGroup: Int, _ firstArc: Int, _ image: Int32) {
        let expert = Int(network.bundleExpert[bundle * network.bundleExperts])
        let mask = Int(image + layout.mask) + bundleInGroup * Int(layout.mask_words)
        for (place, arc) in zip(network.places(of: expert), network.arcs(of: bundle)) {
            let rank = network.arcRank[arc], isFirst = arc == Int(network.bundleStart[bundle])
            put(image + layout.arc_rank, arc - firstArc, rank)
            put(image + layout.arc_slot, arc - firstArc, network.placeSlot[place] | (isFirst ? 0 : Int32.min))
            if layout.mask_words > 0 { words[mask + Int(rank / 32)] |= Int32(bitPattern: 1 << UInt32(rank % 32)) }
        }
    }

    /// rank_start and rank_arc.
    private func rankArcs(_ group: Int, _ firstBundle: Int, _ firstArc: Int, _ image: Int32) {
        let firstRank = group * network.shape.groupSize
        let firstEntry = network.rankStart[firstRank]
        for rank in 0...network.shape.groupSize { put(image + layout.rank_start, rank, network.rankStart[firstRank + rank] - firstEntry) }
        for entry in Int(firstEntry)..<Int(network.rankStart[firstRank + network.shape.groupSize]) {
            let arc = network.rankArc[entry], bundle = network.arcBundle[Int(arc)]
            let arcs = network.arcs(of: Int(bundle))
            let flip = arcs.count == 2 && network.arcRank[arcs.lowerBound] > network.arcRank[arcs.lowerBound + 1]
            let word = (arc - Int32(firstArc)) | (bundle - Int32(firstBundle)) << 13 | (flip ? Int32.min : 0)
            put(image + layout.rank_arc, entry - Int(firstEntry), word)
        }
    }
}
