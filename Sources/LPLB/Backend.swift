// What a planner asks of the device it plans on. The CPU and CUDA backends answer alike, bit for bit.

import CLPLB
import CLPLBKernels
import LPLBSolver
import LPLBTopology

/// Width of an integer buffer handed in by the caller.
enum IdType {
    case int32, int64

    var stride: Int { self == .int32 ? 4 : 8 }
}

/// Expert ids of the caller: host memory on the CPU, device memory on CUDA. Checked: not NULL when `count` > 0, aligned.
struct IdBuffer {
    let base: UnsafeRawPointer?
    let type: IdType
    let count: Int
}

/// Where rewritten ids go: as many as were read, of the same type.
struct IdOutput {
    let base: UnsafeMutableRawPointer?
}

/// The caller's one-element counter of solved groups; `base` nil: none.
struct CounterBuffer {
    let base: UnsafeMutableRawPointer?
    let type: IdType
}

/// Counts handed to a solve: `[sources][nLogical]` of `type`, or rows `[sources][nLogical + 1]` of int32, whose last word is a digest.
struct CountBuffer {
    let base: UnsafeRawPointer
    let type: IdType
    let sources: Int
    let areRows: Bool
    /// The digests are compared with the planner's own: not where an exchange has done so.
    let compared: Bool

    init(base: UnsafeRawPointer, type: IdType, sources: Int) {
        (self.base, self.type, self.sources, areRows, compared) = (base, type, sources, false, false)
    }

    init(rows: UnsafePointer<Int32>, sources: Int, compared: Bool) {
        (base, type, self.sources, areRows, self.compared) = (UnsafeRawPointer(rows), .int32, sources, true, compared)
    }

    /// Words from one source's counts to the next one's.
    func width(_ nLogical: Int) -> Int { areRows ? nLogical + 1 : nLogical }
}

/// Totals of the latest plan beside the per-group results.
struct PlanTotals {
    var invalidIds: Int64 = 0
    /// Tokens of the planner's rank by where they go; zero for a planner of the whole batch.
    var onOwnRank: Int64 = 0
    var onOwnNode: Int64 = 0
    var onOtherNodes: Int64 = 0
    var overflow: Int64 = 0
}

/// One device's side of a planner. The boundary has checked every pointer and size; the backend checks values (counts, ids).
/// `stream` is a cudaStream_t and is ignored on the CPU. Calls of the hot path (count ... run) allocate nothing and wait for nothing.
protocol PlannerBackend: AnyObject {
    /// Captured graphs may plan again at any time without a call of the host, so what was planned before can be read even after a new
    /// placement (zeros until the first replay).
    var replaysGraphs: Bool { get }

    /// Takes over a new placement. What was planned before is void.
    func load(_ network: Network, digest: Int32, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// Another digest for the placement that is loaded. Waits for the device.
    func setDigest(_ digest: Int32) throws(Failure)

    /// What the ranks may hold from the next plan on, nil: they are alike; and the digest that goes with it, nil before the first placement.
    /// Stays through new placements. Waits for the stream.
    func set(_ capacities: RankCapacities?, digest: Int32?, stream: UnsafeMutableRawPointer?) throws(Failure)

    func count(
        _ ids: IdBuffer, counts: UnsafeMutablePointer<Int32>, cumulative: UnsafeMutablePointer<Int32>?, chunks: Int,
        stream: UnsafeMutableRawPointer?) throws(Failure)

    /// row [nLogical + 1]: the counts of the ids, or counts of one source, and the digest.
    func countRow(_ ids: IdBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure)
    func makeRow(_ counts: CountBuffer, row: UnsafeMutablePointer<Int32>, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// `ratios` and `scaled` as in lplb_planner_solve.
    func solve(
        _ counts: CountBuffer, ratios: UnsafeMutablePointer<Float>?, scaled: UnsafeMutablePointer<Float>?, counter: CounterBuffer,
        stream: UnsafeMutableRawPointer?) throws(Failure)

    func redirect(_ ids: IdBuffer, to out: IdOutput, maxBlocks: Int, stream: UnsafeMutableRawPointer?) throws(Failure)

    func redirect(
        _ ids: IdBuffer, byRatios ratios: UnsafePointer<Float>, cumulative: UnsafePointer<Int32>, chunks: Int, to out: IdOutput,
        stream: UnsafeMutableRawPointer?) throws(Failure)

    /// count, solve and redirect. `gathered` nil: the ids are the only source; else rows.
    func run(
        _ ids: IdBuffer, gathered: CountBuffer?, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?) throws(Failure)

    /// `run` for the counts of all ranks, which the exchange behind `view` brings, in one launch. False: this takes several, and nothing
    /// was queued.
    func run(
        _ ids: IdBuffer, exchanging view: UnsafePointer<lplbk_exchange_view>, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?) throws(Failure) -> Bool

    /// The parts of a layout; where it is planned, there is a plan.
    func layout(_ request: LayoutRequest, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// The latest plan; wait for the stream where there is one. `groups` has room for every group.
    func readInfo(groups: UnsafeMutablePointer<lplb_group_info>?, stream: UnsafeMutableRawPointer?) throws(Failure) -> PlanTotals

    /// Tokens per logical expert of all plans, `[nLogical]`, and then the number of plans. The planner keeps a history.
    func readHistory(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// Where the metrics can be read at any time, by any thread; nil: none are kept. Never changes.
    var metrics: UnsafePointer<lplbk_metrics_page>? { get }

    /// Starts anew what of `recording` the planner keeps. Allocates nothing and waits for nothing.
    func reset(_ recording: Recording, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// `levels` has room for every group.
    func readLevels(_ levels: UnsafeMutablePointer<lplb_level>, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// Tokens per physical expert over all sources, `[nPhysical]`.
    func readSplit(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure)

    /// Tokens per physical expert of this planner's rank, `[nPhysical]`.
    func readAssignment(_ tokens: UnsafeMutablePointer<Int64>, stream: UnsafeMutableRawPointer?) throws(Failure)
}

extension PlannerBackend {
    func run(
        _ ids: IdBuffer, exchanging view: UnsafePointer<lplbk_exchange_view>, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int,
        stream: UnsafeMutableRawPointer?
    ) throws(Failure) -> Bool { false }
}
