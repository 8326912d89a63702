// The tables of a placement in the form that the kernels read: SolverTables rearranged into the blob of cuda/kernels.h.

import CLPLBKernels
import LPLBSolver
import LPLBTopology

/// Builds the blob of one placement. Not for the hot path: allocates.
struct CudaTables {
    let shape: lplbk_shape
    let layout: lplbk_layout
    let tables: SolverTables

    /// [layout.words]
    func blob(digest: Int32) -> [Int32] {
        var words = [Int32](repeating: 0, count: Int(layout.words))
        words.withUnsafeMutableBufferPointer { buffer in
            guard let t = buffer.baseAddress else { return }
            t[Int(layout.digest)] = digest
            writeExperts(t)
            if shape.n_redundant > 0 { writeHomes(t) }
            var listed: Int32 = 0
            for group in 0..<Int(shape.n_groups) { writeGroup(group, t, &listed) }
            let lastBundles = tables.groupBundleStart[Int(shape.n_groups)] - tables.groupBundleStart[Int(shape.n_groups) - 1]
            t[Int(layout.bundle_expert_start + (shape.n_groups - 1) * shape.max_bundles + lastBundles)] = listed
            listSelfCopies(t, &listed)
            t[Int(layout.n_replicated)] = listed
        }
        return words
    }

    /// Experts and their places, as if all were single; writeGroup renumbers the replicated ones.
    private func writeExperts(_ t: UnsafeMutablePointer<Int32>) {
        for expert in 0..<Int(shape.n_logical) {
            let first = Int(tables.expertStart[expert]), end = Int(tables.expertStart[expert + 1])
            let bundle = tables.expertBundle[expert]
            let group = tables.placeRank[first] / shape.group_size
            let record = t + Int(layout.expert) + 4 * expert
            record[0] = bundle < 0 ? -1 - tables.placeRank[first] % shape.group_size : bundle - tables.groupBundleStart[Int(group)]
            record[1] = Int32(end - first) | group << 16
            record[2] = Int32(first)
            record[3] = tables.placeSlot[first]
            for place in first..<end {
                t[Int(layout.place) + 2 * place] = tables.placeSlot[place]
                t[Int(layout.place) + 2 * place + 1] = tables.placeRank[place]
            }
            t[Int(layout.code) + expert] = tables.placeSlot[first]
            t[Int(layout.expert_class) + expert] = tables.expertClass[expert]
            t[Int(layout.expert_copy) + expert] = tables.expertCopy[expert]
        }
    }

    /// A topology's experts by original slot.
    private func writeHomes(_ t: UnsafeMutablePointer<Int32>) {
        let nLocal = shape.n_physical / shape.ep_size, nOwn = shape.n_logical / shape.ep_size
        for expert in 0..<shape.n_logical {
            let first = Int(tables.expertStart[Int(expert)])
            let slot = tables.placeSlot[first]
            let rank = slot / nLocal, offset = slot % nLocal
            let rankInGroup = rank % shape.group_size
            let paired = tables.expertBundle[Int(expert)] >= 0
            lplbk_home(
                t + Int(layout.home + 4 * (rank * nOwn + offset)), expert, paired ? 1 : 0, rankInGroup,
                rankInGroup * shape.n_redundant + offset % shape.n_redundant, slot, paired ? tables.placeSlot[first + 1] : -1)
        }
    }

    /// The image of a group, the lists of its bundles' experts and its lanes.
    private func writeGroup(_ group: Int, _ t: UnsafeMutablePointer<Int32>, _ listed: inout Int32) {
        let image = t + Int(layout.image) + group * Int(layout.image_words)
        let firstBundle = Int(tables.groupBundleStart[group]), endBundle = Int(tables.groupBundleStart[group + 1])
        let firstArc = Int(tables.bundleStart[firstBundle])
        let colours = Int(tables.groupColourStart[group])..<Int(tables.groupColourStart[group + 1])
        image[LPLBK_IMAGE_BUNDLES] = Int32(endBundle - firstBundle)
        image[LPLBK_IMAGE_ARCS] = tables.bundleStart[endBundle] - Int32(firstArc)
        image[LPLBK_IMAGE_COLOURS] = Int32(colours.count)
        for (c, colour) in colours.enumerated() {
            image[LPLBK_IMAGE_COLOUR + c] = tables.colourBegin[colour] - Int32(firstBundle)
            image[LPLBK_IMAGE_COLOUR + c + 1] = tables.colourEnd[colour] - Int32(firstBundle)
        }
        for bundle in firstBundle..<endBundle {
            let local = bundle - firstBundle
            t[Int(layout.bundle_expert_start) + group * Int(shape.max_bundles) + local] = listed
            for k in Int(tables.bundleExpertStart[bundle])..<Int(tables.bundleExpertStart[bundle + 1]) {
                let expert = tables.bundleExpert[k]
                t[Int(layout.code + expert)] = -1 - listed
                t[Int(layout.bundle_expert + listed)] = expert
                listed += 1
            }
            writeBundle(bundle, local, firstArc, image)
        }
        image[Int(layout.bundle_start) + endBundle - firstBundle] = image[LPLBK_IMAGE_ARCS]
        writeRanks(group, firstBundle, firstArc, image)
        if shape.pair_slots > 0 {
            writeLanes(group, colours, t)
        } else if shape.group_size <= 32 && colours.count > 0 {
            writePairLanes(firstBundle, colours, image)
        }
    }

