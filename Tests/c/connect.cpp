// Processes that have nothing but socket pairs: they agree, connect an exchange, or learn together why they cannot, and plan.
//   connect [ranks]       on CPUs: connecting is refused, a rank that differs or dies is noticed, and the rows travel by the socket pairs
//   connect gpu [ranks]   on GPUs (ranks may share one): the exchange carries the rows, also inside lplb_planner_run
#include <lplb.h>

#include <dlfcn.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t experts_per_rank = 4, n_ids = 2000;

void require(bool fine, const std::string &words) {
    if (!fine) throw std::runtime_error(words);
}

// ---- the caller's gather ------------------------------------------------------------------------------------------------------

bool move(ssize_t (*step)(int, void *, std::size_t), int file, void *memory, std::int64_t bytes) {
    for (std::int64_t done = 0; done < bytes;) {
        const ssize_t part = step(file, static_cast<char *>(memory) + done, static_cast<std::size_t>(bytes - done));
        if (part <= 0) return false;
        done += part;
    }
    return true;
}
bool receive(int file, void *memory, std::int64_t bytes) { return move(read, file, memory, bytes); }
bool send_all(int file, const void *memory, std::int64_t bytes) {
    return move([](int to, void *from, std::size_t n) { return write(to, from, n); }, file, const_cast<void *>(memory), bytes);
}

// Rank 0 has a socket to every other rank, the others have one to rank 0.
struct Group {
    std::int64_t ranks, rank;
    std::vector<int> sockets;
    int calls_until_death = -1;
};

int32_t gather(void *context, const void *mine, void *all, std::int64_t bytes) {
    auto &group = *static_cast<Group *>(context);
    if (group.calls_until_death >= 0 && group.calls_until_death-- == 0) raise(SIGKILL);
    if (group.rank != 0) return send_all(group.sockets[0], mine, bytes) && receive(group.sockets[0], all, group.ranks * bytes) ? 0 : 1;
    std::memcpy(all, mine, static_cast<std::size_t>(bytes));
    for (std::int64_t rank = 1; rank < group.ranks; rank++)
        if (!receive(group.sockets[static_cast<std::size_t>(rank)], static_cast<char *>(all) + rank * bytes, bytes)) return 1;
    for (std::int64_t rank = 1; rank < group.ranks; rank++)
        if (!send_all(group.sockets[static_cast<std::size_t>(rank)], all, group.ranks * bytes)) return 1;
    return 0;
}

void barrier(Group &group) {
    std::vector<char> all(static_cast<std::size_t>(group.ranks));
    require(gather(&group, "", all.data(), 1) == 0, "barrier: a rank is lost");
}

// ---- GPU memory, by the driver that every machine with a GPU has -----------------------------------------------------------------

struct Driver {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    template <class... Arguments> void call(const char *name, Arguments... arguments) const {
        void *function = library == nullptr ? nullptr : dlsym(library, name);
        require(function != nullptr, std::string("there is no libcuda.so.1 with ") + name);
        const int error = reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
        require(error == 0, std::string(name) + " returned " + std::to_string(error));
    }
    // Makes one of the GPUs this thread's, and returns its number.
    int32_t use(std::int64_t rank) const {
        int count = 0, device = 0;
        void *used = nullptr;
        call("cuInit", 0U);
        call("cuDeviceGetCount", &count);
        call("cuDeviceGet", &device, static_cast<int>(rank % count));
        call("cuDevicePrimaryCtxRetain", &used, device);
        call("cuCtxSetCurrent", used);
        return device;
    }
    template <class Value> Value *make(const std::vector<Value> &values) const {
        unsigned long long address = 0;
        call("cuMemAlloc_v2", &address, values.size() * sizeof(Value));
        call("cuMemcpyHtoD_v2", address, static_cast<const void *>(values.data()), values.size() * sizeof(Value));
        return reinterpret_cast<Value *>(address);
    }
    template <class Value> std::vector<Value> read(const Value *memory, std::int64_t size) const {
        std::vector<Value> values(static_cast<std::size_t>(size));
        const auto address = reinterpret_cast<unsigned long long>(memory);
        call("cuMemcpyDtoH_v2", static_cast<void *>(values.data()), address, values.size() * sizeof(Value));
        return values;
    }
};

