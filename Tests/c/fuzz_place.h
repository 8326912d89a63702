/* lplb_place with whatever sizes, ranks and placements before; what it writes is whole, within its arrays and within the budget. */
#ifndef LPLB_TESTS_FUZZ_PLACE_H
#define LPLB_TESTS_FUZZ_PLACE_H

enum { MOST_EXPERTS = 64 };

/* How many experts of a layer stand on ranks that did not hold them before, and how many of these no rank held that is still alive. */
static int64_t moved(const int32_t *now, const int32_t *before, const int64_t *slots, int64_t ranks, int64_t width, int64_t logical,
                     int64_t *lost) {
    int64_t moves = 0;
    unsigned char kept[MOST_EXPERTS] = {0};
    for (int64_t rank = 0; rank < ranks; rank++) {
        unsigned char held[MOST_EXPERTS] = {0}, holds[MOST_EXPERTS] = {0};
        int64_t room = slots[rank];
        for (int64_t i = 0; i < width; i++) {
            const int32_t e = before[rank * width + i];
            if (e < 0) continue;
            held[e] = 1;
            if (room-- > 0) kept[e] = 1;
        }
        for (int64_t i = 0; i < width; i++) {
            const int32_t e = now[rank * width + i];
            if (e >= 0 && !holds[e]++ && !held[e]) moves++;
        }
    }
    for (int64_t e = 0; e < logical; e++) *lost += !kept[e];
    return moves;
}