    private func writeBundle(_ bundle: Int, _ local: Int, _ firstArc: Int, _ image: UnsafeMutablePointer<Int32>) {
        let arcs = Int(tables.bundleStart[bundle])..<Int(tables.bundleStart[bundle + 1])
        let place = Int(tables.expertStart[Int(tables.bundleExpert[Int(tables.bundleExpertStart[bundle])])])
        image[Int(layout.bundle_start) + local] = Int32(arcs.lowerBound - firstArc)
        for (j, arc) in arcs.enumerated() {
            let rank = tables.arcRank[arc] % shape.group_size
            image[Int(layout.arc_rank) + arc - firstArc] = rank
            image[Int(layout.arc_slot) + arc - firstArc] = tables.placeSlot[place + j] | (j > 0 ? Int32.min : 0)
            if layout.mask_words > 0 {
                image[Int(layout.mask) + local * Int(layout.mask_words) + Int(rank / 32)] |= Int32(bitPattern: 1 << UInt32(rank % 32))
            }
        }
    }

    /// The arcs on each rank.
    private func writeRanks(_ group: Int, _ firstBundle: Int, _ firstArc: Int, _ image: UnsafeMutablePointer<Int32>) {
        let firstRank = group * Int(shape.group_size)
        let firstEntry = tables.rankStart[firstRank]
        for rank in 0...Int(shape.group_size) { image[Int(layout.rank_start) + rank] = tables.rankStart[firstRank + rank] - firstEntry }
        for entry in Int(firstEntry)..<Int(tables.rankStart[firstRank + Int(shape.group_size)]) {
            let arc = Int(tables.rankArc[entry]), bundle = Int(tables.arcBundle[Int(tables.rankArc[entry])])
            let start = Int(tables.bundleStart[bundle]), degree = Int(tables.bundleStart[bundle + 1]) - start
            let flip = degree == 2 && tables.arcRank[start] > tables.arcRank[start + 1]
            image[Int(layout.rank_arc) + entry - Int(firstEntry)] =
                Int32(arc - firstArc) | Int32(bundle - firstBundle) << 13 | (flip ? Int32.min : 0)
        }
    }

    /// For each colour and rank, where the bundle's other place is.
    private func writeLanes(_ group: Int, _ colours: Range<Int>, _ t: UnsafeMutablePointer<Int32>) {
        let nLocal = shape.n_physical / shape.ep_size
        let column = t + Int(layout.lanes) + group * Int(shape.pair_slots) * 32
        for lane in 0..<32 * Int(shape.pair_slots) { column[lane] = lplbk_no_lane(Int32(lane % 32)) }
        for (c, colour) in colours.enumerated() {
            for bundle in Int(tables.colourBegin[colour])..<Int(tables.colourEnd[colour]) {
                let arc = Int(tables.bundleStart[bundle])
                let u = tables.arcRank[arc] % shape.group_size, v = tables.arcRank[arc + 1] % shape.group_size
                let first = tables.bundleExpert[Int(tables.bundleExpertStart[bundle])]
                let d = tables.placeSlot[Int(tables.expertStart[Int(first)])] % nLocal
                column[32 * c + Int(u)] = lplbk_lane(v, u * shape.n_redundant + d, 0)
                column[32 * c + Int(v)] = lplbk_lane(u, u * shape.n_redundant + d, 1)
            }
        }
    }

    /// The same inside the image of a group that is all pairs, bundles in place of slot classes.
    private func writePairLanes(_ firstBundle: Int, _ colours: Range<Int>, _ image: UnsafeMutablePointer<Int32>) {
        let column = image + Int(layout.pair_lanes)
        image[LPLBK_IMAGE_PAIRS] = 1
        for lane in 0..<32 * LPLBK_MAX_COLOURS { column[lane] = lplbk_no_lane(Int32(lane % 32)) }
        for (c, colour) in colours.enumerated() {
            for bundle in Int(tables.colourBegin[colour])..<Int(tables.colourEnd[colour]) {
                let arc = Int(tables.bundleStart[bundle])
                let u = tables.arcRank[arc] % shape.group_size, v = tables.arcRank[arc + 1] % shape.group_size
                column[32 * c + Int(u)] = lplbk_lane(v, Int32(bundle - firstBundle), 0)
                column[32 * c + Int(v)] = lplbk_lane(u, Int32(bundle - firstBundle), 1)
            }
        }
    }

    /// Copies beside their original: one place, but a slot of their own for redirect_by_ratio.
    private func listSelfCopies(_ t: UnsafeMutablePointer<Int32>, _ listed: inout Int32) {
        for expert in 0..<Int(shape.n_logical) where tables.expertClass[expert] >= 0 && tables.expertBundle[expert] < 0 {
            t[Int(layout.code) + expert] = -1 - listed
            t[Int(layout.bundle_expert + listed)] = Int32(expert)
            listed += 1
        }
    }
}
