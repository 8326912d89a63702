// Planning on the host: the twin of the CUDA backend, and its oracle.

import CLPLB
import CLPLBKernels
import LPLBSolver
import LPLBTopology

final class CpuBackend: PlannerBackend {
    let replaysGraphs = false
    let shape: ExpertShape
    private let rank: Int?
    private let unit: Unit
    private var capacities: RankCapacities?
    private let mapper: TokenMapper
    /// [nLogical] what `run` counts.
    private let counts: UnsafeMutablePointer<Int32>
    private var solver: FlowSolver?
    private var assigner: TokenAssigner?
    private(set) var dispatch: DispatchLayout?
    private let records: CpuRecords
    private var invalidIds: Int64 = 0
    private var digest: Int32 = 0

    init(shape: ExpertShape, rank: Int?, unit: Unit, recording: Recording) {
        self.shape = shape
        self.rank = rank
        self.unit = unit
        mapper = TokenMapper(nLogical: shape.nLogical)
        records = CpuRecords(recording, nLogical: shape.nLogical)
        counts = .allocate(capacity: shape.nLogical)
        counts.initialize(repeating: 0, count: shape.nLogical)
    }

    deinit {
        counts.deallocate()
    }

    func load(_ network: Network, digest: Int32, stream: UnsafeMutableRawPointer?) throws(Failure) {
        solver = FlowSolver(network, unit: unit, capacities: capacities)
        assigner = TokenAssigner(network, source: rank)
        dispatch = DispatchLayout(network)
        self.digest = digest
    }

    func setDigest(_ digest: Int32) { self.digest = digest }

    func set(_ capacities: RankCapacities?, digest: Int32?, stream: UnsafeMutableRawPointer?) {
        self.capacities = capacities
        self.digest = digest ?? self.digest
        solver?.set(capacities)
    }

    /// The planner lets nobody plan without a placement.
    func loaded() throws(Failure) -> (FlowSolver, TokenAssigner) {
        guard let solver, let assigner else { throw Failure(LPLB_ERROR_INTERNAL, "the CPU backend was asked to plan without a placement") }
        return (solver, assigner)
    }

    // MARK: Planning

    func count(
        _ ids: IdBuffer, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>?, chunks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        // An invalid id is counted where it is rewritten.
        switch ids.type {
        case .int32: _ = mapper.count(ids.as32, ids.count, counts: counts, cumulative: cumulative, chunks: chunks)
        case .int64: _ = mapper.count(ids.as64, ids.count, counts: counts, cumulative: cumulative, chunks: chunks)
        }
    }

    func countRow(_ ids: IdBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try count(ids, counts: row, cumulative: nil, chunks: 1, stream: stream)
        row[shape.nLogical] = digest
    }

    func makeRow(_ counts: CountBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) {
        switch counts.type {
        case .int32: row.update(from: counts.base.assumingMemoryBound(to: Int32.self), count: shape.nLogical)
        case .int64:
            let values = counts.base.assumingMemoryBound(to: Int64.self)
            for expert in 0..<shape.nLogical { row[expert] = Int32(exactly: values[expert]) ?? .min }
        }
        row[shape.nLogical] = digest
    }

    func solve(
        _ counts: CountBuffer, ratios: UnsafeMutablePointer<Float>?, scaled: UnsafeMutablePointer<Float>?, counter: CounterBuffer,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        let (solver, assigner) = try loaded()
        try plan(counts, counts.areRows ? "rows" : "counts", solver, assigner)
        if let ratios { solver.writeRatios(ratios) }
        if let scaled { writeScaled(loads: assigner.loads, count: shape.nLogical, to: scaled) }
        add(shape.nGroups, to: counter)
    }

    func redirect(_ ids: IdBuffer, to out: IdOutput, maxBlocks: Int, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let (solver, assigner) = try loaded()
        count(invalid: rewrite(ids, to: out, solver.network, assigner))
    }

