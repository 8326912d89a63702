// A C++ class for lplb.h, to copy and extend: it owns a planner, takes and gives vectors, and throws what the library says.
//
//     lplb_config config = LPLB_CONFIG_INIT;
//     config.ep_size = 2, config.n_logical = 4, config.n_physical = 6;
//     Planner planner(config);
//     planner.set_placement({0, 1, 2, 3, 0, 1});
//     std::vector<std::int64_t> slots = planner.run({0, 0, 0, 0, 0, 1, 2, 3});
//     assert(planner.groups()[0].certified);
#pragma once
#include <lplb.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// A call has failed. status is an LPLB_ERROR_*, what() the library's words.
class Error : public std::runtime_error {
public:
    Error(lplb_status status, const std::string &words) : std::runtime_error(words), status(status) {}
    const lplb_status status;
};

inline void check(lplb_status status, const char *words) {
    if (status != LPLB_OK) throw Error(status, *words != '\0' ? words : lplb_status_string(status));
}

// Host vectors, so for planners on the CPU; on CUDA the same calls take device pointers and a stream. It can be moved and not copied.
class Planner {
public:
    explicit Planner(const lplb_config &config) : config_(config) {
        char words[512] = "";
        lplb_planner *made = nullptr;
        ::check(lplb_planner_create(&config, &made, words, sizeof words), words);
        planner_.reset(made);
        config_.r2o = nullptr;  // it was copied, and is the caller's
    }

    void set_placement(const std::vector<std::int32_t> &phy2log) {
        check(lplb_planner_set_placement(get(), phy2log.data(), static_cast<std::int64_t>(phy2log.size()), nullptr));
    }

    // The slots where the tokens of these experts go.
    std::vector<std::int64_t> run(const std::vector<std::int64_t> &ids) {
        std::vector<std::int64_t> slots(ids.size());
        const auto n = static_cast<std::int64_t>(ids.size());
        check(lplb_planner_run(get(), ids.data(), LPLB_INT64, n, nullptr, slots.data(), nullptr, LPLB_INT64, 0, nullptr));
        return slots;
    }

    // Plans counts [n_logical] of the whole batch; split() then says how many tokens of the plan each slot has.
    void solve(const std::vector<std::int64_t> &counts) {
        if (static_cast<std::int64_t>(counts.size()) != config_.n_logical) throw Error(LPLB_ERROR_INVALID_ARGUMENT, "counts: one an expert");
        check(lplb_planner_solve(get(), counts.data(), LPLB_INT64, 1, nullptr, nullptr, nullptr, LPLB_INT64, nullptr));
    }

    std::vector<std::int64_t> split() {
        std::vector<std::int64_t> tokens(static_cast<std::size_t>(config_.n_physical));
        check(lplb_planner_split(get(), tokens.data(), config_.n_physical, nullptr));
        return tokens;
    }

    std::vector<lplb_group_info> groups() {
        const std::int64_t n = config_.group_size == 0 ? 1 : config_.ep_size / config_.group_size;
        std::vector<lplb_group_info> found(static_cast<std::size_t>(n));
        check(lplb_planner_info(get(), nullptr, found.data(), n, nullptr));
        return found;
    }

    lplb_planner *get() const { return planner_.get(); }

private:
    void check(lplb_status status) const { ::check(status, lplb_planner_error(get())); }

    struct Destroy {
        void operator()(lplb_planner *planner) const { lplb_planner_destroy(planner); }
    };
    lplb_config config_;
    std::unique_ptr<lplb_planner, Destroy> planner_;
};