// ---- one rank --------------------------------------------------------------------------------------------------------------------

struct Asked {
    bool gpu;
    std::string scenario;  // "plain", "counts": the last rank wants another n_counts, "dies": the last rank ends in its second gather
};

lplb_config planner_config(const Group &group, int32_t device, std::vector<int32_t> &r2o) {
    for (std::int64_t rank = 0; rank < group.ranks; rank++) r2o.push_back(static_cast<int32_t>((rank + 1) % group.ranks));
    lplb_config config = LPLB_CONFIG_INIT;
    config.device = device, config.rank = group.rank, config.ep_size = group.ranks, config.n_nodes = 1;
    config.n_logical = group.ranks * experts_per_rank, config.n_physical = config.n_logical + group.ranks;
    config.n_redundant = 1, config.r2o = r2o.data();
    return config;
}

std::vector<int32_t> routed(const Group &group, std::int64_t n_logical) {
    std::mt19937 random(static_cast<unsigned>(group.rank));
    std::geometric_distribution<int32_t> skewed(0.1);
    std::vector<int32_t> ids(n_ids);
    for (auto &id : ids) id = static_cast<int32_t>(skewed(random) % n_logical);
    return ids;
}

void check_plan(const Group &group, lplb_planner *planner) {
    lplb_group_info info;
    require(lplb_planner_info(planner, nullptr, &info, 1, nullptr) == LPLB_OK, lplb_planner_error(planner));
    require(info.total == group.ranks * n_ids, "the plan is not that of all ranks' tokens");
    require(info.certified && info.max_load == info.bound, "the plan is not proven");
}

// On the CPU: the rows travel by the caller's own means.
void plan_by_sockets(Group &group) {
    std::vector<int32_t> r2o, ids;
    const lplb_config config = planner_config(group, LPLB_DEVICE_CPU, r2o);
    lplb_planner *planner = nullptr;
    char message[256];
    require(lplb_planner_create(&config, &planner, message, sizeof message) == LPLB_OK, message);
    ids = routed(group, config.n_logical);
    const std::int64_t width = lplb_counts_width(config.n_logical);
    std::vector<int32_t> row(static_cast<std::size_t>(width)), rows(static_cast<std::size_t>(group.ranks * width)), out(ids.size());
    require(lplb_planner_count_row(planner, ids.data(), LPLB_INT32, n_ids, row.data(), nullptr) == LPLB_OK, lplb_planner_error(planner));
    require(gather(&group, row.data(), rows.data(), width * 4) == 0, "a rank is lost");
    require(lplb_planner_run(planner, ids.data(), LPLB_INT32, n_ids, rows.data(), out.data(), nullptr, LPLB_INT64, 0, nullptr) == LPLB_OK,
            lplb_planner_error(planner));
    check_plan(group, planner);
    lplb_planner_destroy(planner);
}

// On a GPU: what the exchange brings equals what the socket pairs bring, and a planner plans with it.
void use(Group &group, const Driver &driver, int32_t device, lplb_exchange *exchange, std::int64_t width) {
    std::mt19937 random(static_cast<unsigned>(100 + group.rank));
    for (int call = 0; call < 50; call++) {
        std::vector<int32_t> row(static_cast<std::size_t>(width)), rows(static_cast<std::size_t>(group.ranks * width));
        for (auto &count : row) count = static_cast<int32_t>(random());
        const int32_t *counts = driver.make(row);
        int32_t *gathered = driver.make(rows);
        require(lplb_exchange_all_gather(exchange, counts, gathered, nullptr) == LPLB_OK, lplb_exchange_error(exchange));
        require(gather(&group, row.data(), rows.data(), width * 4) == 0, "a rank is lost");
        require(driver.read(gathered, group.ranks * width) == rows, "the exchange brought other rows than the socket pairs");
    }
    std::vector<int32_t> r2o;
    const lplb_config config = planner_config(group, device, r2o);
    lplb_planner *planner = nullptr;
    char message[256];
    require(lplb_planner_create(&config, &planner, message, sizeof message) == LPLB_OK, message);
    require(lplb_planner_attach_exchange(planner, exchange) == LPLB_OK, lplb_planner_error(planner));
    int32_t *ids = driver.make(routed(group, config.n_logical));
    require(lplb_planner_run(planner, ids, LPLB_INT32, n_ids, nullptr, ids, nullptr, LPLB_INT64, 0, nullptr) == LPLB_OK,
            lplb_planner_error(planner));
    check_plan(group, planner);
    barrier(group);
    lplb_exchange_close(exchange);
    barrier(group);
    lplb_exchange_destroy(exchange);
    lplb_planner_destroy(planner);
}