    func redirect(
        _ ids: IdBuffer, byRatios ratios: UnsafePointer<Float>, cumulative: UnsafePointer<Int32>, chunks: Int, to out: IdOutput,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        guard ids.count > 0 else { return }
        let (solver, _) = try loaded()
        let totals = cumulative + (chunks - 1) * shape.nLogical
        switch ids.type {
        case .int32:
            count(
                invalid: mapper.redirect(ids.as32, ids.count, to: out.as32, network: solver.network, ratios: ratios, totals: totals))
        case .int64:
            count(
                invalid: mapper.redirect(ids.as64, ids.count, to: out.as64, network: solver.network, ratios: ratios, totals: totals))
        }
    }

    private func count(invalid: Int64) {
        invalidIds &+= invalid
        if invalid > 0 { records.add(invalid: invalid) }
    }

    func run(
        _ ids: IdBuffer, gathered: CountBuffer?, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        let (solver, assigner) = try loaded()
        if shape.hasReplicas {
            if let gathered {
                try plan(gathered, "gathered", solver, assigner)
            } else {
                try count(ids, counts: counts, cumulative: nil, chunks: 1, stream: stream)
                try plan(CountBuffer(base: counts, type: .int32, sources: 1), "ids", solver, assigner)
            }
        }
        count(invalid: rewrite(ids, to: out, solver.network, assigner))
        add(shape.nGroups, to: counter)
    }

    /// Solves and assigns; refuses rows of ranks that disagree and impossible counts before anything is changed.
    private func plan(_ counts: CountBuffer, _ argument: String, _ solver: FlowSolver, _ assigner: TokenAssigner) throws(Failure) {
        let sources = counts.sources, width = counts.width(shape.nLogical)
        switch counts.type {
        case .int32:
            let values = counts.base.assumingMemoryBound(to: Int32.self)
            if counts.compared { try compareDigests(values + shape.nLogical, sources, width, argument) }
            guard assigner.sum(values, sources: sources, width: width) else { throw refusal(of: values, sources, width, argument) }
            if capacities != nil { try Check.total(assigner.loads, count: shape.nLogical, argument) }
            solver.solve(loads: assigner.loads)
            assigner.assign(values, sources: sources, quotas: solver.quotas)
        case .int64:
            let values = counts.base.assumingMemoryBound(to: Int64.self)
            guard assigner.sum(values, sources: sources, width: width) else { throw refusal(of: values, sources, width, argument) }
            if capacities != nil { try Check.total(assigner.loads, count: shape.nLogical, argument) }
            solver.solve(loads: assigner.loads)
            assigner.assign(values, sources: sources, quotas: solver.quotas)
        }
        records.add(solver, assigner, groupSize: shape.groupSize)
    }

    private func compareDigests(_ digests: UnsafePointer<Int32>, _ sources: Int, _ width: Int, _ argument: String) throws(Failure) {
        for source in 0..<sources where digests[source * width] != digest {
            throw disagreement(argument, ranks: sources) { digests[$0 * width] }
        }
    }

    /// Words for counts that cannot be: the first one that is negative or that takes its expert above the limit.
    private func refusal<Count: FixedWidthInteger>(
        of counts: UnsafePointer<Count>, _ sources: Int, _ width: Int, _ argument: String
    ) -> Failure {
        for expert in 0..<shape.nLogical {
            var sum: Int64 = 0
            for source in 0..<sources {
                let value = Int64(counts[source * width + expert])
                if value < 0 || value > TokenAssigner.maxLoad - sum {
                    let place = sources == 1 ? "\(argument)[\(expert)]" : "\(argument)[\(source)][\(expert)]"
                    let rule = value < 0 ? "must not be negative" : "must keep the expert's tokens at most \(TokenAssigner.maxLoad)"
                    return Failure(place, rule, value: value)
                }
                sum += value
            }
        }
        return Failure(LPLB_ERROR_INTERNAL, "\(argument): refused without a reason")
    }