static void placements(void) {
    const int64_t ranks = chance(8) ? 1 : 1 + below(12), experts = chance(8) ? 1 : 1 + below(MOST_EXPERTS), layers = below(4);
    const int64_t snapshots = 1 + below(3);
    const int64_t width = (experts + ranks - 1) / ranks + below(4), size = ranks * width;
    int64_t *slots = make(ranks, 8), total = 0;
    for (int64_t rank = 0; rank < ranks; rank++) total += slots[rank] = chance(3) ? below(width + 1) : width;
    while (total < experts) { /* fill up the ranks from a random one on */
        const int64_t rank = below(ranks);
        total += width - slots[rank];
        slots[rank] = width;
    }
    double *history = make(snapshots * layers * experts, sizeof *history);
    const int kind = (int)below(6);
    const double least = 5e-324, most = 1.7e308;
    for (int64_t i = 0; i < snapshots * layers * experts; i++)
        history[i] = kind == 0 ? 0 : kind == 1 ? 1 : kind == 2 ? (double)(i % experts == 0) : kind == 3 ? (double)below(1000) * least
                     : kind == 4 ? (chance(2) ? most : least) : (double)below(1 + below(100000));
    int32_t *previous = chance(2) ? NULL : make(layers * size, 4), *phy2log = make(layers * size, 4);
    for (int64_t i = 0; previous != NULL && i < layers * size; i++) /* what dead ranks held, duplicates, missing experts and empty slots */
        previous[i] = (int32_t)(below(experts + 1 + below(3)) - 1) % (int32_t)experts;
    lplb_place_report *reports = chance(4) ? NULL : make(layers, sizeof *reports);

    const lplb_place_config fresh = LPLB_PLACE_CONFIG_INIT;
    lplb_place_config *config = make(1, sizeof *config);
    *config = fresh;
    config->policy = (int32_t)below(4);
    config->n_snapshots = snapshots == 1 && chance(2) ? 0 : snapshots;
    config->n_layers = layers, config->n_logical = experts, config->n_ranks = ranks, config->n_slots = width;
    config->slots = slots;
    config->previous = previous;
    config->n_nodes = chance(2) ? 0 : 1;
    config->max_moves = previous == NULL || chance(3) ? -below(2) : chance(4) ? LPLB_PLACE_KEEP : chance(4) ? INT64_MAX : 1 + below(40);
    config->even_homes = chance(4);
    config->tolerance = chance(2) ? 0 : chance(2) ? -1e300 : (double)below(100) / 100;
    int expected = OK;
    if (config->policy == LPLB_PLACE_DEEPSEEK && total < size) expected = FAILS;
    if (config->policy == LPLB_PLACE_DEEPSEEK && config->max_moves != 0 && config->max_moves != -1) expected = FAILS;
    if (config->policy == LPLB_PLACE_REPAIR && previous == NULL) expected = FAILS;
    if (config->even_homes && layers > 0) expected = expected == OK ? ANY : expected; /* the words say where it cannot be */
    if (chance(4)) config->n_nodes = 1 + below(ranks), config->n_groups = 1 + below(experts), expected = expected == OK ? ANY : expected;
    const double wrong_numbers[] = {(double)NAN, (double)INFINITY, -(double)INFINITY};
    const lplb_place_config *passed = config;
    const double *loads = history;
    switch (chance(2) ? 0 : 1 + below(23)) {
        case 1: config->struct_size = wrong_size(fresh.struct_size), expected = FAILS; break;
        case 2: passed = NULL, expected = FAILS; break;
        case 3: config->policy = chance(2) ? 4 + (int32_t)below(1000) : -1 - (int32_t)below(1000), expected = FAILS; break;
        case 4: config->n_snapshots = chance(2) ? -1 - below(9) : wrong(-1) | INT64_MIN, expected = FAILS; break;
        case 5: config->n_snapshots = INT64_MAX - below(9), expected = FAILS; break;
        case 6: config->n_layers = chance(2) ? -1 - below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 7: config->n_logical = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 8: config->n_ranks = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 9: config->n_slots = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 10: config->n_slots = LPLB_MAX_PHYSICAL / ranks + 1, config->slots = NULL, config->previous = NULL, expected = FAILS; break;
        case 11: slots[below(ranks)] = chance(2) ? width + 1 : chance(2) ? INT64_MAX : INT64_MIN, expected = FAILS; break;
        case 12: memset(slots, 0, (size_t)ranks * 8), expected = FAILS; break;
        case 13: config->n_nodes = chance(2) ? ranks + 1 : chance(2) ? INT64_MAX : INT64_MIN, expected = FAILS; break;
        case 14: config->n_groups = chance(2) ? experts + 1 : chance(2) ? INT64_MAX : INT64_MIN, expected = FAILS; break;
        case 15: config->max_moves = chance(2) ? INT64_MIN : -3, expected = FAILS; break;
        case 16: config->tolerance = wrong_numbers[below(3)], expected = FAILS; break;
        case 17: if (layers > 0) phy2log = NULL, expected = FAILS; break;
        case 18: if (layers > 0) loads = NULL, expected = FAILS; break;
        case 19: if (layers > 0) history[below(layers * experts)] = chance(2) ? -1 : wrong_numbers[below(3)], expected = FAILS; break;
        case 20:
            if (layers > 0 && previous != NULL) previous[below(layers * size)] = (int32_t)(chance(2) ? experts : -2), expected = FAILS;
            break;
        case 21: /* addresses that no array begins at */
            switch (below(layers > 0 ? 4 : 1)) {
                case 0: config->slots = (const int64_t *)((uintptr_t)make(ranks + 1, 8) + 4); break;
                case 1: loads = (const double *)((uintptr_t)loads + 4); break;
                case 2: phy2log = (int32_t *)((uintptr_t)phy2log + 2); break;
                default: config->previous = (const int32_t *)((uintptr_t)make(layers * size + 1, 4) + 1); break;
            }
            expected = FAILS;
            break;
        case 22: config->previous = NULL, config->max_moves = LPLB_PLACE_KEEP, expected = FAILS; break;
        case 23: config->even_homes = chance(2) ? 2 : INT32_MIN, expected = FAILS; break;
        default: break;
    }
    memset(message, 'x', sizeof message);
    const lplb_status status = lplb_place(passed, loads, phy2log, reports, message, sizeof message);
    check("lplb_place", status, expected, message);
    int64_t moves = 0, lost = 0;
    for (int64_t layer = 0; status == LPLB_OK && layer < layers; layer++) {
        const int32_t *now = phy2log + layer * size;
        unsigned char placed[MOST_EXPERTS] = {0};
        for (int64_t i = 0; i < size; i++) {
            if (now[i] < -1 || now[i] >= experts || (i % width >= slots[i / width] && now[i] >= 0)) fail("lplb_place: slot %" PRId64, i);
            if (now[i] >= 0) placed[now[i]] = 1;
        }
        if (memchr(placed, 0, (size_t)experts) != NULL) fail("lplb_place left an expert out");
        if (config->previous == NULL) continue;
        const int64_t here = moved(now, previous + layer * size, slots, ranks, width, experts, &lost);
        if (reports != NULL && reports[layer].moves != here) fail("lplb_place counts %" PRId64 " moves", reports[layer].moves);
        moves += here;
    }
    const int64_t budget = config->max_moves == LPLB_PLACE_KEEP ? 0 : config->max_moves;
    if (status == LPLB_OK && config->previous != NULL && (budget > 0 || config->max_moves == LPLB_PLACE_KEEP))
        if (moves > (budget > lost ? budget : lost))
            fail("lplb_place made %" PRId64 " moves of %" PRId64 ", with %" PRId64 " experts lost", moves, budget, lost);
    drop("lplb_place");
}

/* One layer's homes, pulls and pushes against its slots. */
static void check_copies(const int32_t *slots, const int32_t *homes, const int64_t *pulls, const int64_t *pushes, int64_t ranks, int64_t width,
                         int64_t experts) {
    int64_t in = 0, out = 0, copies = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (homes[e] < 0 || homes[e] >= ranks * width || slots[homes[e]] != e) fail("lplb_placement_judge: home of expert %" PRId64, e);
        for (int64_t rank = 0; rank < ranks; rank++) {
            int held = 0;
            for (int64_t i = 0; i < width; i++) held |= slots[rank * width + i] == e;
            copies += held && rank != homes[e] / width;
        }
    }
    for (int64_t rank = 0; rank < ranks; rank++) {
        if (pulls[rank] < 0 || pulls[rank] > width || pushes[rank] < 0) fail("lplb_placement_judge: copies of rank %" PRId64, rank);
        in += pulls[rank], out += pushes[rank];
    }
    if (in != copies || out != copies) fail("lplb_placement_judge counts %" PRId64 " pulls and %" PRId64 " pushes of %" PRId64, in, out, copies);
}

