// A checked lplb_config: what a planner is made from.

import CLPLB
import LPLBSolver
import LPLBTopology

struct PlannerSettings {
    let shape: ExpertShape
    let topology: RedundancyTopology?
    /// nil: the ids are those of all ranks together.
    let rank: Int?
    /// A CUDA ordinal, or LPLB_DEVICE_CPU.
    let device: Int
    let solver: Int
    let unit: Unit
    let number: Int64
    /// LPLB_EXCHANGE_TRAP or _REPORT.
    let policy: Int32
    let recording: Recording
    /// n_nodes as the caller gave it; 0: the default.
    let nodesGiven: Int64

    /// Reads the struct behind `config`, which may be another version's.
    init(reading config: UnsafePointer<lplb_config>) throws(Failure) { try self.init(StructSize.read(config, "config")) }

    private init(_ config: lplb_config) throws(Failure) {
        let shape = try translating { () throws(RuleViolation) in
            try ExpertShape(
                epSize: Int(config.ep_size), nNodes: Int(config.n_nodes), groupSize: Int(config.group_size),
                nLogical: Int(config.n_logical), nPhysical: Int(config.n_physical))
        }
        self.shape = shape
        nodesGiven = config.n_nodes
        topology = try PlannerSettings.topology(of: config, shape: shape)
        let rank = try Check.range(config.rank, "rank", Int64(LPLB_WHOLE_BATCH)...Int64(shape.epSize - 1))
        self.rank = rank == Int(LPLB_WHOLE_BATCH) ? nil : rank
        solver = try Check.range(Int64(config.solver), "solver", Int64(LPLB_SOLVER_FLOW)...Int64(LPLB_SOLVER_IPM))
        device = try Check.range(Int64(config.device), "device", Int64(LPLB_DEVICE_CPU)...Int64(Int32.max))
        number = config.number
        policy = Int32(try Check.range(Int64(config.policy), "policy", Int64(LPLB_EXCHANGE_TRAP)...Int64(LPLB_EXCHANGE_REPORT)))
        recording = try Recording(config.record, "record")
        if recording.contains(.history) && !shape.hasReplicas {
            throw Failure(
                "record", "must be without LPLB_RECORD_HISTORY (1) where n_physical is n_logical, since such a planner counts nothing",
                value: config.record)
        }
        unit = try Check.unit(config.unit)
        if recording.contains(.metrics) && unit != .token {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED, "unit: must be 0 or 1 with LPLB_RECORD_METRICS, which knows tokens only, got \(config.unit)")
        }
        if solver == Int(LPLB_SOLVER_IPM) && unit != .token {
            throw Failure(LPLB_ERROR_UNSUPPORTED, "unit: must be 0 or 1 with LPLB_SOLVER_IPM, which knows tokens only, got \(config.unit)")
        }
    }

    private static func topology(of config: lplb_config, shape: ExpertShape) throws(Failure) -> RedundancyTopology? {
        guard let r2o = config.r2o else {
            guard config.n_redundant == 0 else { throw Failure("n_redundant", "must be 0 when r2o is NULL", value: config.n_redundant) }
            return nil
        }
        try Check.aligned(r2o, "r2o", to: 4)
        return try translating { () throws(RuleViolation) in
            let columns = Int(config.n_redundant), size = try RedundancyTopology.size(groupSize: shape.groupSize, nRedundant: columns)
            return try RedundancyTopology(
                r2o: Array(UnsafeBufferPointer(start: r2o, count: size)), groupSize: shape.groupSize, nRedundant: columns)
        }
    }

    func backend() throws(Failure) -> any PlannerBackend {
        guard device == Int(LPLB_DEVICE_CPU) else { return try makeCudaBackend(self) }
        guard solver == Int(LPLB_SOLVER_FLOW) else {
            throw Failure(LPLB_ERROR_UNSUPPORTED, "solver: LPLB_SOLVER_IPM runs on CUDA only, got a CPU planner (device \(device))")
        }
        return CpuBackend(shape: shape, rank: rank, unit: unit, recording: recording)
    }
}
