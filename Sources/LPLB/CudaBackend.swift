// Planning on a GPU: holds the device memory of a planner and launches its kernels.

import CLPLB
import CLPLBKernels
import LPLBSolver
import LPLBTopology

func makeCudaBackend(_ settings: PlannerSettings) throws(Failure) -> any PlannerBackend { try CudaBackend(settings) }

final class CudaBackend: PlannerBackend {
    let replaysGraphs = true
    private let shape: ExpertShape
    private let device: Int32
    private let cuda: lplbk_backend
    /// What the kernels get; its address stays. Device memory comes with the first placement.
    private let state: UnsafeMutablePointer<lplbk_planner>
    /// What kernels found wrong, shared with the device; nil where no rows are ever compared.
    private var report: UnsafeMutablePointer<lplbk_report>?
    /// The metrics, shared with the device; nil where none are kept.
    private let page: UnsafeMutableRawPointer?
    private let unit: Unit
    private var capacities: RankCapacities?
    /// Of the placement.
    private var network: Network?

    init(_ settings: PlannerSettings) throws(Failure) {
        let shape = settings.shape, device = Int32(settings.device)
        let limits = [
            ("group_size", shape.groupSize, Int(LPLB_MAX_RANKS_CUDA)), ("n_logical", shape.nLogical, Int(LPLB_MAX_LOGICAL_CUDA)),
            ("n_physical", shape.nPhysical, Int(LPLB_MAX_PHYSICAL_CUDA)),
        ]
        for (name, value, most) in limits where value > most {
            throw Failure(LPLB_ERROR_UNSUPPORTED, "\(name): must be at most \(most) on CUDA, got \(value)")
        }
        let interiorRanks = Int(LPLBK_MAX_INTERIOR_GROUP)
        if settings.solver == Int(LPLB_SOLVER_IPM) && shape.groupSize > interiorRanks {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED, "group_size: must be at most \(interiorRanks) for LPLB_SOLVER_IPM, got \(shape.groupSize)")
        }
        cuda = try cudaKernels("device \(device)")
        var info = lplbk_device_info()
        try check(cuda.device_info(device, &info), "device \(device)")

