// Small helpers that speak the C interface as a C program would.

import CLPLB
import Testing

/// A deterministic random source (SplitMix64), so that a failing instance can be found again.
struct SplitMix64: RandomNumberGenerator {
    var state: UInt64
    init(_ seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

let cube8x2: [Int32] = [3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3]
let ring8: [Int32] = [1, 2, 3, 4, 5, 6, 7, 0]

/// What create was asked for; `r2o` nil: a general placement.
struct Settings {
    var epSize: Int64 = 8
    var rank: Int64 = -1
    var nNodes: Int64 = 1
    var nLogical: Int64 = 64
    var nPhysical: Int64 = 80
    var groupSize: Int64 = 8
    var nRedundant: Int64 = 2
    var r2o: [Int32]? = cube8x2
    var device: Int32 = -1
    var solver: Int32 = 0
    var structSize = Int64(MemoryLayout<lplb_config>.size)
}

/// A planner that is destroyed with the test.
final class Handle {
    let raw: OpaquePointer
    let settings: Settings

    init(_ settings: Settings) throws {
        var handle: OpaquePointer?
        let (status, words) = create(settings, &handle)
        try #require(status == LPLB_OK, "\(words)")
        raw = try #require(handle)
        self.settings = settings
    }

    deinit { lplb_planner_destroy(raw) }

    var error: String { String(cString: lplb_planner_error(raw)) }

    func phy2log() -> [Int32] {
        var out = [Int32](repeating: -7, count: Int(settings.nPhysical))
        #expect(lplb_planner_phy2log(raw, &out, settings.nPhysical) == LPLB_OK)
        return out
    }

    func split() -> [Int64] {
        var out = [Int64](repeating: -7, count: Int(settings.nPhysical))
        #expect(lplb_planner_split(raw, &out, settings.nPhysical, nil) == LPLB_OK)
        return out
    }

    func assignment() -> [Int64] {
        var out = [Int64](repeating: -7, count: Int(settings.nPhysical))
        #expect(lplb_planner_assignment(raw, &out, settings.nPhysical, nil) == LPLB_OK)
        return out
    }

    func info() -> (plan: lplb_plan_info, groups: [lplb_group_info]) {
        var plan = lplb_plan_info()
        plan.struct_size = Int64(MemoryLayout<lplb_plan_info>.size)
        let count = settings.epSize / (settings.groupSize == 0 ? settings.epSize : settings.groupSize)
        var groups = [lplb_group_info](repeating: lplb_group_info(), count: Int(count))
        #expect(lplb_planner_info(raw, &plan, &groups, count, nil) == LPLB_OK)
        return (plan, groups)
    }
}

func create(_ settings: Settings, _ handle: inout OpaquePointer?) -> (Int, String) {
    var message = [CChar](repeating: 0, count: 512)
    let status = (settings.r2o ?? [0]).withUnsafeBufferPointer { r2o in
        var config = lplb_config()
        config.struct_size = settings.structSize
        config.device = settings.device
        config.solver = settings.solver
        config.ep_size = settings.epSize
        config.rank = settings.rank
        config.n_nodes = settings.nNodes
        config.n_logical = settings.nLogical
        config.n_physical = settings.nPhysical
        config.group_size = settings.groupSize
        config.n_redundant = settings.r2o == nil ? 0 : settings.nRedundant
        config.r2o = settings.r2o == nil ? nil : r2o.baseAddress
        return lplb_planner_create(&config, &handle, &message, 512)
    }
    return (Int(status), message.withUnsafeBufferPointer { String(cString: $0.baseAddress!) })
}

/// Skewed ids: a random hot expert set, some -1.
func skewedIds<Id: FixedWidthInteger>(_ count: Int, experts: Int, using generator: inout SplitMix64) -> [Id] {
    let hot = Int.random(in: 1...experts, using: &generator)
    return (0..<count).map { _ in
        switch Int.random(in: 0..<16, using: &generator) {
        case 0: -1
        case 1..<8: Id(Int.random(in: 0..<hot, using: &generator))
        default: Id(Int.random(in: 0..<experts, using: &generator))
        }
    }
}

func histogram<Id: FixedWidthInteger>(_ ids: [Id], _ size: Int) -> [Int64] {
    var counts = [Int64](repeating: 0, count: size)
    for id in ids where id >= 0 { counts[Int(id)] += 1 }
    return counts
}
