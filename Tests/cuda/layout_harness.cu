// Layouts of dispatches on the device against plain sorting, for every rank of random placements and topologies: each rank must know what
// all the others send to it. Arguments: how many instances, the first one's number. See harness.h for building and sanitizers.
#include "harness.h"

using namespace harness;

static int wrong = 0;

static void expect(bool right, int number, const char *what) {
    if (right) return;
    if (++wrong <= 20) printf("instance %d: %s is wrong\n", number, what);
}

// One placement, the counts of all ranks, and the rows that the slots have.
struct Batch {
    int ranks, n_logical, n_rows;
    vector<reference::Instance> of_rank;
    vector<int64_t> counts;       // [ranks][n_logical]
    vector<reference::Plan> plans;
    vector<int64_t> row_of_slot;

    Batch(Random &random, int number) {
        const int groups = 1 + random() % 2, group_size = vector<int>{1, 2, 3, 4, 8, 16}[random() % 6];
        ranks = groups * group_size;
        int nodes = 1 + random() % ranks;
        while (ranks % nodes) --nodes;
        const int columns = 1 + random() % 2, of_each = 1 + random() % 2;
        const auto r2o = random_columns(random, group_size, columns);
        const bool by_topology = random() % 3 == 0;
        n_logical = by_topology ? ranks * (columns * of_each + random() % 3) : groups * group_size * (1 + random() % 6);
        const auto phy2log = random_placement(random, n_logical, n_logical + ranks * (random() % 4), groups);
        vector<int> order(n_logical);
        std::iota(order.begin(), order.end(), 0);
        counts.resize((size_t)ranks * n_logical);
        const int most = 1 + random() % (number % 10 == 9 ? 900 : 60), hot = number % 3 == 0 ? 1 + random() % n_logical : n_logical;
        for (size_t i = 0; i < counts.size(); ++i) counts[i] = (int)(i % n_logical) < hot && random() % 3 ? random() % most : 0;
        for (int rank = 0; rank < ranks; ++rank) {
            of_rank.push_back(by_topology ? reference::topology(ranks, group_size, columns, r2o, n_logical, of_each, nodes, rank, order)
                                          : reference::general(ranks, group_size, nodes, rank, n_logical, phy2log));
            plans.push_back(reference::solve(of_rank[rank], counts, ranks));
        }
        n_rows = n_local() + random() % 4;
        const bool shared = random() % 2;
        for (int slot = 0; slot < ranks * n_local(); ++slot) row_of_slot.push_back(shared ? random() % n_rows : slot % n_local());
    }
    int n_local() const { return of_rank[0].n_local(); }
    int n_physical() const { return ranks * n_local(); }
};

// The slots that a rank's choices go to by its plan, in any order, some without an expert and some out of range.
static vector<int64_t> choices(Random &random, const Batch &batch, int rank, int bad) {
    vector<int64_t> ids(random() % 50, -1);
    for (int i = 0; i < bad; ++i) ids.push_back(i % 2 ? batch.n_physical() + i : -2 - i);
    for (int slot = 0; slot < batch.n_physical(); ++slot) ids.insert(ids.end(), batch.plans[rank].take[slot], slot);
    std::shuffle(ids.begin(), ids.end(), random);
    return ids;
}

