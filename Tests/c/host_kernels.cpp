// The functions of cuda/kernels.h that replicas and their exchange need, for ranks that are threads of one process: a stand-in for GPUs in
// host memory, which shows what the library makes of placements, tables and failures. Linked in place of the kernels, which are tested on
// GPUs alone.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "kernels.h"

namespace {

int32_t fine(int32_t) { return 0; }

int32_t alloc(int32_t, int64_t bytes, void **memory) {
    *memory = bytes > 0 ? std::aligned_alloc(256, static_cast<std::size_t>((bytes + 255) / 256 * 256)) : nullptr;
    if (*memory != nullptr) std::memset(*memory, 0, static_cast<std::size_t>(bytes));
    return 0;
}

int32_t release(int32_t, void *memory) { return std::free(memory), 0; }

int32_t copy(int32_t, void *to, const void *from, int64_t bytes, void *) {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return 0;
}

int32_t device_info(int32_t, lplbk_device_info *info) { return *info = {90, 132, 1 << 17, 1}, 0; }

int32_t exchange_alloc(int32_t device, int64_t words, uint32_t first_epoch, void **buffer) {
    alloc(device, words * 8, buffer);
    std::fill_n(static_cast<uint64_t *>(*buffer), words, static_cast<uint64_t>(first_epoch - 1) << 32);
    return 0;
}

int32_t exchange_export(int32_t, void *, uint8_t *) { return 0; }
int32_t exchange_unimport(int32_t, void *) { return 0; }
void exchange_settle(int32_t) {}

int32_t exchange_identity(int32_t device, uint8_t *uuid, uint64_t *host) {
    std::memset(uuid, device, LPLBK_EXCHANGE_UUID_BYTES);
    return *host = 1, 0;
}

int32_t exchange_reach(int32_t, const uint8_t *, int32_t, int32_t *reach) { return *reach = 1, 0; }

int32_t exchange_open(int32_t, uint32_t first_epoch, lplbk_exchange_view *view, lplbk_exchange_host **host) {
    view->state = reinterpret_cast<uint64_t>(new lplbk_exchange_state{first_epoch, 0, 0, 0});
    view->host = reinterpret_cast<uint64_t>(*host = new lplbk_exchange_host{});
    return 0;
}

int32_t exchange_close(int32_t, lplbk_exchange_view *view, lplbk_exchange_host *host) {
    delete reinterpret_cast<lplbk_exchange_state *>(view->state);
    delete host;
    return 0;
}

void give_up(const lplbk_exchange_view &view, int32_t code, int32_t peer) {
    auto &state = *reinterpret_cast<lplbk_exchange_state *>(view.state);
    auto &report = reinterpret_cast<lplbk_exchange_host *>(view.host)->report;
    if (state.fault != 0) return;
    state.fault = static_cast<uint32_t>(code);
    report = {0, view.rank, peer, state.epoch, view.timeout_ns};
    __atomic_store_n(&report.code, code, __ATOMIC_RELEASE);
}

uint64_t *packets(const lplbk_exchange_view &view, int of, int source, uint32_t epoch) {
    const auto row = (epoch & 1) * static_cast<uint32_t>(view.n_ranks) + static_cast<uint32_t>(source);
    return reinterpret_cast<uint64_t *>(view.peer[of]) + 2 * row * static_cast<uint32_t>(view.n_packets);
}

// One call of the protocol of exchange_view.h.
bool exchange(const lplbk_exchange_view &view, const int32_t *counts, int32_t *gathered) {
    auto &state = *reinterpret_cast<lplbk_exchange_state *>(view.state);
    const uint32_t epoch = state.epoch++;
    for (int peer = 0; state.fault == 0 && peer < view.n_ranks; ++peer) {
        uint64_t *to = packets(view, peer, view.rank, epoch);
        for (int word = 0; word < 2 * view.n_packets; ++word) {
            const uint32_t count = word < view.n_words ? static_cast<uint32_t>(counts[word]) : 0;
            __atomic_store_n(to + word, static_cast<uint64_t>(epoch) << 32 | count, __ATOMIC_RELEASE);
        }
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(view.timeout_ns);
    for (int peer = 0; peer < view.n_ranks; ++peer) {
        uint64_t *from = packets(view, view.rank, peer, epoch);
        for (int word = 0; word < view.n_words; ++word) {
            uint64_t seen = 0;
            while (state.fault == 0 && (seen = __atomic_load_n(from + word, __ATOMIC_ACQUIRE)) >> 32 != epoch) {
                std::this_thread::yield();
                if (std::chrono::steady_clock::now() > end) give_up(view, LPLBK_EXCHANGE_TIMED_OUT, peer);
            }
            gathered[peer * view.n_words + word] = state.fault == 0 ? static_cast<int32_t>(seen) : 0;
        }
    }
    return state.fault == 0;
}

int32_t exchange_launch(int32_t, const lplbk_exchange_view *view, const int32_t *counts, int32_t *gathered, const int32_t *, int32_t,
                        void *) {
    return exchange(*view, counts, gathered), 0;
}

// ---- Replicas ------------------------------------------------------------------------------------------------------------------

bool meet(const lplbk_exchange_view &view, int32_t word) {
    int32_t words[LPLBK_EXCHANGE_MAX_RANKS];
    bool agreed = exchange(view, &word, words);
    for (int rank = 0; agreed && rank < view.n_ranks; ++rank) {
        if (words[rank] == word) continue;
        give_up(view, LPLBK_EXCHANGE_DISAGREED, rank);
        agreed = false;
    }
    return agreed;
}

// Calls body(to, from, bytes) for the moves of a list and the tensors of a kind.
template <class Body>
void each(const lplbk_exchange_view &view, lplbk_replicas *replicas, int list, int kind, Body body) {
    const lplbk_move *moves = lplbk_replicas_moves(replicas, list);
    for (const lplbk_move *move = moves; move < moves + replicas->n_moves[list]; ++move) {
        for (int index = 0; index < replicas->n_tensors; ++index) {
            const lplbk_replicas_tensor &tensor = replicas->tensors[index];
            if (tensor.kind != kind) continue;
            body(reinterpret_cast<unsigned char *>(tensor.buffer[view.rank]) + move->target * tensor.row_bytes,
                 reinterpret_cast<unsigned char *>(tensor.buffer[move->rank]) + move->row * tensor.row_bytes, tensor.row_bytes);
        }
    }
}

// Memory whose allocation begins 256 bytes before it.
int32_t replicas_allocation(int32_t, const void *memory, uint64_t *base, int64_t *bytes) {
    *base = reinterpret_cast<uint64_t>(memory) - 256;
    return *bytes = 4096, 0;
}

int32_t replicas_pull(int32_t, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t list, int32_t, void *) {
    if (meet(*view, replicas->digest[list]))
        each(*view, replicas, list, LPLBK_WEIGHTS, [](void *to, void *from, int64_t bytes) { copy(0, to, from, bytes, nullptr); });
    return meet(*view, replicas->digest[list]), 0;
}

// Gradients are float32 here.
int32_t replicas_push(int32_t, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t, void *) {
    if (meet(*view, replicas->digest[LPLBK_PUSH]))
        each(*view, replicas, LPLBK_PUSH, LPLBK_GRADIENTS, [](void *to, void *from, int64_t bytes) {
            for (int64_t i = 0; i < bytes / 4; ++i) static_cast<float *>(to)[i] += static_cast<float *>(from)[i];
        });
    if (meet(*view, replicas->digest[LPLBK_PUSH]))
        each(*view, replicas, LPLBK_PULL_ALL, LPLBK_GRADIENTS,
             [](void *to, void *, int64_t bytes) { std::memset(to, 0, static_cast<std::size_t>(bytes)); });
    return 0;
}

lplbk_backend backend() {
    lplbk_backend all = {};
    all.architectures = "host memory";
    all.error_kind = [](int32_t error) -> int32_t { return error == 0 ? LPLBK_KIND_OK : LPLBK_KIND_FAILED; };
    all.error_name = [](int32_t) { return "an error of host memory"; };
    all.device_info = device_info;
    all.alloc = alloc, all.free = release, all.upload = copy, all.download = copy;
    all.exchange_alloc = exchange_alloc, all.exchange_export = exchange_export, all.exchange_unimport = exchange_unimport;
    all.exchange_identity = exchange_identity, all.exchange_reach = exchange_reach, all.exchange_settle = exchange_settle;
    all.exchange_open = exchange_open, all.exchange_close = exchange_close, all.exchange_launch = exchange_launch;
    all.replicas_prepare = fine, all.replicas_allocation = replicas_allocation;
    all.replicas_pull = replicas_pull, all.replicas_push = replicas_push;
    return all;
}

}  // namespace

extern "C" const lplbk_backend *lplbk_cuda_backend(void) {
    static const lplbk_backend all = backend();
    return &all;
}
