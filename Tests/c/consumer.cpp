// A C++ caller: a placement made from history by EPLB, then one exact split of new loads over it, with the proof checked by hand.
#include "planner.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t ranks = 8, experts = 32, slots = 48;

int run() {
    std::mt19937_64 random(7);
    std::exponential_distribution<float> history(0.01F);
    std::vector<float> weight(experts);
    std::generate(weight.begin(), weight.end(), [&] { return history(random); });

    std::string message(256, '\0');
    const auto size = static_cast<std::int64_t>(message.size());
    std::vector<std::int64_t> placed(slots);
    check(lplb_eplb_rebalance(weight.data(), 1, experts, slots, 1, 1, ranks, placed.data(), nullptr, nullptr, message.data(), size),
          message.c_str());
    const std::vector<std::int32_t> phy2log(placed.begin(), placed.end());

    lplb_config config = LPLB_CONFIG_INIT;
    config.ep_size = ranks;
    config.n_logical = experts;
    config.n_physical = slots;
    Planner planner(config);
    planner.set_placement(phy2log);

    std::vector<std::int64_t> counts(experts), again(slots);
    for (std::int64_t e = 0; e < experts; e++) counts[e] = static_cast<std::int64_t>(weight[e]) + static_cast<std::int64_t>(random() % 100);
    planner.solve(counts);
    const std::vector<std::int64_t> tokens = planner.split();
    const lplb_group_info info = planner.groups().at(0);

    // The split serves every token, its busiest rank has max_load, and the experts that live inside the witness alone force that much.
    std::vector<std::int64_t> served(experts), load(ranks);
    std::vector<bool> inside(experts, true);
    std::int64_t members = 0, forced = 0;
    for (std::int64_t p = 0; p < slots; p++) {
        const std::int64_t rank = p / (slots / ranks);
        served[phy2log[p]] += tokens[p];
        load[rank] += tokens[p];
        if (((info.witness[rank / 32] >> (rank % 32)) & 1U) == 0) inside[phy2log[p]] = false;
    }
    for (std::int64_t r = 0; r < ranks; r++) members += (info.witness[r / 32] >> (r % 32)) & 1U;
    for (std::int64_t e = 0; e < experts; e++) forced += inside[e] ? counts[e] : 0;
    const bool right = served == counts && *std::max_element(load.begin(), load.end()) == info.max_load && members == info.witness_size &&
                       members > 0 && (forced + members - 1) / members == info.bound && info.bound == info.max_load && info.certified == 1;

    // The one-off call gives the same bits.
    check(lplb_solve(counts.data(), experts, phy2log.data(), slots, ranks, again.data(), nullptr, message.data(), size), message.c_str());
    std::printf("busiest %lld, bound %lld by %lld ranks: %s\n", static_cast<long long>(info.max_load), static_cast<long long>(info.bound),
                static_cast<long long>(members), right && again == tokens ? "checked" : "WRONG");

    // Ids by the same placement: each token goes to a slot of its expert.
    const std::vector<std::int64_t> ids = {0, 5, 5, 31, 7, 5};
    const std::vector<std::int64_t> where = planner.run(ids);
    bool found = where.size() == ids.size();
    for (std::size_t i = 0; i < ids.size(); i++) found = found && phy2log.at(static_cast<std::size_t>(where[i])) == ids[i];

    // What is wrong comes as an exception with the library's words.
    try {
        planner.set_placement({0, 1});
        found = false;
    } catch (const Error &error) {
        found = found && error.status == LPLB_ERROR_INVALID_ARGUMENT && std::string(error.what()).find("n_physical") == 0;
        std::printf("refused: %s\n", error.what());
    }
    return right && found && again == tokens ? 0 : 1;
}

}  // namespace

int main() {
    try {
        return run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
