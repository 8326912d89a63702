/* Units and capacities: lplb_planner_set_capacity, lplb_planner_levels, lplb_solve_with. A part of fuzz.c. */

static int counts_tokens(const subject *s) { return s->config.unit == 0 || s->config.unit == 1; }

static int32_t random_unit(void) {
    const int32_t units[] = {0, 0, 0, 1, LPLB_UNIT_EXPERTS, 2, 128, INT32_MAX};
    return units[below(8)];
}

/* Speeds or fixed costs of n ranks, or NULL. *expected becomes FAILS where one of them is spoilt. */
static int32_t *random_ranks(int64_t n, int32_t least, int32_t most, int spoil, int *expected) {
    if (!spoil && chance(3)) return NULL;
    int32_t *values = make(n, sizeof *values);
    const int kind = (int)below(3);
    for (int64_t r = 0; r < n; r++) values[r] = kind == 0 ? (chance(2) ? least : most) : kind == 1 ? LPLB_SPEED_NORMAL : least + (int32_t)below(most - least);
    if (spoil) {
        const int32_t bad[] = {least - 1, most + 1, INT32_MIN, INT32_MAX, -1};
        values[below(n)] = bad[below(5)], *expected = FAILS;
    }
    return values;
}

static void set_capacity(subject *s) {
    const int bad = chance(2) ? 0 : 1 + (int)below(3);
    int expected = OK;
    int64_t n = s->config.ep_size;
    int32_t *speed = random_ranks(n, 1, LPLB_MAX_SPEED, bad == 1, &expected), *fixed = random_ranks(n, 0, LPLB_MAX_FIXED, bad == 2, &expected);
    if (bad == 3) n = wrong(n), expected = FAILS;
    int ranked = 0;
    for (int64_t r = 0; bad == 0 && r < n; r++) ranked |= (speed != NULL && speed[r] != LPLB_SPEED_NORMAL) || (fixed != NULL && fixed[r] != 0);
    if (ranked && (s->config.record & LPLB_RECORD_METRICS) != 0) expected = FAILS; /* metrics know tokens only */
    const int stays_alike = (s->config.record & LPLB_RECORD_METRICS) != 0; /* then there is nothing to set */
    if (expected == OK && !stays_alike && !s->may_differ && s->ever_planned) expected = LPLB_ERROR_WRONG_ORDER;
    const lplb_status status = lplb_planner_set_capacity(s->handle, speed, fixed, n, NULL);
    if (status == LPLB_OK) {
        s->ranked = ranked, s->may_differ |= !stays_alike;
        s->ever_ranked |= s->ranked;
    }
    after(s, "lplb_planner_set_capacity", status, expected);
}

static void read_levels(subject *s) {
    const int bad = chance(2) ? 0 : 1 + (int)below(2);
    lplb_level *levels = bad == 1 ? NULL : make(s->n_groups, sizeof *levels);
    const lplb_status status = lplb_planner_levels(s->handle, levels, bad == 2 ? wrong(s->n_groups) : s->n_groups, NULL);
    for (int64_t g = 0; status == LPLB_OK && g < s->n_groups; g++)
        if (levels[g].reached != levels[g].bound || levels[g].mean > levels[g].bound || levels[g].mean < 0)
            fail("group %" PRId64 " reached level %" PRId64 ", not %" PRId64, g, levels[g].reached, levels[g].bound);
    after(s, "lplb_planner_levels", status, bad ? FAILS : s->has_plan ? OK : LPLB_ERROR_WRONG_ORDER);
}

/* lplb_solve_with, which must also do what lplb_solve does. */
static void solve_with(void) {
    const int64_t ranks = 1 + below(6), physical = ranks * (1 + below(5)), logical = 1 + below(physical);
    const int bad = chance(2) ? 0 : 1 + (int)below(9);
    int expected = OK;
    lplb_solve_config *config = make(1, sizeof *config);
    const lplb_solve_config fresh = LPLB_SOLVE_CONFIG_INIT;
    *config = fresh;
    int64_t *loads = make(logical, sizeof *loads), most = 0, total = 0;
    int32_t *phy2log = make(physical, sizeof *phy2log);
    for (int64_t e = 0; e < logical; e++) loads[e] = chance(8) ? LPLB_MAX_LOAD : below(1 + below(100000)), total += loads[e];
    for (int64_t p = 0; p < physical; p++) phy2log[p] = (int32_t)(p < logical ? p : chance(4) ? -1 : below(logical));
    config->loads = loads, config->phy2log = phy2log;
    config->n_logical = logical, config->n_physical = physical, config->ep_size = ranks;
    config->unit = random_unit();
    config->speed = random_ranks(ranks, 1, LPLB_MAX_SPEED, bad == 1, &expected);
    config->fixed = random_ranks(ranks, 0, LPLB_MAX_FIXED, bad == 2, &expected);
    int64_t *tokens = config->tokens = make(physical, sizeof *tokens);
    lplb_group_info *info = config->info = chance(4) ? NULL : make(1, sizeof *info);
    lplb_level *level = config->level = chance(4) ? NULL : make(1, sizeof *level);
    if (bad == 3) config->struct_size = wrong_size(fresh.struct_size), expected = FAILS;
    if (bad == 4) config->unit = chance(2) ? -2 : INT32_MIN, expected = FAILS;
    if (bad == 5) config->unused = 1, expected = FAILS;
    if (bad == 6) config->loads = NULL, expected = FAILS;
    if (bad == 7) config->phy2log = NULL, expected = FAILS;
    if (bad == 8) loads[below(logical)] = chance(2) ? -1 : LPLB_MAX_LOAD + 1, expected = FAILS;
    if (bad == 9) config->ep_size = -ranks, expected = FAILS;
    if (expected == OK && total > INT64_C(1) << 42) expected = ANY; /* refused where the ranks differ */
    const lplb_status status = lplb_solve_with(config, message, sizeof message);
    check("lplb_solve_with", status, expected, message);
    if (status == LPLB_OK) {
        for (int64_t r = 0; r < ranks; r++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < physical / ranks; i++) sum += tokens[r * (physical / ranks) + i];
            most = sum > most ? sum : most;
        }
        if (info != NULL && (!info->certified || info->max_load != most || info->total != total)) fail("lplb_solve_with: wrong information");
        if (level != NULL && level->reached != level->bound) fail("lplb_solve_with: not certified");
    }
    drop("lplb_solve_with");
}
