// Replicas of ranks that are threads of this program, with a library whose kernels work in host memory (host_kernels.cpp): buffers given
// and adopted, hundreds of placements, refusals that all ranks share, ranks that disagree and ranks that do not come.
#include <lplb.h>

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int n_ranks = 4, n_own = 2, n_slots = 2, n_rows = n_own + n_slots, n_logical = n_ranks * n_own, width = 10;

std::barrier<> all_ranks(n_ranks);
std::vector<unsigned char> gathered;

void require(bool fine, int rank, int line, const std::string &words) {
    if (fine) return;
    std::fprintf(stderr, "replicas: rank %d, line %d: %s\n", rank, line, words.c_str());
    std::_Exit(1);
}

int32_t gather(void *context, const void *mine, void *all, int64_t bytes) {
    const int rank = *static_cast<const int *>(context);
    const auto size = static_cast<std::size_t>(bytes);
    all_ranks.arrive_and_wait();
    if (rank == 0) gathered.resize(n_ranks * size);
    all_ranks.arrive_and_wait();
    std::memcpy(gathered.data() + static_cast<std::size_t>(rank) * size, mine, size);
    all_ranks.arrive_and_wait();
    std::memcpy(all, gathered.data(), n_ranks * size);
    all_ranks.arrive_and_wait();
    return 0;
}

struct Rank {
    int rank;
    lplb_exchange *exchange = nullptr;
    lplb_replicas *replicas = nullptr;
    char message[512] = "";
    std::vector<int32_t> rows = std::vector<int32_t>(n_ranks * (1 + n_rows));
    float *weights = nullptr, *adopted = nullptr, *grads = nullptr;

    explicit Rank(int number) : rank(number) {}

    // A status with the beginning of the words.
    void expect(int line, lplb_status status, lplb_status wanted, const std::string &words = "") {
        const std::string said = status == LPLB_OK ? "" : replicas != nullptr ? lplb_replicas_error(replicas) : message;
        require(status == wanted && said.rfind(words, 0) == 0, rank, line, "status " + std::to_string(status) + " '" + said + "'");
    }

    int32_t expert(int row) const { return expert(row, rank); }
    int32_t expert(int row, int of_rank) const { return rows[static_cast<std::size_t>(of_rank * (1 + n_rows) + 1 + row)]; }

    void make() {
        lplb_connect_config connect = LPLB_CONNECT_CONFIG_INIT;
        connect.device = rank, connect.rank = rank, connect.n_ranks = n_ranks, connect.n_counts = 1;
        connect.gather = gather, connect.context = &rank, connect.policy = LPLB_EXCHANGE_REPORT, connect.timeout_ms = 500;
        expect(__LINE__, lplb_exchange_connect(&connect, &exchange, message, sizeof message), LPLB_OK);
        lplb_replicas_config config = LPLB_REPLICAS_CONFIG_INIT;
        config.exchange = exchange, config.n_logical = n_logical, config.n_rows = n_rows;
        expect(__LINE__, lplb_replicas_create(&config, &replicas, message, sizeof message), LPLB_OK);
        const char *words = "replicas: lplb_replicas_place must come before";
        expect(__LINE__, lplb_replicas_pull(replicas, 0, nullptr), LPLB_ERROR_WRONG_ORDER, words);
    }

    lplb_status add(int32_t kind, int64_t bytes, void *memory, float **added, const char *failure = nullptr) {
        lplb_replicas_tensor tensor = LPLB_REPLICAS_TENSOR_INIT;
        tensor.kind = kind, tensor.row_bytes = bytes, tensor.memory = memory, tensor.failure = failure;
        tensor.gather = gather, tensor.context = &rank;
        return lplb_replicas_add(replicas, &tensor, reinterpret_cast<void **>(added));
    }

    void add_all(unsigned char *block) {
        constexpr int64_t bytes = width * sizeof(float);
        float *none = nullptr;
        expect(__LINE__, add(LPLB_REPLICAS_WEIGHTS, bytes, nullptr, &weights), LPLB_OK);
        expect(__LINE__, add(LPLB_REPLICAS_GRADIENTS, rank == 2 ? 44 : 40, nullptr, &none), LPLB_ERROR_DISAGREEMENT,
               "row_bytes: must be equal on all ranks, got 44 on rank 2 and 40 on rank 0");
        expect(__LINE__, add(LPLB_REPLICAS_GRADIENTS, rank == 1 ? 42 : 40, nullptr, &none), LPLB_ERROR_INVALID_ARGUMENT,
               "rank 1: row_bytes: must be a multiple of the 4 bytes of an element of gradients, got 42");
        expect(__LINE__, add(LPLB_REPLICAS_GRADIENTS, bytes, nullptr, &none, rank == 3 ? "no room" : nullptr), LPLB_ERROR_UNSUPPORTED,
               "rank 3: no room");
        expect(__LINE__, add(LPLB_REPLICAS_WEIGHTS, 1000, block + 256, &none), LPLB_ERROR_INVALID_ARGUMENT,
               "rank 0: memory: must have n_rows * row_bytes = 4000 bytes in one allocation, got 3840");
        expect(__LINE__, add(LPLB_REPLICAS_WEIGHTS, bytes, block + 256, &adopted), LPLB_OK);
        expect(__LINE__, add(LPLB_REPLICAS_GRADIENTS, bytes, nullptr, &grads), LPLB_OK);
        require(reinterpret_cast<unsigned char *>(adopted) == block + 256 && none == nullptr, rank, __LINE__, "memory");
    }

