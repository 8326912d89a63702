// Device side of the exchange of counts among ranks; exchange_view.h describes the protocol.
//
// For use inside any kernel, by one block or several (a call's threads are numbered 0 .. n_threads-1 across them, warps whole, n_threads a
// multiple of 32):
//
//     const exchange::Call call = exchange::begin(view);                              // any thread, early: one load
//     ... count; then, with the counts complete and visible to all threads that send:
//     exchange::send(view, call, counts, thread, n_threads);                          // returns at once
//     ...
//     exchange::receive(view, call, counts, thread, n_threads, [&](int row, int column, int count) { ... });
//     ... after every thread of the kernel that called begin() has passed it:
//     exchange::end(view, call);                                                      // one thread of the kernel, once
//
// receive() hands every count of every rank to exactly one thread, this rank's own included, as it arrives; rows are ranks in EP order.
// The views of all ranks must be used by kernels of the same shape only as far as n_words goes: threads and blocks may differ.
// Spinning blocks hold their SM: keep them few, and never let a grid that spins fill the GPU, or two exchanges on two streams (or an
// exchange and a collective) can keep each other's peers from running until the time-out.
#pragma once

#include <stdint.h>

#include "exchange_view.h"

namespace exchange {

struct Call {
    uint32_t epoch;
    uint32_t fault;  // not 0: an earlier call failed; nothing is sent and nothing waited for
};

namespace detail {

constexpr uint32_t kPollsBetweenLooks = 1024;  // a poll takes about 0.6 us, so the clock and the host are looked at twice a millisecond

__device__ __forceinline__ uint64_t now_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Each half is stored and loaded whole; the two halves need no order between them.
__device__ __forceinline__ void store_packet(uint64_t address, uint64_t first, uint64_t second) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}

__device__ __forceinline__ void load_packet(uint64_t address, uint64_t &first, uint64_t &second) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
}

__device__ __forceinline__ uint64_t packet_address(uint64_t buffer, const lplbk_exchange_view &view, uint32_t epoch, int source,
                                                   int packet) {
    // 32 bits are enough: the boundary keeps a buffer below 2^31 packets.
    const uint32_t index = ((epoch & 1) * (uint32_t)view.n_ranks + (uint32_t)source) * (uint32_t)view.n_packets + (uint32_t)packet;
    return buffer + (uint64_t)index * 16;
}

// A warp takes 32 packets of one peer at a time; such pieces are numbered peer by peer, the next rank first, so that the ranks do not all
// write to the same one at once.
struct Piece {
    int peer, packet;
};

__device__ __forceinline__ int pieces_of_peer(const lplbk_exchange_view &view) { return (view.n_packets + 31) / 32; }

__device__ __forceinline__ Piece piece_at(const lplbk_exchange_view &view, int piece, int per_peer, int lane) {
    const int distance = (int)((uint32_t)piece / (uint32_t)per_peer);
    int peer = view.rank + 1 + distance;
    if (peer >= view.n_ranks) peer -= view.n_ranks;
    return {peer, (piece - distance * per_peer) * 32 + lane};
}

// Row and column of word `word` of rank `source`.
template <class Take>
__device__ __forceinline__ void hand_over(const lplbk_exchange_view &view, int source, int word, int32_t count, Take &take) {
    if (word >= view.n_words) return;
    if (view.n_nodes == 1) {
        take(source, word, count);
    } else {
        const int node = (int)((uint32_t)word / (uint32_t)view.n_counts);
        take(node * view.n_ranks + source, word - node * view.n_counts, count);
    }
}

// Writes a report for the host.
static __device__ __noinline__ void note(lplbk_report *to, uint32_t code, int rank, int peer, uint32_t epoch, uint64_t waited_ns) {
    auto *report = reinterpret_cast<volatile lplbk_report *>(to);
    report->rank = rank;
    report->peer = peer;
    report->epoch = epoch;
    report->waited_ns = waited_ns;
    __threadfence_system();
    report->code = (int32_t)code;
    __threadfence_system();
}

