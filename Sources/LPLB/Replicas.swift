// The object behind an lplb_replicas handle: one rank's buffers of weights and gradients, those of its peers, and the tables of moves.

import CLPLB
import CLPLBKernels
import LPLBReplicas

/// What a rank tells the others about a buffer: in its blob, and 224 how far behind the beginning of the exported memory it begins.
private struct TensorRecord: StepRecord {
    static let magic: UInt32 = 0x4C_50_52_50
    static let call = "lplb_replicas_add"
    static let numbers = ["kind", "dtype", "row_bytes", "n_rows", "tensors added before"]

    var bytes: [UInt8]

    init(bytes: [UInt8]) { self.bytes = bytes }

    var offset: Int64 {
        get { field(at: 224, Int64.self) }
        set { put(newValue, at: 224) }
    }
}

final class Replicas {
    private let exchange: Exchange
    private let cuda: lplbk_backend
    private let nLogical: Int
    private let nRows: Int
    private let blocks: Int32
    /// What the kernels read, as it was uploaded last, and where it is on the device.
    private let image: UnsafeMutablePointer<lplbk_replicas>
    private let imageBytes: Int64
    private var onDevice: UnsafeMutableRawPointer?
    private var rows: Rows?
    private var isClosed = false
    /// Memory given out by this object, and peers' memory that is mapped here.
    private var given: [UnsafeMutableRawPointer] = []
    private var imported: [UnsafeMutableRawPointer] = []

    private let gate = Gate()
    private let words: UnsafeMutablePointer<CChar>
    private static let wordsSize = 1024

