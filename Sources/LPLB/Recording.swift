// What a planner keeps beside its plans: on the CPU here, on a GPU in cuda/metrics.cuh.

import CLPLB
import CLPLBKernels
import LPLBSolver

/// LPLB_RECORD_*
struct Recording: OptionSet {
    let rawValue: Int32

    static let history = Recording(rawValue: Int32(LPLB_RECORD_HISTORY))
    static let metrics = Recording(rawValue: Int32(LPLB_RECORD_METRICS))

    init(rawValue: Int32) { self.rawValue = rawValue }

    init(_ value: Int64, _ argument: String) throws(Failure) {
        rawValue = Int32(try Check.range(value, argument, 0...Int64(LPLB_RECORD_HISTORY | LPLB_RECORD_METRICS)))
    }
}

/// The records of a CPU planner.
final class CpuRecords {
    private let nLogical: Int
    /// [nLogical] and the number of plans; nil: none is kept.
    private let history: UnsafeMutablePointer<Int64>?
    /// What readers see; nil: no metrics are kept.
    let page: UnsafeMutablePointer<lplbk_metrics_page>?
    /// [LPLBK_METRICS] as in cuda/metrics_view.h.
    private let totals: UnsafeMutablePointer<UInt64>

    init(_ recording: Recording, nLogical: Int) {
        self.nLogical = nLogical
        history = recording.contains(.history) ? .allocate(capacity: nLogical + 1) : nil
        history?.initialize(repeating: 0, count: nLogical + 1)
        page = recording.contains(.metrics) ? .allocate(capacity: 1) : nil
        page?.initialize(to: lplbk_metrics_page())
        totals = .allocate(capacity: Int(LPLBK_METRICS))
        totals.initialize(repeating: 0, count: Int(LPLBK_METRICS))
    }

    deinit {
        history?.deallocate()
        page?.deallocate()
        totals.deallocate()
    }

    /// Adds a plan.
    func add(_ solver: FlowSolver, _ assigner: TokenAssigner, groupSize: Int) {
        if let history {
            for expert in 0..<nLogical { history[expert] &+= assigner.loads[expert] }
            history[nLogical] &+= 1
        }
        guard let page else { return }
        for group in 0..<solver.network.shape.nGroups { add(solver.results[group], groupSize: UInt64(groupSize)) }
        add(LPLBK_METRIC_PLANS, 1)
        add(LPLBK_METRIC_OWN_RANK, UInt64(assigner.onOwnRank))
        add(LPLBK_METRIC_OWN_NODE, UInt64(assigner.onOwnNode))
        add(LPLBK_METRIC_OTHER_NODES, UInt64(assigner.onOtherNodes))
        add(LPLBK_METRIC_SEQUENCE, 1)
        lplbk_metrics_write(page, totals)
    }

    private func add(_ group: GroupResult, groupSize: UInt64) {
        if group.certified { add(LPLBK_METRIC_CERTIFIED, 1) }
        add(LPLBK_METRIC_TOKENS, UInt64(group.total))
        add(LPLBK_METRIC_MOVED, UInt64(group.moved))
        guard group.total > 0 else { return }
        add(LPLBK_METRIC_GROUPS, 1)
        add(LPLBK_METRIC_IMBALANCE, ratio: overMean(group.maxLoad, groupSize, group.total))
        add(LPLBK_METRIC_BOUND, ratio: overMean(group.bound, groupSize, group.total))
    }

    private func add(_ value: Int, ratio: UInt64) {
        add(value, ratio)
        totals[LPLBK_METRIC_HIGHEST + value] = max(totals[LPLBK_METRIC_HIGHEST + value], ratio)
    }

    private func add(_ value: Int, _ more: UInt64) { totals[value] &+= more }

    /// load / (total / ranks), rounded down; the ratio is at most `ranks`, so it fits.
    private func overMean(_ load: Int64, _ ranks: UInt64, _ total: Int64) -> UInt64 {
        let scaled = (UInt64(load) * ranks).multipliedFullWidth(by: 1 << UInt64(LPLBK_METRIC_BITS))
        return UInt64(total).dividingFullWidth(scaled).quotient
    }

    func add(invalid: Int64) {
        if let page { lplbk_metrics_set_invalid(page, lplbk_metrics_invalid(page) &+ UInt64(invalid)) }
    }

    /// [nLogical + 1]
    func readHistory(_ tokens: UnsafeMutablePointer<Int64>) {
        if let history { tokens.update(from: history, count: nLogical + 1) }
    }

    func reset(_ recording: Recording) {
        if recording.contains(.history) { history?.update(repeating: 0, count: nLogical + 1) }
        guard recording.contains(.metrics), let page else { return }
        let number = totals[LPLBK_METRIC_SEQUENCE] &+ 1
        totals.update(repeating: 0, count: Int(LPLBK_METRICS))
        totals[LPLBK_METRIC_SEQUENCE] = number
        lplbk_metrics_write(page, totals)
        lplbk_metrics_set_invalid(page, 0)
    }
}

extension lplb_metrics {
    /// What stands on the page of a planner with so many groups; nil: zeros.
    init(reading page: UnsafePointer<lplbk_metrics_page>?, nGroups: Int) {
        self.init()
        guard let page else { return }
        withUnsafeTemporaryAllocation(of: UInt64.self, capacity: Int(LPLBK_METRICS)) { values in
            lplbk_metrics_read(page, values.baseAddress!)
            let value = { (index: Int) in Int64(bitPattern: values[index]) }
            plans = value(LPLBK_METRIC_PLANS)
            groups = value(LPLBK_METRIC_GROUPS)
            imbalance_sum = value(LPLBK_METRIC_IMBALANCE)
            imbalance_max = value(LPLBK_METRIC_HIGHEST + LPLBK_METRIC_IMBALANCE)
            // The gap is the ratio of the bound less 1.
            let one: Int64 = 1 << Int64(LPLBK_METRIC_BITS)
            gap_sum = value(LPLBK_METRIC_BOUND) &- groups &* one
            gap_max = max(value(LPLBK_METRIC_HIGHEST + LPLBK_METRIC_BOUND) - one, 0)
            tokens = value(LPLBK_METRIC_TOKENS)
            moved = value(LPLBK_METRIC_MOVED)
            own_rank = value(LPLBK_METRIC_OWN_RANK)
            own_node = value(LPLBK_METRIC_OWN_NODE)
            other_nodes = value(LPLBK_METRIC_OTHER_NODES)
            overflow = value(LPLBK_METRIC_OVERFLOW)
            uncertified = plans &* Int64(nGroups) &- overflow &- value(LPLBK_METRIC_CERTIFIED)
        }
        invalid_ids = Int64(bitPattern: lplbk_metrics_invalid(page))
    }
}