    private func rewrite(_ ids: IdBuffer, to out: IdOutput, _ network: Network, _ assigner: TokenAssigner) -> Int64 {
        guard ids.count > 0 else { return 0 }
        switch ids.type {
        case .int32: return mapper.redirect(ids.as32, ids.count, to: out.as32, network: network, take: assigner.take)
        case .int64: return mapper.redirect(ids.as64, ids.count, to: out.as64, network: network, take: assigner.take)
        }
    }

    private func add(_ groups: Int, to counter: CounterBuffer) {
        guard let base = counter.base else { return }
        switch counter.type {
        case .int32: base.assumingMemoryBound(to: Int32.self).pointee &+= Int32(truncatingIfNeeded: groups)
        case .int64: base.assumingMemoryBound(to: Int64.self).pointee &+= Int64(groups)
        }
    }

    // MARK: Reading

    func readInfo(groups: UnsafeMutablePointer<lplb_group_info>?, stream: UnsafeMutableRawPointer?) throws(Failure) -> PlanTotals {
        let (solver, assigner) = try loaded()
        if let groups {
            for group in 0..<shape.nGroups { groups[group] = lplb_group_info(solver, group: group) }
        }
        return PlanTotals(
            invalidIds: invalidIds, onOwnRank: assigner.onOwnRank, onOwnNode: assigner.onOwnNode, onOtherNodes: assigner.onOtherNodes)
    }

    var metrics: UnsafePointer<lplbk_metrics_page>? { UnsafePointer(records.page) }

    func readHistory(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) { records.readHistory(tokens) }

    func reset(_ recording: Recording, stream: UnsafeMutableRawPointer?) { records.reset(recording) }

    func readLevels(_ levels: UnsafeMutablePointer<lplb_level>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let (solver, _) = try loaded()
        for group in 0..<shape.nGroups { levels[group] = lplb_level(solver.levels[group]) }
    }

    func readSplit(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let (solver, _) = try loaded()
        solver.network.scatter(solver.quotas, to: tokens)
    }

    func readAssignment(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let (solver, assigner) = try loaded()
        solver.network.scatter(assigner.take, to: tokens)
    }
}

extension IdBuffer {
    /// Read only when `count` > 0, when the boundary has made sure that there is a pointer.
    var as32: UnsafePointer<Int32> { typed(Int32.self) }
    var as64: UnsafePointer<Int64> { typed(Int64.self) }

    private func typed<Id>(_: Id.Type) -> UnsafePointer<Id> {
        // Any address will do where nothing is read.
        base?.assumingMemoryBound(to: Id.self) ?? UnsafePointer(bitPattern: 64)!
    }
}

extension IdOutput {
    fileprivate var as32: UnsafeMutablePointer<Int32> { base!.assumingMemoryBound(to: Int32.self) }
    fileprivate var as64: UnsafeMutablePointer<Int64> { base!.assumingMemoryBound(to: Int64.self) }
}

extension Network {
    /// Tokens per place -> tokens per slot; slots that are no place get none.
    func scatter(_ tokens: UnsafePointer<Int64>, to slots: UnsafeMutablePointer<Int64>) {
        slots.update(repeating: 0, count: shape.nPhysical)
        for place in 0..<nPlaces { slots[Int(placeSlot[place])] = tokens[place] }
    }
}

extension lplb_group_info {
    /// One group's result in the words of lplb.h.
    init(_ solver: FlowSolver, group: Int) {
        self.init()
        let result = solver.results[group]
        max_load = result.maxLoad
        bound = result.bound
        total = result.total
        moved = result.moved
        rounds = result.rounds
        certified = result.certified ? 1 : 0
        witness_size = Int32(result.witnessSize)
        withUnsafeMutableBytes(of: &witness) { bytes in
            bytes.copyMemory(from: UnsafeRawBufferPointer(start: solver.witness(ofGroup: group), count: bytes.count))
        }
        if !solver.levels[group].isTokens {
            tell(solver.network.tokens(ofGroup: group) { solver.quotas[$0] }, ranks: solver.network.shape.groupSize)
        }
    }
}