        var planner = lplbk_planner()
        planner.device = device
        planner.solver = Int32(settings.solver)
        planner.info = info
        planner.shape = CudaBackend.shape(shape, settings.topology, rank: settings.rank)
        planner.shape.unit = Int32(clamping: settings.unit.size)
        planner.shape.unit_inverse = Unit(Int64(planner.shape.unit)).inverse
        planner.has_replicas = shape.hasReplicas ? 1 : 0
        planner.traps = settings.policy == Int32(LPLB_EXCHANGE_TRAP) ? 1 : 0
        planner.keeps_history = settings.recording.contains(.history) ? 1 : 0
        var page: UnsafeMutableRawPointer?
        if settings.recording.contains(.metrics) {
            try check(
                cuda.alloc_mapped(device, Int64(MemoryLayout<lplbk_metrics_page>.size), &page, &planner.page),
                "allocating host memory for device \(device)")
        }
        self.page = page
        self.shape = shape
        self.device = device
        unit = settings.unit
        state = .allocate(capacity: 1)
        state.initialize(to: planner)
    }

    deinit {
        cuda.close(state)
        _ = cuda.free_mapped(device, report)
        _ = cuda.free_mapped(device, page)
        state.deallocate()
    }

    /// All but the colours, which come with the first placement.
    private static func shape(_ shape: ExpertShape, _ topology: RedundancyTopology?, rank: Int?) -> lplbk_shape {
        let redundant = shape.nPhysical - shape.nLogical
        var of = lplbk_shape()
        of.ep_size = Int32(shape.epSize)
        of.group_size = Int32(shape.groupSize)
        of.n_groups = Int32(shape.nGroups)
        of.n_nodes = Int32(shape.nNodes)
        of.n_logical = Int32(shape.nLogical)
        of.n_physical = Int32(shape.nPhysical)
        of.rank = rank.map { Int32($0) } ?? -1
        of.bundle_experts = 1
        if let topology, topology.nRedundant > 0 {
            of.n_redundant = Int32(topology.nRedundant)
            of.bundle_experts = Int32(redundant / shape.epSize / topology.nRedundant)
            of.max_bundles = Int32(shape.groupSize * topology.nRedundant)
            of.max_arcs = 2 * of.max_bundles
        } else {
            // A bundle of k places takes k slots of its group, k - 1 of them redundant.
            let slotsOfGroup = shape.nLocal * shape.groupSize
            of.max_bundles = Int32(min(shape.nLogical, redundant, slotsOfGroup / 2))
            of.max_arcs = Int32(min(slotsOfGroup, 2 * redundant))
        }
        return of
    }

    // MARK: Placing

    /// All or nothing: a failure leaves the placement and the plan that were there, or a planner that has none.
    func load(_ network: Network, digest: Int32, stream: UnsafeMutableRawPointer?) throws(Failure) {
        if report == nil { try openReport() }
        let first = state.pointee.plan == nil
        if first { try open(network) }
        let words = DeviceImage.words(network, shape: state.pointee.shape, layout: state.pointee.layout, digest: digest, capacities: capacities)
        let error = words.withUnsafeBufferPointer { cuda.place(state, $0.baseAddress, stream) }
        if error != 0 {
            if first { cuda.close(state) }
            throw cudaFailure(error, "placing on device \(device)")
        }
        report?.pointee.code = Int32(LPLBK_EXCHANGE_FINE)
        self.network = network
    }

    func set(_ capacities: RankCapacities?, digest: Int32?, stream: UnsafeMutableRawPointer?) throws(Failure) {
        if let digest {
            let alike = [Int32](repeating: RankCapacities.normalSpeed, count: shape.epSize) + [Int32](repeating: 0, count: shape.epSize)
            let error = (capacities.map { $0.speed + $0.fixed } ?? alike).withUnsafeBufferPointer {
                cuda.set_capacity(state, capacities == nil ? 0 : 1, $0.baseAddress, digest, stream)
            }
            try check(error, "setting capacities on device \(device)")
        }
        self.capacities = capacities
        state.pointee.ranked = 1  // for good: a graph that is captured from now on follows what is set later
    }

    /// The layout and the memory, with the first placement: they stay.
    private func open(_ network: Network) throws(Failure) {
        state.pointee.shape.colours = CudaBackend.colours(network, solver: state.pointee.solver)
        let error = cuda.open(state)
        if error == Int32(LPLBK_UNSUPPORTED) {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED,
                "n_physical: the tables of n_logical, n_physical and group_size must fit the \(state.pointee.info.shared_bytes) bytes of "
                    + "shared memory that a block has on device \(device), got \(shape.nLogical), \(shape.nPhysical) and \(shape.groupSize)")
        }
        try check(error, "opening a planner on device \(device)")
    }

    func setDigest(_ digest: Int32) throws(Failure) { try check(cuda.set_digest(state, digest), "placing on device \(device)") }

    /// Planners of one rank may be given rows, whose digests the kernels compare.
    private func openReport() throws(Failure) {
        guard state.pointee.shape.rank >= 0 else { return }
        var page: UnsafeMutableRawPointer?
        try check(
            cuda.alloc_mapped(device, Int64(MemoryLayout<lplbk_report>.size), &page, &state.pointee.report),
            "allocating host memory for device \(device)")
        report = page?.assumingMemoryBound(to: lplbk_report.self)
    }

    /// Throws what a kernel has found, until there is a new placement.
    @inline(__always)
    private func requireAgreement() throws(Failure) {
        guard let report, lplbk_report_code(report) != Int32(LPLBK_EXCHANGE_FINE) else { return }
        throw disagreement(reported: "rows", by: Int(report.pointee.rank), of: Int(report.pointee.peer))
    }

    /// Groups of at most 32 ranks that sweep are solved with a lane for each rank and a register for each colour: 2, 4 or 8. 0: not so. The
    /// colours of a topology are the same for every placement. (The interior point method reads more of the tables.)
    private static func colours(_ network: Network, solver: Int32) -> Int32 {
        guard network.nRedundant > 0, network.shape.groupSize <= 32, solver == Int32(LPLB_SOLVER_FLOW) else { return 0 }
        var most = 0
        for group in 0..<network.shape.nGroups {
            let colours = network.colours(of: group).count
            if colours == 0 && !network.bundles(of: group).isEmpty { return 0 }
            most = max(most, colours)
        }
        return most <= 2 ? 2 : most <= 4 ? 4 : 8
    }

    // MARK: Planning

    func count(
        _ ids: IdBuffer, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>?, chunks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        if state.pointee.plan == nil { throw Failure(LPLB_ERROR_WRONG_ORDER, "lplb_planner_count: a CUDA planner needs a placement first") }
        try check(cuda.count(state, ids.base, ids.type.is64, Int64(ids.count), counts, cumulative, Int64(chunks), stream), "count")
    }

    func countRow(_ ids: IdBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try check(cuda.count_row(state, ids.base, ids.type.is64, Int64(ids.count), row, stream), "count_row")
    }

    func makeRow(_ counts: CountBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try check(cuda.make_row(state, counts.base, counts.type.is64, row, stream), "make_row")
    }

    func solve(
        _ counts: CountBuffer, ratios: UnsafeMutablePointer<Float>?, scaled: UnsafeMutablePointer<Float>?, counter: CounterBuffer,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requireAgreement()
        guard !counts.areRows else {
            let rows = counts.base.assumingMemoryBound(to: Int32.self)
            let compare: Int32 = counts.compared ? 1 : 0
            return try check(
                cuda.solve_rows(state, rows, compare, ratios, scaled, counter.base, counter.type.is64, stream), "solve_rows")
        }
        try check(
            cuda.solve(
                state, counts.base, counts.type.is64, Int64(counts.sources), ratios, scaled, counter.base, counter.type.is64, stream),
            "solve")
    }

    func redirect(_ ids: IdBuffer, to out: IdOutput, maxBlocks: Int, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try requireAgreement()
        try check(cuda.redirect(state, ids.base, ids.type.is64, Int64(ids.count), out.base, Int64(maxBlocks), stream), "redirect")
    }

    func redirect(
        _ ids: IdBuffer, byRatios ratios: UnsafePointer<Float>, cumulative: UnsafePointer<Int32>, chunks: Int, to out: IdOutput,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try check(
            cuda.redirect_by_ratio(
                state, ids.base, ids.type.is64, Int64(ids.count), ratios, cumulative, Int64(chunks), out.base, stream),
            "redirect_by_ratio")
    }

    func run(
        _ ids: IdBuffer, gathered: CountBuffer?, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requireAgreement()
        let rows = gathered?.base.assumingMemoryBound(to: Int32.self)
        try check(
            cuda.run(
                state, ids.base, ids.type.is64, Int64(ids.count), rows, gathered?.compared == true ? 1 : 0, out.base, counter.base,
                counter.type.is64, Int64(maxBlocks), stream),
            "run")
    }

    func run(
        _ ids: IdBuffer, exchanging view: UnsafePointer<lplbk_exchange_view>, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) -> Bool {
        try requireAgreement()
        let error = cuda.run_exchanging(
            state, view, ids.base, ids.type.is64, Int64(ids.count), out.base, counter.base, counter.type.is64, Int64(maxBlocks), stream)
        if error == Int32(LPLBK_UNSUPPORTED) { return false }
        try check(error, "run")
        return true
    }

    func layout(_ request: LayoutRequest, stream: UnsafeMutableRawPointer?) throws(Failure) {
        if request.planned { try requireAgreement() }
        var dispatch = lplbk_dispatch()
        (dispatch.ids, dispatch.experts, dispatch.row_of_slot) = (request.ids.base, request.experts, request.rowOfSlot)
        (dispatch.n_ids, dispatch.n_rows) = (Int64(request.ids.count), Int32(request.nRows))
        (dispatch.ids64, dispatch.row64) = (request.ids.type.is64, request.rowType.is64)
        (dispatch.sends, dispatch.receives) = (request.sends ? 1 : 0, request.receives ? 1 : 0)
        (dispatch.gathers, dispatch.planned) = (request.gathers ? 1 : 0, request.planned ? 1 : 0)
        (dispatch.order, dispatch.sent, dispatch.received) = (request.order, request.sent, request.received)
        (dispatch.ends, dispatch.numbers) = (request.ends, request.numbers)
        (dispatch.by_row, dispatch.n_by_row) = (request.byRow, Int64(request.nByRow))
        try check(cuda.lay_out(state, &dispatch, stream), "layout")
    }

    // MARK: Reading

    /// The plan as the stream leaves it, see cuda/tables.h.
    private func plan(_ stream: UnsafeMutableRawPointer?) throws(Failure) -> [Int32] {
        var words = [Int32](repeating: 0, count: Int(lplbk_plan_words(&state.pointee.shape)))
        let error = words.withUnsafeMutableBufferPointer { cuda.read(state, $0.baseAddress, stream) }
        try check(error, "reading the plan from device \(device)")
        return words
    }

    func readInfo(groups: UnsafeMutablePointer<lplb_group_info>?, stream: UnsafeMutableRawPointer?) throws(Failure) -> PlanTotals {
        let words = try plan(stream)
        let counters = words.withUnsafeBytes { Array($0.bindMemory(to: Int64.self).prefix(LPLBK_COUNTERS)) }
        let quotas = words[Int(lplbk_plan_quota(&state.pointee.shape))...]
        var totals = PlanTotals(invalidIds: counters[LPLBK_COUNTER_INVALID], overflow: counters[LPLBK_COUNTER_OVERFLOW])
        for group in 0..<shape.nGroups {
            let info = Array(words[(Int(lplbk_plan_info()) + group * LPLBK_INFO_WORDS)...].prefix(LPLBK_INFO_WORDS))
            if state.pointee.shape.rank >= 0 {
                totals.onOwnRank += Int64(info[LPLBK_INFO_OWN_RANK])
                totals.onOwnNode += Int64(info[LPLBK_INFO_OWN_NODE])
                totals.onOtherNodes += Int64(info[LPLBK_INFO_OTHER_NODES])
            }
            guard let groups else { continue }
            groups[group] = lplb_group_info(device: info)
            // A group that was not solved has no total.
            if let network, info[LPLBK_INFO_TOTAL] != 0, unit != .token || info[LPLBK_INFO_RANKED] != 0 {
                let tokens = network.tokens(ofGroup: group) { Int64(quotas[quotas.startIndex + Int(network.placeSlot[$0])]) }
                groups[group].tell(tokens, ranks: shape.groupSize)
            }
        }
        return totals
    }

    var metrics: UnsafePointer<lplbk_metrics_page>? { page.map { UnsafePointer($0.assumingMemoryBound(to: lplbk_metrics_page.self)) } }

    /// Before the first placement there is no memory on the device, and nothing was planned.
    func readHistory(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        guard state.pointee.plan != nil else { return tokens.update(repeating: 0, count: shape.nLogical + 1) }
        try check(cuda.read_history(state, tokens, stream), "reading the history from device \(device)")
    }

    func reset(_ recording: Recording, stream: UnsafeMutableRawPointer?) throws(Failure) {
        guard state.pointee.plan != nil else { return }
        let history: Int32 = recording.contains(.history) ? 1 : 0, metrics: Int32 = recording.contains(.metrics) ? 1 : 0
        try check(cuda.reset(state, history, metrics, stream), "reset")
    }

    func readLevels(_ levels: UnsafeMutablePointer<lplb_level>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let words = try plan(stream)
        for group in 0..<shape.nGroups {
            let info = Array(words[(Int(lplbk_plan_info()) + group * LPLBK_INFO_WORDS)...].prefix(LPLBK_INFO_WORDS))
            levels[group] = lplb_level(device: info, ranks: shape.groupSize)
        }
    }

    func readSplit(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let words = try plan(stream)[Int(lplbk_plan_quota(&state.pointee.shape))...]
        for (slot, word) in zip(0..<shape.nPhysical, words) { tokens[slot] = Int64(word) }
    }

    func readAssignment(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let words = try plan(stream)[Int(lplbk_plan_take(&state.pointee.shape))...]
        for (slot, word) in zip(0..<shape.nPhysical, words) { tokens[slot] = Int64(word) }
    }
}