static vector<int64_t> stable_order(const vector<int> &keys) {
    vector<int64_t> order(keys.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    return order;
}

static void check_rank(Random &random, const Batch &batch, int rank, int number) {
    const int ranks = batch.ranks, n_rows = batch.n_rows, n_keys = ranks * n_rows, n_local = batch.n_local();
    const int bad = number % 7 == 0 ? random() % 5 : 0, wide = random() % 2, wide_rows = random() % 2;
    const auto ids = choices(random, batch, rank, bad);
    const auto narrow = [](const vector<int64_t> &values) { return vector<int32_t>(values.begin(), values.end()); };

    // By plain sorting.
    vector<int> keys, rows, sent(n_keys), received(n_keys);
    for (int64_t id : ids) {
        const bool valid = id >= 0 && id < batch.n_physical();
        keys.push_back(valid ? id / n_local * n_rows + batch.row_of_slot[id] : n_keys);
        if (valid) ++sent[keys.back()];
    }
    for (int source = 0; source < ranks; ++source) {
        for (int slot = rank * n_local; slot < (rank + 1) * n_local; ++slot) {
            received[source * n_rows + batch.row_of_slot[slot]] += batch.plans[source].take[slot];
        }
        for (int row = 0; row < n_rows; ++row) rows.insert(rows.end(), received[source * n_rows + row], row);
    }
    auto by_row = stable_order(rows);
    for (int i = 0; i < 7; ++i) by_row.push_back(by_row.size());
    vector<int32_t> numbers(LPLBK_LAYOUT_RANKS + 2 * ranks + n_rows), ends(n_rows);
    numbers[0] = bad > 0 ? LPLBK_LAYOUT_BAD_IDS : 0;
    numbers[2] = bad;
    for (int i = 0; i < n_keys; ++i) {
        numbers[4] += sent[i], numbers[5] += received[i];
        numbers[LPLBK_LAYOUT_RANKS + i / n_rows] += sent[i];
        numbers[LPLBK_LAYOUT_RANKS + ranks + i / n_rows] += received[i];
        numbers[LPLBK_LAYOUT_RANKS + 2 * ranks + i % n_rows] += received[i];
    }
    std::partial_sum(numbers.end() - n_rows, numbers.end(), ends.begin());

    // On the device.
    Planner planner(batch.of_rank[rank]);
    Buffer<int64_t> counts(batch.counts), ids64(ids), rows64(batch.row_of_slot), order(ids.size()), gathered(by_row.size());
    Buffer<int32_t> ids32(narrow(ids)), rows32(narrow(batch.row_of_slot)), to(n_keys), come(n_keys), device_ends(n_rows),
        device_numbers(numbers.size());
    CHECK(lplbk_solve(&planner.p, counts.data, 1, ranks, nullptr, nullptr, nullptr, 0, nullptr));
    lplbk_dispatch layout{};
    layout.ids = wide ? (void *)ids64.data : (void *)ids32.data;
    layout.row_of_slot = wide_rows ? (void *)rows64.data : (void *)rows32.data;
    layout.n_ids = ids.size(), layout.n_rows = n_rows, layout.ids64 = wide, layout.row64 = wide_rows;
    layout.sends = layout.receives = layout.gathers = layout.planned = 1;
    layout.order = order.data, layout.sent = to.data, layout.received = come.data, layout.ends = device_ends.data;
    layout.numbers = device_numbers.data, layout.by_row = gathered.data, layout.n_by_row = by_row.size();
    CHECK(lplbk_lay_out(&planner.p, &layout, nullptr));
    expect(order.get() == stable_order(keys), number, "order");
    expect(to.get() == sent, number, "sent");
    expect(come.get() == received, number, "received");
    expect(device_ends.get() == ends, number, "ends");
    expect(device_numbers.get() == numbers, number, "a number");
    expect(gathered.get() == by_row, number, "by_row");

    // Without one of the choices these are not the ids of the plan.
    const auto first = std::find_if(keys.begin(), keys.end(), [&](int key) { return key < n_keys; }) - keys.begin();
    if (first == (int64_t)keys.size()) return;
    auto others = ids;
    others[first] = -1;
    ids64.set(others);
    layout.ids = ids64.data, layout.ids64 = 1;
    CHECK(lplbk_lay_out(&planner.p, &layout, nullptr));
    expect((device_numbers.get()[0] & LPLBK_LAYOUT_OTHER_PLAN) != 0, number, "another plan's numbers[0]");
}

int main(int argc, char **argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 60, first = argc > 2 ? atoi(argv[2]) : 0;
    for (int number = first; number < first + n; ++number) {
        Random random(number);
        const Batch batch(random, number);
        for (int rank = 0; rank < batch.ranks; ++rank) check_rank(random, batch, rank, number);
    }
    printf("%d instances, %d wrong\n", n, wrong);
    return wrong != 0;
}
