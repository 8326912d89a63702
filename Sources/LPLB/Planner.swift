// The object behind an lplb_planner handle: one EP group's shape, its placement and the backend that plans.

import CLPLB
import LPLBPlacement
import LPLBSolver
import LPLBTopology
import Synchronization

final class Planner {
    let shape: ExpertShape
    let topology: RedundancyTopology?
    /// The rank this planner plans for; nil: the ids are those of all ranks together.
    let rank: Int?
    let backend: any PlannerBackend
    /// A CUDA ordinal, or LPLB_DEVICE_CPU.
    let device: Int
    /// LPLB_SOLVER_*
    let solver: Int
    let unit: Unit
    /// nil: the ranks are alike.
    var capacities: RankCapacities?
    /// The caller's, part of the digest.
    let number: Int64
    /// What is kept beside the plans.
    let recording: Recording
    /// Gathers everybody's counts inside `run`.
    var exchange: Exchange?
    /// How many planners were attached to `exchange` with this one; 0 without an exchange.
    var attached: Int64 = 0

    private(set) var placement: Placement?
    /// The latest solve or run left a plan, made under the placement that is in force.
    private(set) var hasPlan = false
    /// There was a plan under some placement.
    private(set) var everPlanned = false
    /// Capacities have been set, though perhaps equal ones: the kernels of ranks that differ plan.
    var mayDiffer = false

    private let entered = Atomic<Bool>(false)
    private let words: UnsafeMutablePointer<CChar>
    private static let wordsSize = 1024

    init(_ settings: PlannerSettings) throws(Failure) {
        shape = settings.shape
        topology = settings.topology
        rank = settings.rank
        device = settings.device
        solver = settings.solver
        unit = settings.unit
        number = settings.number
        recording = settings.recording
        backend = try settings.backend()
        words = .allocate(capacity: Planner.wordsSize)
        // All of it: whoever reads the words of a planner that another thread is inside finds an end.
        words.initialize(repeating: 0, count: Planner.wordsSize)
        if topology != nil {
            try place(history: nil, stream: nil)
        } else if shape.nPhysical == shape.nLogical {
            try setPlacement((0..<shape.nLogical).map { Int32($0) }, stream: nil)
        }
    }

    deinit {
        words.deallocate()
    }

    // MARK: Entering and failing

    /// Words about the last failure.
    var error: UnsafePointer<CChar> { UnsafePointer(words) }

    /// Runs one call of the C interface on this planner; a second thread is turned away instead of waiting.
    @inline(__always)
    func enter(_ body: () throws(Failure) -> Void) -> lplb_status {
        guard entered.compareExchange(expected: false, desired: true, ordering: .acquiring).exchanged else {
            return lplb_status(LPLB_ERROR_BUSY)
        }
        defer { entered.store(false, ordering: .releasing) }
        do {
            try body()
            return lplb_status(LPLB_OK)
        } catch {
            let error = exchange?.explaining(error) ?? error
            write(error.message, to: words, size: Planner.wordsSize)
            return error.status
        }
    }

    // MARK: Placing

    func place(history: UnsafeBufferPointer<Double>?, stream: UnsafeMutableRawPointer?) throws(Failure) {
        guard let topology else {
            throw Failure(LPLB_ERROR_WRONG_ORDER, "lplb_planner_place: needs a planner created with r2o; this one has none")
        }
        let placement = try translating { () throws(RuleViolation) -> Placement in
            let order = try history.map { (history) throws(RuleViolation) in try reorderByHistory(Array(history), shape: shape) }
                ?? (0..<shape.nLogical).map { Int32($0) }
            return try Placement(shape: shape, topology: topology, order: order)
        }
        try adopt(placement, stream: stream)
    }

    func setPlacement(_ phy2log: [Int32], stream: UnsafeMutableRawPointer?) throws(Failure) {
        guard topology == nil else {
            throw Failure(
                LPLB_ERROR_WRONG_ORDER,
                "lplb_planner_set_placement: needs a planner created without r2o; this one is placed by its topology (lplb_planner_place)")
        }
        try adopt(try translating { () throws(RuleViolation) in try Placement(shape: shape, phy2log: phy2log) }, stream: stream)
    }

    /// Hands the placement to the backend first, so that a refusal leaves the planner as it was.
    private func adopt(_ placement: Placement, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try backend.load(Network(placement), digest: digest(of: placement, attached: attached, capacities), stream: stream)
        self.placement = placement
        hasPlan = false
    }