// Ends the context a moment after a report, so that what other blocks have still to send reaches the peers: these find the same fault then.
static __device__ __noinline__ void trap_soon() {
    const uint64_t since = now_ns();
    while (now_ns() - since < 10000000) __nanosleep(10000);
    __trap();
}

// The first thread that gives up writes down why; later ones find it written.
static __device__ __noinline__ void give_up(const lplbk_exchange_view &view, uint32_t code, int peer, uint32_t epoch, uint64_t waited_ns) {
    auto *state = reinterpret_cast<lplbk_exchange_state *>(view.state);
    if (atomicCAS(&state->fault, LPLBK_EXCHANGE_FINE, code) == LPLBK_EXCHANGE_FINE) {
        note(&reinterpret_cast<lplbk_exchange_host *>(view.host)->report, code, view.rank, peer, epoch, waited_ns);
    }
    // Not after an abort: the host asked for it and wants its context back. A thread that finds the report of another one taken waits
    // for nothing: that thread is past its fence or will trap itself.
    if (code == LPLBK_EXCHANGE_TIMED_OUT && view.policy == LPLBK_EXCHANGE_TRAP) {
        while (reinterpret_cast<volatile lplbk_exchange_host *>(view.host)->report.code == LPLBK_EXCHANGE_FINE) __nanosleep(100);
        __trap();
    }
}

constexpr uint64_t kStop = ~uint64_t{0};

// When this thread looked first (`since`: what the last look said, 0 at the first), or kStop when it has to stop waiting for `peer`.
static __device__ __noinline__ uint64_t look(const lplbk_exchange_view &view, uint32_t epoch, int peer, uint64_t since) {
    const uint64_t now = now_ns();
    if (since == 0) since = now;
    if (*reinterpret_cast<volatile uint32_t *>(&reinterpret_cast<lplbk_exchange_host *>(view.host)->abort) != 0) {
        give_up(view, LPLBK_EXCHANGE_ABORTED, peer, epoch, now - since);
        return kStop;
    }
    if (view.timeout_ns != 0 && now - since >= view.timeout_ns) {
        give_up(view, LPLBK_EXCHANGE_TIMED_OUT, peer, epoch, now - since);
        return kStop;
    }
    return since;
}

}  // namespace detail

// The row of `peer` (numbered in the EP group) comes from a planner with another digest. By any thread; the first one reports it. Rows that
// are missing read as zeros, which no digest is: then the reason why they are missing has been reported before.
static __device__ __noinline__ void disagree(const lplbk_exchange_view &view, uint32_t epoch, int peer) {
    auto *state = reinterpret_cast<lplbk_exchange_state *>(view.state);
    if (atomicCAS(&state->fault, LPLBK_EXCHANGE_FINE, LPLBK_EXCHANGE_DISAGREED) != LPLBK_EXCHANGE_FINE) return;
    detail::note(&reinterpret_cast<lplbk_exchange_host *>(view.host)->report, LPLBK_EXCHANGE_DISAGREED, view.rank, peer, epoch, 0);
    if (view.policy == LPLBK_EXCHANGE_TRAP) detail::trap_soon();
}

// The epoch of this call. All threads of a call get the same.
__device__ __forceinline__ Call begin(const lplbk_exchange_view &view) {
    Call call;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(call.epoch), "=r"(call.fault) : "l"(view.state) : "memory");
    return call;
}

// Stores counts[n_words] (shared or global memory) into every peer's buffer.
__device__ __forceinline__ void send(const lplbk_exchange_view &view, const Call &call, const int32_t *counts, int thread, int n_threads) {
    const int per_peer = detail::pieces_of_peer(view);
    const int n_pieces = per_peer * (view.n_ranks - 1);
    const uint64_t tag = (uint64_t)call.epoch << 32;
#pragma unroll 1
    for (int piece = thread >> 5; piece < n_pieces; piece += n_threads >> 5) {
        const detail::Piece at = detail::piece_at(view, piece, per_peer, thread & 31);
        if (at.packet >= view.n_packets) continue;
        const int word = 2 * at.packet;
        const uint32_t first = (uint32_t)counts[word];
        const uint32_t second = word + 1 < view.n_words ? (uint32_t)counts[word + 1] : 0;
        const uint64_t address = detail::packet_address(view.peer[at.peer], view, call.epoch, view.rank, at.packet);
        // Asked this late so that the loads of the counts and of the call (begin) are under way together.
        if (call.fault == 0) detail::store_packet(address, tag | first, tag | second);
    }
}