// The exchange by hand: memory that the caller has mapped itself (here one rank's own) instead of CUDA IPC.
void use_mapped_memory(const Driver &driver, int32_t device) {
    lplb_exchange_config config = LPLB_EXCHANGE_CONFIG_INIT;
    config.device = device, config.n_ranks = 1, config.n_counts = 33;
    std::int64_t bytes = 0;
    char message[256] = "";
    require(lplb_exchange_buffer_bytes(&config, &bytes, message, sizeof message) == LPLB_OK, message);
    void *buffer = driver.make(std::vector<char>(static_cast<std::size_t>(bytes)));
    lplb_exchange *exchange = nullptr;
    require(lplb_exchange_create(&config, &buffer, &exchange, message, sizeof message) == LPLB_OK, message);
    std::vector<int32_t> row(33);
    for (std::size_t i = 0; i < row.size(); i++) row[i] = static_cast<int32_t>(i) - 5;
    int32_t *gathered = driver.make(std::vector<int32_t>(row.size()));
    require(lplb_exchange_all_gather(exchange, driver.make(row), gathered, nullptr) == LPLB_OK, lplb_exchange_error(exchange));
    require(driver.read(gathered, 33) == row, "the exchange over mapped memory brought other counts");
    lplb_exchange_destroy(exchange);
}

// What connecting gave, in words.
std::string rank_part(Group &group, const Asked &asked) {
    Driver driver;
    const int32_t device = asked.gpu ? driver.use(group.rank) : LPLB_DEVICE_CPU;
    if (asked.gpu && asked.scenario == "plain") use_mapped_memory(driver, device);
    const bool last = group.rank == group.ranks - 1;
    std::vector<int32_t> r2o;
    const lplb_config planner = planner_config(group, device, r2o);
    char message[512] = "";
    lplb_agree_config same = LPLB_AGREE_CONFIG_INIT;
    same.planner = &planner, same.n_ranks = group.ranks, same.rank = group.rank, same.gather = gather, same.context = &group;
    lplb_agreement agreed;
    agreed.struct_size = sizeof agreed;
    require(lplb_agree(&same, &agreed, message, sizeof message) == LPLB_OK, message);
    require(agreed.n_hosts == 1 && agreed.all_cuda == (asked.gpu ? 1 : 0), "lplb_agree: this is one host");

    lplb_connect_config config = LPLB_CONNECT_CONFIG_INIT;
    config.device = device, config.policy = LPLB_EXCHANGE_REPORT, config.n_ranks = group.ranks, config.rank = group.rank;
    config.n_counts = lplb_counts_width(planner.n_logical) + (last && asked.scenario == "counts" ? 1 : 0);
    config.n_nodes = agreed.n_nodes, config.timeout_ms = 10000, config.gather = gather, config.context = &group;
    if (last && asked.scenario == "dies") group.calls_until_death = asked.gpu ? 2 : 0;
    lplb_exchange *exchange = nullptr;
    const lplb_status status = lplb_exchange_connect(&config, &exchange, message, sizeof message);
    if (status == LPLB_ERROR_PEER_LOST) lplb_exchange_destroy(exchange);  // in this test the peer that is lost is gone
    else require((status == LPLB_OK) == (exchange != nullptr), "lplb_exchange_connect: an exchange and LPLB_OK come together");
    if (status == LPLB_OK) use(group, driver, device, exchange, config.n_counts);
    else if (asked.scenario == "plain") plan_by_sockets(group);
    return std::to_string(status) + " " + (status == LPLB_OK ? "" : message);
}