    init(_ config: lplb_replicas_config) throws(Failure) {
        nLogical = try Check.range(config.n_logical, "n_logical", 1...Int64(LPLB_MAX_LOGICAL))
        nRows = try Check.range(config.n_rows, "n_rows", 1...Rows.most)
        blocks = Int32(try Check.range(config.blocks, "blocks", 0...1024))
        guard let handle = config.exchange else { throw Failure("exchange", "must not be NULL", value: "NULL") }
        exchange = Unmanaged<Exchange>.fromOpaque(UnsafeRawPointer(handle)).takeUnretainedValue()
        let settings = exchange.settings
        guard settings.nodes == 1 && settings.counts == 1 else {
            throw Failure("exchange", "must have n_nodes 1 and n_counts 1", value: "\(settings.nodes) and \(settings.counts)")
        }
        cuda = try cudaKernels("lplb_replicas_create")
        let capacity = settings.ranks * nRows
        imageBytes = lplbk_replicas_bytes(Int64(capacity))
        let memory = UnsafeMutableRawPointer.allocate(byteCount: Int(imageBytes), alignment: 16)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: Int(imageBytes))
        image = memory.assumingMemoryBound(to: lplbk_replicas.self)
        image.pointee.capacity = Int32(capacity)
        words = .allocate(capacity: Replicas.wordsSize)
        words[0] = 0
        try check(cuda.replicas_prepare(settings.device), "lplb_replicas_create: kernels on device \(settings.device)")
        try check(cuda.alloc(settings.device, imageBytes, &onDevice), "lplb_replicas_create: tables of \(imageBytes) bytes")
    }

    deinit {
        endNow()
        UnsafeMutableRawPointer(image).deallocate()
        words.deallocate()
    }

    // MARK: Tensors

    /// One more buffer on all ranks. Where one rank fails, all take back what they have done.
    func add(_ tensor: lplb_replicas_tensor) throws(Failure) -> UnsafeMutableRawPointer? {
        let settings = exchange.settings, device = settings.device, index = image.pointee.n_tensors
        let gathering = try Gathering(tensor.gather, tensor.context, ranks: Int64(settings.ranks), rank: Int64(settings.rank))
        var steps = Steps<TensorRecord>(gathering), memory: UnsafeMutableRawPointer?
        let givenBefore = given.count, importedBefore = imported.count
        do throws(Failure) {
            let all = try steps.together { (mine) throws(Failure) in
                if let failure = tensor.failure { throw Failure(LPLB_ERROR_UNSUPPORTED, String(cString: failure)) }
                try open(tensor)
                memory = tensor.memory == nil ? try give(tensor) : tensor.memory
                try describe(memory, adopted: tensor.memory != nil, tensor, in: &mine)
                mine.put(numbers: [Int64(tensor.kind), Int64(tensor.dtype), tensor.row_bytes, Int64(nRows), Int64(index)])
            }
            try all.checkNumbers()
            try steps.together { (_) throws(Failure) in
                for (rank, record) in all.records.enumerated() {
                    let buffer = rank == settings.rank ? memory : try map(record, of: rank)
                    lplbk_replicas_set_buffer(image, index, Int32(rank), buffer)
                }
                let entry = lplbk_replicas_tensor_at(image, index)!
                (entry.pointee.row_bytes, entry.pointee.kind, entry.pointee.dtype) = (tensor.row_bytes, tensor.kind, tensor.dtype)
                image.pointee.n_tensors = index + 1
                cuda.exchange_settle(device)  // a kernel may be reading the tables
                try upload(nil)
            }
        } catch {
            image.pointee.n_tensors = index
            try? upload(nil)  // of a rank that had come further than the one that failed
            try takeBack(given: givenBefore, imported: importedBefore, after: error, gathering)
        }
        return memory
    }

    /// Whether a further tensor can be taken.
    private func open(_ tensor: lplb_replicas_tensor) throws(Failure) {
        try requireOpen()
        guard image.pointee.n_tensors < LPLBK_REPLICAS_MAX_TENSORS else {
            throw Failure(LPLB_ERROR_UNSUPPORTED, "tensor: must be one of at most \(LPLB_REPLICAS_MAX_TENSORS), got one more")
        }
        _ = try Check.range(Int64(tensor.kind), "kind", Int64(LPLB_REPLICAS_WEIGHTS)...Int64(LPLB_REPLICAS_GRADIENTS))
        _ = try Check.range(Int64(tensor.dtype), "dtype", Int64(LPLB_FLOAT32)...Int64(LPLB_BFLOAT16))
        _ = try Check.range(tensor.row_bytes, "row_bytes", 1...(1 << 40))
        let width: Int64 = [4, 8, 2, 2][Int(tensor.dtype)]
        guard tensor.kind == Int32(LPLB_REPLICAS_WEIGHTS) || tensor.row_bytes % width == 0 else {
            throw Failure("row_bytes", "must be a multiple of the \(width) bytes of an element of gradients", value: tensor.row_bytes)
        }
        try Check.aligned(tensor.memory, "memory", to: 16)
    }

    private func give(_ tensor: lplb_replicas_tensor) throws(Failure) -> UnsafeMutableRawPointer? {
        var memory: UnsafeMutableRawPointer?
        let bytes = Int64(nRows) * tensor.row_bytes
        // The first epoch 1 fills it with zeros.
        try check(cuda.exchange_alloc(exchange.settings.device, (bytes + 7) / 8, 1, &memory), "lplb_replicas_add: \(bytes) bytes")
        if let memory { given.append(memory) }
        return memory
    }

    /// Writes how peers can map the buffer: the allocation that it lies in, and where.
    private func describe(
        _ memory: UnsafeMutableRawPointer?, adopted: Bool, _ tensor: lplb_replicas_tensor, in record: inout TensorRecord
    ) throws(Failure) {
        let device = exchange.settings.device
        var base = UInt64(UInt(bitPattern: memory)), bytes = Int64(nRows) * tensor.row_bytes, start = base
        func refused(_ why: String) -> Failure {
            Failure(
                LPLB_ERROR_UNSUPPORTED,
                "memory: must be memory of cudaMalloc on device \(device), which CUDA IPC can map (PyTorch: without expandable_segments), "
                    + "got \(why)")
        }
        if adopted {
            let wanted = bytes
            let error = cuda.replicas_allocation(device, memory, &start, &bytes)
            if error == Int32(LPLBK_UNSUPPORTED) { throw refused("other memory") }
            try check(error, "lplb_replicas_add: the allocation of memory")
            guard Int64(base - start) + wanted <= bytes else {
                throw Failure(
                    "memory", "must have n_rows * row_bytes = \(wanted) bytes in one allocation", value: bytes - Int64(base - start))
            }
        }
        (record.offset, base) = (Int64(base - start), start)
        let pointer = UnsafeMutableRawPointer(bitPattern: UInt(base))
        var blob = ExchangeBlob(exchange.settings, buffer: pointer)
        try check(blob.identify(device, cuda), "lplb_replicas_add: identity of device \(device)")
        let error = blob.export(device, pointer, cuda)
        if error != 0 { throw refused(cudaFailure(error, "what CUDA IPC refuses").message) }
        record.put(blob)
    }

    private func map(_ record: TensorRecord, of rank: Int) throws(Failure) -> UnsafeMutableRawPointer {
        let blob = record.blob.withUnsafeBytes { ExchangeBlob($0.baseAddress!) }
        let (buffer, isImported) = try blob.mapped(for: exchange.settings, of: rank, "lplb_replicas_add", cuda)
        if isImported { imported.append(buffer) }
        return buffer + Int(record.offset)
    }

    /// All ranks unmap, then all free; rethrows the failure. Where the ranks cannot meet any more, the memory stays.
    private func takeBack(given: Int, imported: Int, after failure: Failure, _ gathering: Gathering) throws(Failure) {
        for buffer in self.imported.dropFirst(imported) { _ = cuda.exchange_unimport(exchange.settings.device, buffer) }
        self.imported.removeLast(self.imported.count - imported)
        if Int(failure.status) != LPLB_ERROR_PEER_LOST {
            _ = try gathering.all([UInt8](repeating: 0, count: TensorRecord.size), "the end of a refused tensor")
            for memory in self.given.dropFirst(given) { _ = cuda.free(exchange.settings.device, memory) }
            self.given.removeLast(self.given.count - given)
        }
        throw failure
    }

    private func upload(_ stream: UnsafeMutableRawPointer?) throws(Failure) {
        try check(cuda.upload(exchange.settings.device, onDevice, image, imageBytes, stream), "lplb_replicas: tables")
    }

    // MARK: Placing, pulling, pushing

    /// The moves to this rank under these rows.
    func place(_ memory: UnsafePointer<Int32>?, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try requireOpen()
        let rows = try Rows(memory, "rows", nRanks: exchange.settings.ranks, nRows: nRows, nLogical: nLogical)
        var hash = Hash()
        for numbers in [rows.own, rows.experts] { hash.add(numbers) }
        let lists = [rows.pulls(), rows.pulls(except: self.rows), rows.pushes()]
        for (list, moves) in lists.enumerated() {
            let mine = moves.filter { $0.target.rank == exchange.settings.rank }
            let target = lplbk_replicas_moves(image, Int32(list))!
            for (index, move) in mine.enumerated() {
                target[index] = lplbk_move(rank: Int32(move.source.rank), row: Int32(move.source.row), target: Int32(move.target.row))
            }
            var digest = hash
            digest.add(Int64(list))
            if list == Int(LPLBK_PULL_NEW), let before = self.rows { digest.add(before.experts) }
            lplbk_replicas_set_list(image, Int32(list), digest.folded, Int32(mine.count))
        }
        try upload(stream)
        self.rows = rows
    }

    func pull(onlyNew: Bool, stream: UnsafeMutableRawPointer?) throws(Failure) {
        try launch { tables in
            let list = onlyNew ? LPLBK_PULL_NEW : LPLBK_PULL_ALL
            return cuda.replicas_pull(exchange.settings.device, exchange.view, tables, Int32(list), blocks, stream)
        }
    }

    func push(stream: UnsafeMutableRawPointer?) throws(Failure) {
        try launch { tables in cuda.replicas_push(exchange.settings.device, exchange.view, tables, blocks, stream) }
    }

    private func launch(_ queue: (UnsafeMutablePointer<lplbk_replicas>?) -> Int32) throws(Failure) {
        try requireOpen()
        guard rows != nil else { throw Failure(LPLB_ERROR_WRONG_ORDER, "replicas: lplb_replicas_place must come before") }
        let tables = onDevice?.assumingMemoryBound(to: lplbk_replicas.self)
        try exchange.alone { () throws(Failure) in
            if let fault = fault { throw fault }
            try exchange.requireReady()
            try check(queue(tables), "lplb_replicas: launch")
        }
    }

    /// What ended the exchange, in words of this call.
    private var fault: Failure? {
        let report = exchange.report()
        guard Int(report.code) == LPLB_EXCHANGE_DISAGREED else {
            return exchange.fault.map { Failure(Int($0.status), "replicas: \($0.message)") }
        }
        return Failure(
            LPLB_ERROR_DISAGREEMENT,
            "replicas: all ranks must make the same call under the same placement, but rank \(report.peer) did not do what rank "
                + "\(report.rank) did, which noticed it")
    }

    private func requireOpen() throws(Failure) {
        if isClosed { throw Failure(LPLB_ERROR_WRONG_ORDER, "replicas: must not be used after close") }
    }

    // MARK: The end

    private static let toClose: UInt8 = 1, toEnd: UInt8 = 2

    func close() { gate.ask(Replicas.toClose, finish) }
    func end() { gate.ask(Replicas.toEnd, finish) }

    private func finish(_ asked: UInt8) {
        if asked & Replicas.toEnd != 0 { endNow() } else { closeNow() }
    }

    private func closeNow() {
        guard !isClosed else { return }
        isClosed = true
        cuda.exchange_settle(exchange.settings.device)
        for buffer in imported { _ = cuda.exchange_unimport(exchange.settings.device, buffer) }
        imported = []
    }

    private func endNow() {
        closeNow()
        for memory in given { _ = cuda.free(exchange.settings.device, memory) }
        given = []
        _ = cuda.free(exchange.settings.device, onDevice)
        onDevice = nil
    }

    // MARK: Entering and failing

    var error: UnsafePointer<CChar> { UnsafePointer(words) }

    /// One call of the C interface; a second thread is turned away.
    func enter(_ body: () throws(Failure) -> Void) -> lplb_status {
        guard gate.enter() else { return lplb_status(LPLB_ERROR_BUSY) }
        defer { gate.leave(finish) }
        do throws(Failure) {
            try body()
            return lplb_status(LPLB_OK)
        } catch {
            write(error.message, to: words, size: Replicas.wordsSize)
            return error.status
        }
    }
}