// Calls take(row, column, count) for every count of every rank, each in one thread, in no particular order. `counts`: what was sent.
// False in the threads that gave up waiting (policy report); they hand over zeros for what is missing.
template <int kInFlight = 4, class Take>
__device__ __forceinline__ bool receive(const lplbk_exchange_view &view, const Call &call, const int32_t *counts, int thread, int n_threads,
                                        Take &&take) {
    const int per_peer = detail::pieces_of_peer(view);
    const int n_pieces = per_peer * (view.n_ranks - 1);
    const int n_warps = n_threads >> 5;
    uint64_t since = 0;
    uint32_t polls = 0;
    bool fine = call.fault == 0;
    // This rank's own counts, while those of the others are under way.
#pragma unroll 1
    for (int word = thread; word < view.n_words; word += n_threads) detail::hand_over(view, view.rank, word, counts[word], take);
#pragma unroll 1
    for (int first = thread >> 5; first < n_pieces; first += n_warps * kInFlight) {
        detail::Piece at[kInFlight];
        uint32_t missing = 0;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int piece = first + i * n_warps;
            at[i] = detail::piece_at(view, min(piece, n_pieces - 1), per_peer, thread & 31);
            if (piece < n_pieces && at[i].packet < view.n_packets) missing |= 1u << i;
        }
        while (missing != 0 && fine) {
            uint64_t words[kInFlight][2];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if ((missing & (1u << i)) == 0) continue;
                detail::load_packet(detail::packet_address(view.peer[view.rank], view, call.epoch, at[i].peer, at[i].packet), words[i][0],
                                    words[i][1]);
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if ((missing & (1u << i)) == 0) continue;
                if ((uint32_t)(words[i][0] >> 32) != call.epoch || (uint32_t)(words[i][1] >> 32) != call.epoch) continue;
                missing &= ~(1u << i);
                detail::hand_over(view, at[i].peer, 2 * at[i].packet, (int32_t)(uint32_t)words[i][0], take);
                detail::hand_over(view, at[i].peer, 2 * at[i].packet + 1, (int32_t)(uint32_t)words[i][1], take);
            }
            if (missing != 0 && ++polls % detail::kPollsBetweenLooks == 0) {
                int peer = at[0].peer;
#pragma unroll
                for (int i = kInFlight - 1; i >= 0; --i) {
                    if ((missing & (1u << i)) != 0) peer = at[i].peer;
                }
                since = detail::look(view, call.epoch, peer, since);
                fine = since != detail::kStop;
            }
        }
        // Only what failed before or just now is left: the output is complete all the same.
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if ((missing & (1u << i)) == 0) continue;
            detail::hand_over(view, at[i].peer, 2 * at[i].packet, 0, take);
            detail::hand_over(view, at[i].peer, 2 * at[i].packet + 1, 0, take);
        }
    }
    return fine;
}

// Makes the next call one of the next epoch. By one thread, when no thread of this call can read the epoch any more.
__device__ __forceinline__ void end(const lplbk_exchange_view &view, const Call &call) {
    reinterpret_cast<lplbk_exchange_state *>(view.state)->epoch = call.epoch + 1;
}

// The same for kernels of several blocks: one thread of each block calls it when its block is through; the last one ends the call.
__device__ __forceinline__ void end_of_block(const lplbk_exchange_view &view, const Call &call, uint32_t n_blocks) {
    auto *state = reinterpret_cast<lplbk_exchange_state *>(view.state);
    if (n_blocks > 1) {
        __threadfence();
        if (atomicAdd(&state->ticket, 1u) != n_blocks - 1) return;
        state->ticket = 0;
    }
    end(view, call);
}

}  // namespace exchange