/* lplb_placement_judge with whatever placement, results that are not wanted and arguments that are wrong; an error writes nothing. */
static void judgement(void) {
    const int64_t ranks = 1 + below(9), experts = chance(8) ? 1 : 1 + below(MOST_EXPERTS), layers = below(4), snapshots = 1 + below(2);
    const int64_t width = (experts + ranks - 1) / ranks + below(4), size = ranks * width, entries = snapshots * layers * experts;
    int32_t *phy2log = make(layers * size, 4);
    for (int64_t i = 0; i < layers * size; i++) phy2log[i] = (int32_t)(below(experts + 1) - 1);
    for (int64_t i = 0; i < layers * experts; i++) phy2log[i / experts * size + i % experts] = (int32_t)(i % experts);
    double *history = make(entries, sizeof *history);
    for (int64_t i = 0; i < entries; i++) history[i] = chance(9) ? 1.7e308 : chance(9) ? 5e-324 : (double)below(1000);
    lplb_placement_report *report = make(1, sizeof *report);
    const lplb_placement_report fresh = LPLB_PLACEMENT_REPORT_INIT;
    *report = fresh;
    report->n_snapshots = snapshots == 1 && chance(2) ? 0 : snapshots;
    report->n_layers = layers, report->n_logical = experts, report->n_ranks = ranks, report->n_slots = width;
    report->n_nodes = chance(2) ? below(2) : ranks;
    report->phy2log = phy2log, report->history = history;
    /* all results as one block each, of which a copy is kept */
    const int64_t bytes[] = {layers * 8, layers * 8, layers * 8, layers * experts * 4, layers * ranks * 8, layers * ranks * 8, layers * 8,
                             layers * 8, layers * ranks * 8};
    unsigned char *results[9], *kept = make(9 * layers * (experts + ranks) * 8, 1);
    for (int i = 0; i < 9; i++) {
        results[i] = chance(4) ? NULL : make(bytes[i], 1);
        if (results[i] != NULL) memcpy(kept + i * layers * (experts + ranks) * 8, results[i], (size_t)bytes[i]);
    }
    report->even_balance = (double *)results[0], report->exact_balance = (double *)results[1], report->duplicates = (int64_t *)results[2];
    report->homes = (int32_t *)results[3], report->pulls = (int64_t *)results[4], report->pushes = (int64_t *)results[5];
    report->leaves_rank = (double *)results[6], report->leaves_node = (double *)results[7], report->inbound = (double *)results[8];
    const int needs_history = results[0] || results[1] || results[6] || results[7] || results[8];
    int expected = OK;
    const lplb_placement_report *passed = report;
    switch (chance(2) ? 0 : 1 + below(13)) {
        case 1: report->struct_size = wrong_size(fresh.struct_size), expected = FAILS; break;
        case 2: passed = NULL, expected = FAILS; break;
        case 3: report->n_snapshots = chance(2) ? -1 - below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 4: report->n_layers = chance(2) ? -1 - below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 5: report->n_logical = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 6: report->n_ranks = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 7: report->n_slots = chance(2) ? -below(9) : INT64_MAX - below(9), expected = FAILS; break;
        case 8: report->n_nodes = chance(2) ? ranks + 1 : chance(2) ? INT64_MAX : INT64_MIN, expected = FAILS; break;
        case 9: report->history = NULL, expected = needs_history ? FAILS : OK; break;
        case 10: if (layers > 0) report->phy2log = NULL, expected = FAILS; break;
        case 11: if (layers > 0) phy2log[below(layers * size)] = (int32_t)(chance(2) ? experts : -2), expected = FAILS; break;
        case 12: if (layers > 0) history[below(layers * experts)] = chance(2) ? -1 : (double)NAN, expected = FAILS; break;
        case 13: report->inbound = (double *)((uintptr_t)make(layers * ranks + 1, 8) + 4), expected = FAILS; break;
        default: break;
    }
    memset(message, 'x', sizeof message);
    const lplb_status status = lplb_placement_judge(passed, message, sizeof message);
    check("lplb_placement_judge", status, expected, message);
    for (int i = 0; i < 9; i++)
        if (status != LPLB_OK && results[i] && memcmp(results[i], kept + i * layers * (experts + ranks) * 8, (size_t)bytes[i]) != 0)
            fail("lplb_placement_judge failed and wrote result %d", i);
    for (int64_t layer = 0; status == LPLB_OK && layer < layers; layer++) {
        if (results[3] && results[4] && results[5])
            check_copies(phy2log + layer * size, report->homes + layer * experts, report->pulls + layer * ranks, report->pushes + layer * ranks,
                         ranks, width, experts);
        if (results[6] && results[7] && !(0 <= report->leaves_node[layer] && report->leaves_node[layer] <= report->leaves_rank[layer]
                                          && report->leaves_rank[layer] <= 1)) fail("lplb_placement_judge: shares");
    }
    drop("lplb_placement_judge");
}

#endif