    // A placement with other copies; the rows follow the ones before.
    void place(std::mt19937 &random, bool first) {
        std::vector<int32_t> slots;
        for (int r = 0; r < n_ranks; ++r) {
            constexpr int others = n_logical - n_own;
            const int one = static_cast<int>(random() % others);
            const int other = (one + 1 + static_cast<int>(random() % (others - 1))) % others;
            for (int own = 0; own < n_own; ++own) slots.push_back(r * n_own + own);
            for (int copy : {one, other}) slots.push_back(copy >= r * n_own ? copy + n_own : copy);
        }
        expect(__LINE__, lplb_placement_rows(slots.data(), n_ranks * n_rows, n_logical, n_ranks, 0, first ? nullptr : rows.data(),
                                             rows.data(), nullptr, nullptr, message, sizeof message), LPLB_OK);
        expect(__LINE__, lplb_replicas_place(replicas, rows.data(), nullptr), LPLB_OK);
    }

    void pull(int round, bool only_new) {
        for (int i = 0; i < n_own * width; ++i) {
            weights[i] = static_cast<float>((only_new ? 0 : round * 100) + expert(i / width));
            adopted[i] = -weights[i];
        }
        expect(__LINE__, lplb_replicas_pull(replicas, only_new, nullptr), LPLB_OK);
        for (int i = 0; i < n_rows * width; ++i) {
            const auto wanted = static_cast<float>((only_new ? 0 : round * 100) + expert(i / width));
            require(weights[i] == wanted && adopted[i] == -wanted, rank, __LINE__, "weights of row " + std::to_string(i / width));
        }
    }

    static float gradient(int of_rank, int32_t of_expert, int round) { return static_cast<float>(1 + of_rank + round + 100 * of_expert); }

    void push(int round) {
        for (int i = 0; i < n_rows * width; ++i) grads[i] = gradient(rank, expert(i / width), round);
        expect(__LINE__, lplb_replicas_push(replicas, nullptr), LPLB_OK);
        for (int i = 0; i < n_rows * width; ++i) {
            float sum = 0;
            for (int r = 0; i / width < n_own && r < n_ranks; ++r)
                for (int row = 0; row < n_rows; ++row)
                    if (expert(row, r) == expert(i / width)) sum += gradient(r, expert(row, r), round);
            require(grads[i] == sum, rank, __LINE__, "gradient of row " + std::to_string(i / width));
        }
        all_ranks.arrive_and_wait();
    }

    void run(bool silent) {
        auto *block = static_cast<unsigned char *>(std::aligned_alloc(256, 4096));
        make();
        add_all(block);
        std::mt19937 random(7);
        for (int round = 0; round < 300; ++round) {
            place(random, round == 0);
            pull(round, false);
            push(round);
            pull(0, false);  // what a placement then adds is all that differs
            place(random, false);
            pull(0, true);
        }
        expect(__LINE__, lplb_replicas_place(replicas, nullptr, nullptr), LPLB_ERROR_INVALID_ARGUMENT, "rows: must not be NULL");
        if (rank == 3) {
            if (!silent) expect(__LINE__, lplb_replicas_push(replicas, nullptr), LPLB_OK);
        } else {
            expect(__LINE__, lplb_replicas_pull(replicas, 0, nullptr), LPLB_OK);
            const std::string differs = "replicas: all ranks must make the same call under the same placement, but rank 3 did not";
            expect(__LINE__, lplb_replicas_pull(replicas, 0, nullptr), silent ? LPLB_ERROR_TIMEOUT : LPLB_ERROR_DISAGREEMENT,
                   silent ? "replicas: exchange: rank " : differs);
        }
        all_ranks.arrive_and_wait();
        lplb_replicas_close(replicas);
        expect(__LINE__, lplb_replicas_pull(replicas, 0, nullptr), LPLB_ERROR_WRONG_ORDER, "replicas: must not be used after close");
        all_ranks.arrive_and_wait();
        lplb_replicas_destroy(replicas);
        lplb_exchange_destroy(exchange);
        std::free(block);
    }
};

}  // namespace

int main() {
    for (bool silent : {false, true}) {
        std::vector<std::thread> threads;
        for (int rank = 0; rank < n_ranks; ++rank) threads.emplace_back([rank, silent] { Rank{rank}.run(silent); });
        for (auto &thread : threads) thread.join();
    }
    std::puts("replicas: 4 ranks, 1200 placements, nothing found");
}