    /// The placement in force, or a failure that says how to get one.
    func placed() throws(Failure) -> Placement {
        guard let placement else {
            throw Failure(LPLB_ERROR_WRONG_ORDER, "planner: has no placement yet; call lplb_planner_set_placement first")
        }
        return placement
    }

    // MARK: Planning

    @inline(__always)
    private func requirePlaced() throws(Failure) {
        if placement == nil { _ = try placed() }
    }

    func count(
        _ ids: IdBuffer, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>?, chunks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try backend.count(ids, counts: counts, cumulative: cumulative, chunks: chunks, stream: stream)
    }

    /// This rank's row, from ids or from counts.
    func countRow(_ ids: IdBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try requirePlaced()
        try backend.countRow(ids, row: row, stream: stream)
    }

    func makeRow(_ counts: CountBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try requirePlaced()
        try backend.makeRow(counts, row: row, stream: stream)
    }

    func solve(
        _ counts: CountBuffer, ratios: UnsafeMutablePointer<Float>?, scaled: UnsafeMutablePointer<Float>?, counter: CounterBuffer,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requirePlaced()
        guard counts.sources == 1 || counts.sources == shape.epSize else {
            throw Failure("n_sources", "must be 1 or ep_size (\(shape.epSize))", value: counts.sources)
        }
        if counts.areRows { try requireRank("rows") }
        if ratios != nil { try requireRatios() }
        try backend.solve(counts, ratios: ratios, scaled: scaled, counter: counter, stream: stream)
        hasPlan = true
        everPlanned = true
    }

    func redirect(_ ids: IdBuffer, to out: IdOutput, maxBlocks: Int, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try requirePlaced()
        if shape.hasReplicas { try requirePlan("lplb_planner_redirect") }
        try backend.redirect(ids, to: out, maxBlocks: maxBlocks, stream: stream)
    }

    func redirect(
        _ ids: IdBuffer, byRatios ratios: UnsafePointer<Float>, cumulative: UnsafePointer<Int32>, chunks: Int, to out: IdOutput,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requirePlaced()
        try requireTopology("ratios")
        try requireTokens("ratios")
        try backend.redirect(ids, byRatios: ratios, cumulative: cumulative, chunks: chunks, to: out, stream: stream)
    }

    func run(
        _ ids: IdBuffer, gathered: UnsafePointer<Int32>?, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requirePlaced()
        if gathered != nil { try requireRank("gathered") }
        if gathered == nil, shape.hasReplicas, let exchange {
            try run(ids, by: exchange, to: out, counter: counter, maxBlocks: maxBlocks, stream: stream)
        } else {
            let rows = gathered.map { CountBuffer(rows: $0, sources: shape.epSize, compared: true) }
            try backend.run(ids, gathered: rows, to: out, counter: counter, maxBlocks: maxBlocks, stream: stream)
        }
        if shape.hasReplicas {
            hasPlan = true
            everPlanned = true
        }
    }

    // MARK: Reading

    func requirePlan(_ call: String) throws(Failure) {
        guard hasPlan || (everPlanned && backend.replaysGraphs) else {
            if !shape.hasReplicas {
                throw Failure(
                    LPLB_ERROR_WRONG_ORDER,
                    "\(call): there is no plan, since no expert has a replica and lplb_planner_run had nothing to decide; "
                        + "lplb_planner_solve makes a plan all the same")
            }
            throw Failure(
                LPLB_ERROR_WRONG_ORDER,
                "\(call): there is no plan for this placement yet; call lplb_planner_solve or lplb_planner_run first")
        }
    }

    private func requireRank(_ argument: String) throws(Failure) {
        if rank == nil {
            throw Failure(argument, "needs a planner created with a rank, so that one row is known to be its own", value: "no rank")
        }
    }

    private func requireRatios() throws(Failure) {
        try requireTopology("ratios")
        try requireTokens("ratios")
        if capacities != nil {
            throw Failure("ratios", "needs a planner without capacities, see lplb_planner_set_capacity", value: "one whose ranks differ")
        }
    }

    private func requireTopology(_ argument: String) throws(Failure) {
        if topology == nil {
            throw Failure(argument, "needs a planner created with r2o, since slot classes exist in topologies only", value: "no r2o")
        }
    }
}
