// The trial of an exchange: calls with counts from the host, within a limit.

import CLPLB
import CLPLBKernels
import Glibc
import Synchronization

extension Exchange: Connectable {
    func trial(_ counts: [Int32], calls: Int, limitMs: Int64) throws(Failure) -> [Int32] {
        let own = settings.counts, all = settings.nodes * settings.ranks * own
        var got = [Int32](repeating: 0, count: calls * all)
        // NVLink knows its limit; a rail may not, and a rank that has failed would let it wait for ever.
        let watchdog = settings.rail == nil ? nil : Watchdog(afterMs: limitMs + 5000) { self.abort() }
        do {
            // After the memory has been freed, which waits for what is queued; before the fault is read, or an abort could come unseen.
            defer { watchdog?.end() }
            let memory = try DeviceMemory(words: calls * (own + all), on: settings.device, "lplb_exchange_connect: memory for the trial")
            try memory.upload(counts, "lplb_exchange_connect: counts of the trial")
            for call in 0..<calls { try allGather(memory.words + call * own, memory.words + calls * own + call * all, stream: nil) }
            try memory.download(&got, from: calls * own, "lplb_exchange_connect: what the trial brought")
        }
        if let fault { throw fault }
        return got
    }
}

/// Words of device memory that end with the object.
final class DeviceMemory {
    let words: UnsafeMutablePointer<Int32>
    private let device: Int32
    private let cuda: lplbk_backend

    init(words: Int, on device: Int32, _ what: String) throws(Failure) {
        cuda = try cudaKernels(what)
        var memory: UnsafeMutableRawPointer?
        try check(cuda.alloc(device, Int64(4 * words), &memory), what)
        guard let memory else { throw Failure(LPLB_ERROR_OUT_OF_MEMORY, what) }
        (self.words, self.device) = (memory.assumingMemoryBound(to: Int32.self), device)
    }

    deinit { _ = cuda.free(device, words) }

    func upload(_ values: [Int32], _ what: String) throws(Failure) {
        try check(cuda.upload(device, words, values, Int64(4 * values.count), nil), what)
    }

    func download(_ values: inout [Int32], from word: Int, _ what: String) throws(Failure) {
        try check(cuda.download(device, &values, words + word, Int64(4 * values.count), nil), what)
    }
}

/// Calls a function from a thread of its own, unless it is ended before.
final class Watchdog: Sendable {
    private let ended = Atomic<Bool>(false)
    private let deadlineMs: Int64
    private let bark: @Sendable () -> Void
    private let thread = Atomic<pthread_t>(0)

    init(afterMs: Int64, _ bark: @escaping () -> Void) {
        // The thread is over before the object that it calls can be: end() waits for it.
        nonisolated(unsafe) let bark = bark
        self.bark = { bark() }
        deadlineMs = Watchdog.nowMs() + afterMs
        var made = pthread_t()
        let context = Unmanaged.passUnretained(self).toOpaque()
        let failed = pthread_create(&made, nil, { Unmanaged<Watchdog>.fromOpaque($0!).takeUnretainedValue().watch() }, context)
        if failed == 0 { thread.store(made, ordering: .relaxed) }
    }

    func end() {
        ended.store(true, ordering: .releasing)
        let thread = thread.load(ordering: .relaxed)
        if thread != 0 { pthread_join(thread, nil) }
    }

    private func watch() -> UnsafeMutableRawPointer? {
        while !ended.load(ordering: .acquiring) {
            guard Watchdog.nowMs() < deadlineMs else {
                bark()
                return nil
            }
            usleep(1000)
        }
        return nil
    }

    private static func nowMs() -> Int64 {
        var now = timespec()
        clock_gettime(CLOCK_MONOTONIC, &now)
        return Int64(now.tv_sec) * 1000 + Int64(now.tv_nsec) / 1_000_000
    }
}