// ---- all of them -----------------------------------------------------------------------------------------------------------------

std::vector<std::string> run(std::int64_t ranks, const Asked &asked) {
    std::vector<std::vector<int>> pairs, results;
    for (std::int64_t rank = 0; rank < 2 * ranks; rank++) {
        int ends[2];
        require(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair failed");
        (rank < ranks ? pairs : results).push_back({ends[0], ends[1]});
    }
    std::vector<pid_t> children;
    for (std::int64_t rank = 0; rank < ranks; rank++) {
        const pid_t child = fork();
        require(child >= 0, "fork failed");
        if (child != 0) {
            children.push_back(child);
            continue;
        }
        signal(SIGPIPE, SIG_IGN);
        alarm(120);  // nobody waits for ever
        Group group{ranks, rank, {}};
        for (std::size_t other = 0; other < pairs.size(); other++) {  // ends that stay open elsewhere would hide a rank that dies
            const bool mine = static_cast<std::int64_t>(other) == rank;
            if (rank == 0) group.sockets.push_back(pairs[other][0]), close(pairs[other][1]);
            else if (mine) group.sockets.push_back(pairs[other][1]), close(pairs[other][0]);
            else close(pairs[other][0]), close(pairs[other][1]);
        }
        std::string words;
        try {
            words = rank_part(group, asked);
        } catch (const std::exception &error) {
            words = std::string("failed: ") + error.what();
        }
        send_all(results[static_cast<std::size_t>(rank)][1], words.data(), static_cast<std::int64_t>(words.size()));
        _exit(0);
    }
    for (const auto &pair : pairs) close(pair[0]), close(pair[1]);
    std::vector<std::string> outcomes;
    for (auto &result : results) {
        close(result[1]);
        std::string words;
        char part[256];
        for (ssize_t n; (n = read(result[0], part, sizeof part)) > 0;) words.append(part, static_cast<std::size_t>(n));
        outcomes.push_back(words);
        close(result[0]);
    }
    for (const pid_t child : children) waitpid(child, nullptr, 0);
    return outcomes;
}

void expect(const std::string &scenario, const std::vector<std::string> &outcomes, const std::string &begins, bool last_dies = false) {
    for (std::size_t rank = 0; rank < outcomes.size(); rank++) {
        std::printf("%s, rank %zu: %s\n", scenario.c_str(), rank, outcomes[rank].c_str());
        const bool dead = last_dies && rank + 1 == outcomes.size();
        require(dead ? outcomes[rank].empty() : outcomes[rank].rfind(begins, 0) == 0, scenario + ": expected '" + begins + "'");
        require(dead || last_dies || outcomes[rank] == outcomes[0], scenario + ": ranks were told different words");
    }
}

}  // namespace

int main(int argc, char **argv) {
    const bool gpu = argc > 1 && std::strcmp(argv[1], "gpu") == 0;
    const char *given = argc > 1 + gpu ? argv[1 + gpu] : nullptr;
    const std::int64_t ranks = given == nullptr ? (gpu ? 2 : 4) : std::atoll(given);
    try {
        require(ranks >= 2 && ranks <= 8, "connect: 2 to 8 ranks");
        expect("plain", run(ranks, {gpu, "plain"}), gpu ? "0 " : "2 NVLink joins GPUs, and ranks 0, 1");
        expect("other counts", run(ranks, {gpu, "counts"}), "10 n_counts: must be equal on all ranks, got ");
        expect("a rank dies", run(ranks, {gpu, "dies"}), "11 gather: must bring", true);
        return 0;
    } catch (const std::exception &error) {
        std::printf("connect: %s\n", error.what());
        return 1;
    }
}