extension IdType {
    fileprivate var is64: Int32 { self == .int64 ? 1 : 0 }
}

extension lplb_level {
    /// What the ranks of a group reached, from the words of the device. Where they differ, a plan that is certified has reached its bound,
    /// and there is no other, see FlowSolver.swift.
    fileprivate init(device words: [Int32], ranks: Int) {
        self.init()
        func level(_ low: Int) -> Int64 { Int64(words[low + 1]) << 32 | Int64(UInt32(bitPattern: words[low])) }
        if words[LPLBK_INFO_RANKED] != 0 {
            (reached, bound, mean) = (level(LPLBK_INFO_LEVEL), level(LPLBK_INFO_LEVEL), level(LPLBK_INFO_MEAN))
        } else {
            reached = 1024 * Int64(words[LPLBK_INFO_MAX_LOAD])
            bound = 1024 * Int64(words[LPLBK_INFO_BOUND])
            mean = 1024 * ((Int64(words[LPLBK_INFO_TOTAL]) + Int64(ranks) - 1) / Int64(ranks))
        }
    }
}

extension lplb_group_info {
    /// One group's result from the words of the device.
    fileprivate init(device words: [Int32]) {
        self.init()
        max_load = Int64(words[LPLBK_INFO_MAX_LOAD])
        bound = Int64(words[LPLBK_INFO_BOUND])
        total = Int64(words[LPLBK_INFO_TOTAL])
        moved = Int64(words[LPLBK_INFO_MOVED])
        rounds = Int64(words[LPLBK_INFO_ROUNDS])
        certified = words[LPLBK_INFO_CERTIFIED]
        witness_size = words[LPLBK_INFO_WITNESS_SIZE]
        withUnsafeMutableBytes(of: &witness) { bytes in
            words[LPLBK_INFO_WITNESS...].withUnsafeBytes { bytes.copyMemory(from: $0) }
        }
    }
}
