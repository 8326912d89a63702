/* lplb_planner_layout with whatever ids, rows and arrays; what it writes stays within its arrays and is a permutation. */

static void check_permutation(const int64_t *order, int64_t n, const char *name) {
    unsigned char *seen = memset(make(n, 1), 0, (size_t)n);
    for (int64_t i = 0; i < n; i++)
        if (order[i] < 0 || order[i] >= n || seen[order[i]]++) fail("lplb_planner_layout: %s is no permutation at %" PRId64, name, i);
}

static void layout(subject *s) {
    const int64_t ranks = s->config.ep_size, n = chance(8) ? 0 : below(2000), keys = LPLB_MAX_LAYOUT_ROWS / ranks;
    const int has_table = chance(2), wide = chance(2), exchanged = chance(2);
    lplb_layout fresh = LPLB_LAYOUT_INIT, *given = make(1, sizeof *given);
    *given = fresh;
    given->n_rows = has_table || chance(2) ? s->n_local + below(3) : 0;
    if (has_table && chance(3)) given->n_rows = 1 + below(s->n_local);
    const int64_t rows = given->n_rows == 0 ? s->n_local : given->n_rows;
    given->ids_dtype = (lplb_dtype)below(2);
    given->row_dtype = wide ? LPLB_INT64 : LPLB_INT32;
    given->parts = (int32_t)below(8);
    given->exchanged = exchanged;
    given->n_ids = n;
    given->ids = make_ids(s, given->ids_dtype, n, chance(4));
    given->experts = chance(2) ? NULL : make_ids(s, given->ids_dtype, n, chance(4));
    if (has_table) {
        given->row_of_slot = make(s->config.n_physical, wide ? 8 : 4);
        for (int64_t p = 0; p < s->config.n_physical; p++) {
            const int64_t row = chance(16) ? wrong(0) : below(rows);
            if (wide) ((int64_t *)(uintptr_t)given->row_of_slot)[p] = row;
            else ((int32_t *)(uintptr_t)given->row_of_slot)[p] = (int32_t)row;
        }
    }
    given->order = make(n, 8);
    given->sent = make(ranks * rows, 4);
    given->received = make(ranks * rows, 4);
    const int sound = chance(2);
    for (int64_t i = 0; i < ranks * rows && sound; i++) given->received[i] = (int32_t)below(9);
    given->ends = make(rows, 4);
    given->numbers = make(LPLB_LAYOUT_RANKS + 2 * ranks + rows, 4);
    given->n_by_row = below(3000);
    given->by_row = make(given->n_by_row, 8);

    const int parts = given->parts == 0 ? LPLB_LAYOUT_SENT | LPLB_LAYOUT_RECEIVED : given->parts;
    const int sends = parts & LPLB_LAYOUT_SENT, receives = parts & LPLB_LAYOUT_RECEIVED, gathers = parts & LPLB_LAYOUT_BY_ROW;
    const lplb_layout *passed = given;
    int expected = s->has_placement ? OK : LPLB_ERROR_WRONG_ORDER;
    if (expected == OK && receives && !exchanged) {
        if (s->config.rank == LPLB_WHOLE_BATCH && ranks > 1) expected = FAILS;
        else if (!s->has_plan) expected = LPLB_ERROR_WRONG_ORDER;
    }
    switch (chance(2) ? 0 : 1 + below(12)) {
        case 1: given->struct_size = wrong_size(fresh.struct_size), expected = FAILS; break;
        case 2: passed = NULL, expected = FAILS; break;
        case 3: given->parts = chance(2) ? 8 + (int32_t)below(1000) : -1, expected = FAILS; break;
        case 4: given->exchanged = chance(2) ? 2 : -1, expected = FAILS; break;
        case 5: given->n_rows = chance(2) ? keys + 1 : -1 - below(1000), expected = FAILS; break;
        case 6: if (sends) given->ids_dtype = 2 + (lplb_dtype)below(1000), expected = FAILS; break;
        case 7: if (sends) given->n_ids = chance(2) ? -1 : INT64_C(1) << 40, expected = FAILS; break;
        case 8: if (sends) given->sent = NULL, expected = FAILS; break;
        case 9: if (receives || gathers) given->received = NULL, expected = FAILS; break;
        case 10: if (sends || receives) given->numbers = NULL, expected = FAILS; break;
        case 11: if (gathers) given->n_by_row = chance(2) ? -1 : INT64_C(1) << 33, expected = FAILS; break;
        case 12: if (sends && n > 0) given->ids = NULL, expected = FAILS; break;
        default: break;
    }
    const lplb_status status = lplb_planner_layout(s->handle, passed, NULL);
    if (status == LPLB_OK && sends) {
        int64_t sent = 0;
        check_permutation(given->order, n, "order");
        for (int64_t i = 0; i < ranks * rows; i++) sent += given->sent[i];
        if (sent != given->numbers[LPLB_LAYOUT_N_SENT] || sent > n)
            fail("lplb_planner_layout: %" PRId64 " rows of %" PRId64 " ids", sent, n);
    }
    if (status == LPLB_OK && receives && given->numbers[1] == 0 && given->ends[rows - 1] != given->numbers[LPLB_LAYOUT_N_RECEIVED])
        fail("lplb_planner_layout: ends and numbers differ");
    if (status == LPLB_OK && receives && gathers && given->numbers[1] == 0) check_permutation(given->by_row, given->n_by_row, "by_row");
    after(s, "lplb_planner_layout", status, expected);
}
