// struct_size: which fields of a struct of lplb.h its caller knows. The rule is in lplb.h, section 1.

import CLPLB

/// A struct of lplb.h that begins with `struct_size`.
protocol SizedStruct {
    /// What the fields are that an older caller's struct does not have: what its initialiser macro sets, 0 where it has none.
    static var defaults: Self { get }
    /// The fields behind `struct_size`, at whose beginnings an older caller's struct may end.
    static var fields: [PartialKeyPath<Self>] { get }
}

enum StructSize {
    /// No version of a struct is larger, so a larger number is no size.
    private static let most = 4096

    /// The caller's struct, with our defaults where it is shorter than ours.
    /// - Parameter argument: its name, and how `name` begins unless that is given: whose size is wrong, in an error.
    static func read<Value: SizedStruct>(
        _ pointer: UnsafePointer<Value>?, _ argument: String, size name: String = "struct_size"
    ) throws(Failure) -> Value {
        let memory = UnsafeRawPointer(try Check.pointer(pointer, argument))
        let ours = MemoryLayout<Value>.size, size = try checked(memory, Value.self, name)
        for byte in stride(from: ours, to: size, by: 1) {
            let value = memory.load(fromByteOffset: byte, as: UInt8.self)
            guard value == 0 else {
                throw Failure(
                    name, "must end within the \(ours) bytes of \(Value.self) that this version knows, or the rest must be 0",
                    value: "\(size) with \(value) in byte \(byte)")
            }
        }
        var value = Value.defaults
        withUnsafeMutableBytes(of: &value) { $0.copyMemory(from: UnsafeRawBufferPointer(start: memory, count: min(size, ours))) }
        return value
    }

    /// Checks the size of a struct that is to be written.
    static func check<Value: SizedStruct>(
        _ pointer: UnsafeMutablePointer<Value>?, _ argument: String, size name: String = "struct_size"
    ) throws(Failure) -> UnsafeMutablePointer<Value> {
        let pointer = try Check.pointer(pointer, argument)
        _ = try checked(pointer, Value.self, name)
        return pointer
    }

    /// Writes a struct whose size has been checked: as many of its fields as the caller's has, and 0 to those that only the caller knows.
    static func write<Value: SizedStruct>(_ value: Value, to pointer: UnsafeMutablePointer<Value>) {
        let memory = UnsafeMutableRawPointer(pointer), size = Int(memory.load(as: Int64.self)), ours = MemoryLayout<Value>.size
        let first = MemoryLayout<Int64>.size  // struct_size stays the caller's
        withUnsafeBytes(of: value) { bytes in
            (memory + first).copyMemory(from: bytes.baseAddress! + first, byteCount: min(size, ours) - first)
        }
        if size > ours { (memory + ours).initializeMemory(as: UInt8.self, repeating: 0, count: size - ours) }
    }

    private static func checked<Value: SizedStruct>(_ memory: UnsafeRawPointer, _: Value.Type, _ name: String) throws(Failure) -> Int {
        let size = Int(memory.load(as: Int64.self)), ours = MemoryLayout<Value>.size
        let isNewer = size > ours && size <= most && size % MemoryLayout<Int64>.size == 0
        guard size == ours || isNewer || Value.fields.contains(where: { MemoryLayout<Value>.offset(of: $0) == size }) else {
            throw Failure(
                name, "must be sizeof(\(Value.self)), \(ours), or that of another version, which ends at a field's border", value: size)
        }
        return size
    }
}

extension lplb_config: SizedStruct {
    static var defaults: Self {
        var config = Self()
        (config.device, config.rank) = (Int32(LPLB_DEVICE_CPU), Int64(LPLB_WHOLE_BATCH))
        return config
    }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.device, \.solver, \.ep_size, \.rank, \.n_nodes, \.n_logical, \.n_physical, \.group_size, \.n_redundant, \.r2o,
            \.number, \.policy, \.unit, \.record,
        ]
    }
}

extension lplb_agree_config: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [\.planner, \.history, \.phy2log, \.settings, \.failure, \.n_ranks, \.rank, \.gather, \.context]
    }
}

extension lplb_agreement: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] { [\.n_nodes, \.n_hosts, \.number, \.row_dtype, \.all_cuda] }
}

extension lplb_plan_info: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [\.n_groups, \.invalid_ids, \.own_rank, \.own_node, \.other_nodes, \.overflow]
    }
}

extension lplb_metrics: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.plans, \.groups, \.imbalance_sum, \.imbalance_max, \.gap_sum, \.gap_max, \.tokens, \.moved, \.own_rank, \.own_node,
            \.other_nodes, \.uncertified, \.overflow, \.invalid_ids,
        ]
    }
}

extension lplb_layout: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.ids, \.experts, \.row_of_slot, \.n_ids, \.n_rows, \.ids_dtype, \.row_dtype, \.parts, \.exchanged, \.order, \.sent,
            \.received, \.ends, \.numbers, \.by_row, \.n_by_row,
        ]
    }
}

extension lplb_solve_config: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.loads, \.phy2log, \.n_logical, \.n_physical, \.ep_size, \.unit, \.unused, \.speed, \.fixed, \.tokens, \.info, \.level,
        ]
    }
}

extension lplb_exchange_config: SizedStruct {
    static var defaults: Self {
        var config = Self()
        (config.n_nodes, config.timeout_ms, config.first_epoch) = (1, 30000, 1)
        return config
    }
    static var fields: [PartialKeyPath<Self>] {
        [\.device, \.policy, \.n_ranks, \.rank, \.n_counts, \.n_nodes, \.node, \.timeout_ms, \.first_epoch, \.rail]
    }
}

extension lplb_connect_config: SizedStruct {
    static var defaults: Self {
        var config = Self()
        (config.device, config.timeout_ms, config.first_epoch) = (Int32(LPLB_DEVICE_CPU), 30000, 1)
        return config
    }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.device, \.policy, \.n_ranks, \.rank, \.n_counts, \.n_nodes, \.timeout_ms, \.first_epoch, \.rail, \.failure, \.gather,
            \.context,
        ]
    }
}

extension lplb_exchange_report: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] { [\.code, \.rank, \.peer, \.epoch, \.waited_ns, \.peer_node, \.reserved] }
}

extension lplb_rail_ops: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] { [\.context, \.all_gather, \.error, \.destroy, \.abort, \.report, \.failed] }
}

extension lplb_replicas_config: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] { [\.exchange, \.n_logical, \.n_rows, \.blocks] }
}

extension lplb_replicas_tensor: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [\.kind, \.dtype, \.row_bytes, \.memory, \.failure, \.gather, \.context]
    }
}

extension lplb_place_config: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.policy, \.even_homes, \.n_snapshots, \.n_layers, \.n_logical, \.n_ranks, \.n_slots, \.slots, \.n_nodes, \.n_groups, \.previous,
            \.max_moves, \.tolerance,
        ]
    }
}

extension lplb_placement_report: SizedStruct {
    static var defaults: Self { Self() }
    static var fields: [PartialKeyPath<Self>] {
        [
            \.n_snapshots, \.n_layers, \.n_logical, \.n_ranks, \.n_slots, \.n_nodes, \.phy2log, \.history, \.even_balance, \.exact_balance,
            \.duplicates, \.homes, \.pulls, \.pushes, \.leaves_rank, \.leaves_node, \.inbound,
        ]
    }
}
