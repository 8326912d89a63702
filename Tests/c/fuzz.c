/*
 * Hostile calls: whatever a caller passes (short of a dangling pointer), every call of lplb.h returns a status, says why when it fails,
 * changes nothing when it fails, and the planner works on afterwards. CPU planners only.
 *
 *   fuzz [iterations [seed]]       exit 0: nothing found; otherwise one line says what, with the seed that repeats it
 */
#include "fuzz.h"

enum { OK = LPLB_OK, FAILS = -1, ANY = -2 }; /* what a call is expected to return; or a certain status */

typedef struct {
    lplb_planner *handle;
    lplb_config config;
    int32_t *phy2log;
    int64_t n_local, n_groups, *split;
    int has_topology, has_placement, has_plan, has_replicas, began_together, ever_planned;
    int ranked, ever_ranked, may_differ; /* set_capacity has made the ranks differ now, or once, or was called */
    lplb_metrics metrics;
} subject;

static char message[256];
static uint64_t accepted, refusals;

static void check(const char *call, lplb_status status, int expected, const char *words) {
    if (status < LPLB_OK || status == LPLB_ERROR_INTERNAL || status > LPLB_ERROR_PEER_LOST) fail("%s returned status %d: %s", call, status, words);
    if (expected == OK && status != LPLB_OK) fail("%s refused a valid call with status %d: %s", call, status, words);
    if (expected == FAILS && status == LPLB_OK) fail("%s accepted an invalid call", call);
    if (expected > 0 && status != expected) fail("%s returned status %d, not %d: %s", call, status, expected, words);
    if (status != LPLB_OK && (words == NULL || words[0] == 0)) fail("%s failed with status %d and without words", call, status);
    status == LPLB_OK ? accepted++ : refusals++;
}

/* After every call: its status and words, the buffers' ends and, when it failed, that the latest plan and the metrics are still there. */
static void after(subject *s, const char *call, lplb_status status, int expected) {
    check(call, status, expected, lplb_planner_error(s->handle));
    drop(call);
    lplb_metrics metrics = LPLB_METRICS_INIT;
    check("lplb_planner_get_metrics", lplb_planner_get_metrics(s->handle, &metrics), OK, "");
    if (status != LPLB_OK && memcmp(&metrics, &s->metrics, sizeof metrics) != 0) fail("%s failed, but changed the metrics", call);
    s->metrics = metrics;
    if (s->has_plan) {
        int64_t *split = make(s->config.n_physical, sizeof *split);
        check("lplb_planner_split", lplb_planner_split(s->handle, split, s->config.n_physical, NULL), OK, lplb_planner_error(s->handle));
        if (status != LPLB_OK && memcmp(split, s->split, (size_t)s->config.n_physical * sizeof *split) != 0)
            fail("%s failed, but changed the plan", call);
        memcpy(s->split, split, (size_t)s->config.n_physical * sizeof *split);
        drop("lplb_planner_split");
    }
}

/* Reads the placement back. */
static void reread(subject *s) {
    check("lplb_planner_phy2log", lplb_planner_phy2log(s->handle, s->phy2log, s->config.n_physical), OK, lplb_planner_error(s->handle));
    s->has_placement = 1;
    s->has_plan = 0;
    s->has_replicas = s->config.n_physical > s->config.n_logical;
    for (int64_t p = 0; p < s->config.n_physical; p++) {
        int32_t e = s->phy2log[p];
        if (e < (s->has_topology ? 0 : -1) || e >= s->config.n_logical) fail("slot %" PRId64 " holds expert %d", p, e);
    }
    drop("lplb_planner_phy2log");
}

#include "fuzz_cost.h"

static void create(subject *s) {
    const int64_t group_size = 1 + below(8), n_groups = 1 + below(3), ep_size = group_size * n_groups;
    const int64_t redundant = below(3), m = redundant > 0 ? 1 + below(2) : 0;
    memset(s, 0, sizeof *s);
    lplb_config right = LPLB_CONFIG_INIT;
    right.ep_size = ep_size;
    right.rank = chance(2) ? LPLB_WHOLE_BATCH : below(ep_size);
    right.n_nodes = chance(2) ? n_groups : 1;
    right.n_logical = ep_size * (m * redundant + 1 + below(6));
    s->has_topology = chance(2);
    right.n_physical = right.n_logical + ep_size * (s->has_topology ? m * redundant : below(4));
    right.group_size = group_size;
    right.n_redundant = s->has_topology ? redundant : 0;
    right.unit = random_unit();
    right.record = below(4);
    if (right.n_physical == right.n_logical) right.record &= LPLB_RECORD_METRICS;
    if (right.unit < 0 || right.unit > 1) right.record &= LPLB_RECORD_HISTORY;

    lplb_config *config = make(1, sizeof *config);
    *config = right;
    int expected = OK, what = chance(2) ? 0 : 1 + (int)below(18);
    switch (what) {
        case 1: config->struct_size = wrong_size(right.struct_size), expected = FAILS; break;
        case 2: config->device = chance(2) ? INT32_MIN : -2, expected = FAILS; break;
        case 3: config->solver = (int32_t)wrong(0), expected = ANY; break;
        case 4: config->ep_size = wrong(right.ep_size), expected = ANY; break;
        case 5: config->rank = chance(2) ? ep_size : -2 - below(1000), expected = FAILS; break;
        case 6: config->n_nodes = wrong(right.n_nodes), expected = ANY; break;
        case 7: config->n_logical = wrong(right.n_logical), expected = ANY; break;
        case 8: config->n_physical = wrong(right.n_physical), expected = ANY; break;
        case 9: config->group_size = wrong(right.group_size), expected = ANY; break;
        case 10: config->n_redundant = wrong(right.n_redundant), expected = ANY; break;
        case 17: config->unit = chance(2) ? -2 : INT32_MIN, expected = FAILS; break;
        case 18: config->record = chance(2) ? 4 + below(1000) : -1, expected = FAILS; break;
        case 11: config->n_logical = config->n_physical = ep_size << 40, expected = FAILS; break;
        default: break;
    }
    if (s->has_topology) {
        const int64_t group = config->group_size == 0 ? config->ep_size : config->group_size;
        const int64_t ranks = group > 0 && group < 100 ? group : 1;
        const int64_t columns = config->n_redundant > 0 && config->n_redundant < 100 ? config->n_redundant : 0;
        int32_t *r2o = make(ranks * columns, sizeof *r2o);
        for (int64_t d = 0; d < columns; d++) {
            for (int64_t r = 0; r < ranks; r++) {
                int64_t other = below(r + 1);
                if (other != r) r2o[r * columns + d] = r2o[other * columns + d];
                r2o[other * columns + d] = (int32_t)r;
            }
        }
        if (what == 12 && ranks * columns > 0) r2o[below(ranks * columns)] = (int32_t)wrong(1), expected = ANY;
        config->r2o = r2o;
    }
    const lplb_config *passed = config;
    if (what == 15) { /* a newer caller's: longer, and 0 where this version has nothing, or not */
        unsigned char *longer = make(1, sizeof *config + 24);
        memset(longer, 0, sizeof *config + 24);
        config->struct_size = (int64_t)sizeof *config + 24;
        memcpy(longer, config, sizeof *config);
        if (chance(2)) longer[(int64_t)sizeof *config + below(24)] = 1, expected = FAILS;
        passed = (const lplb_config *)longer;
    }
    if (what == 16) { /* an older caller's: it ends before `number`, whose default is 0 as in `right` */
        unsigned char *shorter = make(1, offsetof(lplb_config, number));
        config->struct_size = offsetof(lplb_config, number), config->unit = 0, config->record = 0;
        memcpy(shorter, config, offsetof(lplb_config, number));
        passed = (const lplb_config *)shorter;
    }
    lplb_planner *before = (lplb_planner *)(uintptr_t)16, **out = &s->handle;
    s->handle = before;
    if (what == 13) passed = NULL, expected = FAILS;
    if (what == 14) out = NULL, expected = FAILS;
    char *words = message;
    int64_t size = sizeof message;
    memset(message, 'x', sizeof message);
    if (chance(8)) words = make(size = below(8), 1);
    if (chance(16)) words = NULL, size = wrong(1);
    lplb_status status = lplb_planner_create(passed, out, words, size);
    if (words == message) check("lplb_planner_create", status, expected, message);
    if (status == LPLB_OK) {
        s->config = *config;
        s->began_together = config->record == 3;
        const lplb_metrics none = LPLB_METRICS_INIT;
        s->metrics = none;
        s->n_local = config->n_physical / config->ep_size;
        s->n_groups = config->ep_size / (config->group_size == 0 ? config->ep_size : config->group_size);
        s->phy2log = calloc((size_t)config->n_physical, sizeof *s->phy2log);
        s->split = calloc((size_t)config->n_physical, sizeof *s->split);
    } else if (words != NULL && size > 0 && memchr(words, 0, (size_t)size) == NULL) {
        fail("lplb_planner_create left its message without an end");
    } else if (s->handle != before) {
        fail("lplb_planner_create failed, but wrote a planner");
    } else {
        s->handle = NULL;
    }
    drop("lplb_planner_create");
    if (s->handle != NULL && lplb_planner_error(s->handle)[0] != 0) fail("a new planner has words of a failure");
    if (s->handle != NULL && (s->has_topology || s->config.n_physical == s->config.n_logical)) reread(s);
}

static void destroy(subject *s) {
    lplb_planner_destroy(s->handle);
    free(s->phy2log);
    free(s->split);
    memset(s, 0, sizeof *s);
}

static void place(subject *s) {
    double *history = chance(4) ? NULL : make(s->config.n_logical, sizeof *history);
    int expected = s->has_topology ? OK : LPLB_ERROR_WRONG_ORDER;
    for (int64_t e = 0; history != NULL && e < s->config.n_logical; e++) history[e] = (double)below(1 + below(1000));
    if (history != NULL && chance(3)) {
        const double bad[] = {-1, -1e308, (double)INFINITY, -(double)INFINITY, (double)NAN};
        history[below(s->config.n_logical)] = bad[below(5)];
        if (s->has_topology) expected = FAILS;
    } else if (history != NULL && chance(3)) {
        const double extreme[] = {1e308, 1e-320, 0, 1e39, 1e-45}; /* finite, though beyond float32 */
        history[below(s->config.n_logical)] = extreme[below(5)];
    }
    lplb_status status = lplb_planner_place(s->handle, history, NULL);
    s->has_plan = s->has_plan && status != LPLB_OK; /* a new placement voids the plan */
    after(s, "lplb_planner_place", status, expected);
    if (status == LPLB_OK) reread(s);
}

static void set_placement(subject *s) {
    int64_t n = s->config.n_physical, group = s->config.group_size == 0 ? s->config.ep_size : s->config.group_size;
    if (s->config.n_logical < s->n_groups) return; /* no placement can fill such groups */
    int32_t *phy2log = make(n, sizeof *phy2log);
    int expected = s->has_topology ? LPLB_ERROR_WRONG_ORDER : OK;
    /* Every group gets its share of the experts once, then copies of them. */
    const int64_t slots = group * s->n_local, experts = s->config.n_logical / s->n_groups, spare = s->config.n_logical % s->n_groups;
    for (int64_t g = 0; g < s->n_groups; g++) {
        int64_t first = g * experts + (g < spare ? g : spare), own = experts + (g < spare);
        for (int64_t i = 0; i < slots; i++) phy2log[g * slots + i] = (int32_t)(first + (i < own ? i : below(own)));
        for (int64_t i = slots - 1; i > 0; i--) {
            int64_t other = below(i + 1);
            int32_t kept = phy2log[g * slots + i];
            phy2log[g * slots + i] = phy2log[g * slots + other];
            phy2log[g * slots + other] = kept;
        }
    }
    int64_t size = n;
    if (!s->has_topology) switch (below(8)) {
        case 0: phy2log = NULL, expected = FAILS; break;
        case 1: size = wrong(n), expected = FAILS; break;
        case 2: phy2log[below(n)] = (int32_t)s->config.n_logical, expected = FAILS; break;
        case 3: phy2log[below(n)] = chance(2) ? -2 : INT32_MIN, expected = FAILS; break;
        case 4: phy2log[below(n)] = (int32_t)below(s->config.n_logical), expected = ANY; break; /* may drop an expert, or cross groups */
        case 5: /* empty slots, in the place of copies */
            for (int64_t p = 0; p < n; p++)
                for (int64_t before = 0; before < p && phy2log[p] >= 0; before++)
                    if (phy2log[before] == phy2log[p] && chance(2)) phy2log[p] = -1;
            break;
        case 6: phy2log[below(n)] = -1, expected = ANY; break; /* may drop an expert */
        default: break;
    }
    lplb_status status = lplb_planner_set_placement(s->handle, phy2log, size, NULL);
    s->has_plan = s->has_plan && status != LPLB_OK;
    after(s, "lplb_planner_set_placement", status, expected);
    if (status == LPLB_OK) reread(s);
}

static void read_placement(subject *s) {
    int expected = s->has_placement ? OK : LPLB_ERROR_WRONG_ORDER;
    const int bad = chance(2) ? 0 : 1 + (int)below(2);
    const int64_t n = s->config.n_logical;
    int64_t replicas = 0, *out = make(1, sizeof *out);
    after(s, "lplb_planner_max_replicas", lplb_planner_max_replicas(s->handle, bad == 1 ? NULL : &replicas), bad == 1 ? FAILS : expected);
    out = make(s->config.n_physical, sizeof(int32_t));
    after(s, "lplb_planner_phy2log",
          lplb_planner_phy2log(s->handle, bad == 1 ? NULL : (int32_t *)out, bad == 2 ? wrong(s->config.n_physical) : s->config.n_physical),
          bad ? FAILS : expected);
    out = make(n, sizeof(int32_t));
    after(s, "lplb_planner_logcnt", lplb_planner_logcnt(s->handle, bad == 1 ? NULL : (int32_t *)out, bad == 2 ? wrong(n) : n),
          bad ? FAILS : expected);
    if (bad == 1 || !s->has_placement) return;
    const int64_t width = chance(3) ? wrong(replicas) : replicas;
    const int fits = width >= replicas && width <= LPLB_MAX_PHYSICAL;
    int32_t *log2phy = make(fits ? n * width : 1, sizeof *log2phy);
    after(s, "lplb_planner_log2phy", lplb_planner_log2phy(s->handle, log2phy, n, width), fits ? OK : FAILS);
}

/* n ids of the dtype, all valid or some of them not; NULL when there are none. */
static void *make_ids(subject *s, lplb_dtype dtype, int64_t n, int hostile) {
    unsigned char *ids = make(n, dtype == LPLB_INT32 ? 4 : 8);
    for (int64_t i = 0; i < n; i++) {
        int64_t id = chance(8) ? -1 : below(1 + below(s->config.n_logical));
        if (hostile && chance(4)) id = wrong(0);
        if (dtype == LPLB_INT32) ((int32_t *)(void *)ids)[i] = (int32_t)id;
        else ((int64_t *)(void *)ids)[i] = id;
    }
    return ids;
}

static int64_t id_at(const void *ids, lplb_dtype dtype, int64_t i) {
    return dtype == LPLB_INT32 ? ((const int32_t *)ids)[i] : ((const int64_t *)ids)[i];
}

/* Every rewritten id is a slot of the id's expert; what is no expert stays -1. */
static void check_slots(subject *s, const char *call, const void *ids, const void *out, lplb_dtype dtype, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t id = id_at(ids, dtype, i), slot = id_at(out, dtype, i), valid = id >= 0 && id < s->config.n_logical;
        if (valid ? slot < 0 || slot >= s->config.n_physical || s->phy2log[slot] != id : slot != -1)
            fail("%s rewrote id %" PRId64 " as slot %" PRId64, call, id, slot);
    }
}

/* Rows of all ranks with small counts, and with this planner's digest if it has one. */
static int32_t *make_rows(subject *s) {
    const int64_t sources = s->config.ep_size, width = lplb_counts_width(s->config.n_logical);
    int32_t *rows = make(sources * width, 4), *zeros = make(s->config.n_logical, 4), *own = make(width, 4);
    memset(zeros, 0, (size_t)s->config.n_logical * 4);
    const lplb_status status = lplb_planner_make_row(s->handle, zeros, LPLB_INT32, own, NULL);
    check("lplb_planner_make_row", status, s->has_placement ? OK : LPLB_ERROR_WRONG_ORDER, lplb_planner_error(s->handle));
    for (int64_t i = 0; i < sources * width; i++) {
        rows[i] &= INT32_C(0xFFFF);
        if (i % width == width - 1) rows[i] = own[width - 1];
    }
    return rows;
}

/* count_row, make_row and solve_rows. */
static void rows(subject *s) {
    const int64_t n = below(1000), width = lplb_counts_width(s->config.n_logical);
    const lplb_dtype dtype = (lplb_dtype)below(2);
    int expected = s->has_placement ? OK : LPLB_ERROR_WRONG_ORDER;
    const int bad = chance(2) ? 0 : 1 + (int)below(5);
    if (chance(2)) {
        int32_t *row = bad == 1 ? NULL : make(width, 4);
        const void *from = bad == 2 ? NULL : chance(2) ? make_ids(s, dtype, n, chance(2)) : make(n + s->config.n_logical, 8);
        const lplb_dtype type = bad == 3 ? 7 : dtype;
        if (bad >= 1 && bad <= 3) expected = FAILS;
        const int counted = chance(2) && n > 0;
        const lplb_status status = counted ? lplb_planner_count_row(s->handle, from, type, n, row, NULL)
                                           : lplb_planner_make_row(s->handle, from == NULL ? NULL : make(s->config.n_logical, 8), type, row, NULL);
        after(s, counted ? "lplb_planner_count_row" : "lplb_planner_make_row", status, expected);
        return;
    }
    int32_t *all = bad == 1 ? NULL : make_rows(s);
    if (bad == 1 || s->config.rank == LPLB_WHOLE_BATCH) expected = FAILS;
    if (bad == 2 && expected == OK) all[below(s->config.ep_size) * width + width - 1] ^= 1 << below(31), expected = LPLB_ERROR_DISAGREEMENT;
    if (bad == 3 && expected == OK) all[below(s->config.ep_size) * width + below(width - 1)] = -1, expected = FAILS;
    float *scaled = chance(2) ? NULL : make(s->config.n_logical, 4);
    void *counter = chance(2) ? NULL : make(1, 8);
    const lplb_status status = lplb_planner_solve_rows(s->handle, all, NULL, scaled, counter, dtype, NULL);
    if (status == LPLB_OK) s->has_plan = s->ever_planned = 1;
    after(s, "lplb_planner_solve_rows", status, expected);
}

/* count, redirect, redirect_by_ratio and run: the calls that take ids. */
static void plan_ids(subject *s) {
    const lplb_dtype dtype = (lplb_dtype)below(2);
    int64_t n = chance(8) ? 0 : below(3000), chunks = 1 + below(9), blocks = below(3), sources = s->config.ep_size;
    const int which = (int)below(4), bad = chance(2) ? 0 : 1 + (int)below(8);
    void *ids = make_ids(s, dtype, n, chance(3)), *out = make(n, dtype == LPLB_INT32 ? 4 : 8), *seen = ids;
    int32_t *counts = make(s->config.n_logical, 4), *cumulative = make(chunks * s->config.n_logical, 4);
    float *ratios = make(s->config.ep_size * s->config.n_redundant, 4); /* random bits: NaN, infinite and negative ones among them */
    int32_t *gathered = s->config.rank == LPLB_WHOLE_BATCH || chance(2) ? NULL : make_rows(s);
    void *counter = chance(2) ? NULL : make(1, 8);
    lplb_dtype type = dtype, counter_type = (lplb_dtype)below(2);
    int64_t passed = n;
    int expected = OK;
    if (bad == 1) passed = chance(2) ? -1 - below(1000) : INT64_C(1) << (40 + below(23)), expected = FAILS;
    if (bad == 2) type = (lplb_dtype)(2 + below(1000)) * (chance(2) ? -1 : 1), expected = FAILS;
    if (bad == 3 && n > 0) ids = NULL, expected = FAILS;
    lplb_status status;
    const char *call;
    if (which == 0) {
        call = "lplb_planner_count";
        if (bad == 4) counts = NULL, expected = FAILS;
        if (bad == 5) chunks = chance(2) ? -below(3) : INT64_MAX - below(3), expected = FAILS;
        if (bad == 6) cumulative = NULL, chunks = wrong(1);
        status = lplb_planner_count(s->handle, ids, type, passed, counts, cumulative, chunks, NULL);
    } else {
        if (bad == 4 && n > 0) out = NULL, expected = FAILS;
        if (expected == OK && !s->has_placement) expected = LPLB_ERROR_WRONG_ORDER;
        if (which == 1) {
            call = "lplb_planner_redirect";
            if (bad == 5) blocks = wrong(0) | INT64_MIN, expected = FAILS;
            if (expected == OK && s->has_replicas && !s->has_plan) expected = LPLB_ERROR_WRONG_ORDER;
            if (chance(4) && expected == OK) out = ids, seen = memcpy(make(n, 8), ids, (size_t)n * (dtype == LPLB_INT32 ? 4 : 8));
            status = lplb_planner_redirect(s->handle, ids, type, passed, out, blocks, NULL);
        } else if (which == 2) {
            call = "lplb_planner_redirect_by_ratio";
            if (bad == 5) ratios = NULL, expected = FAILS;
            if (bad == 6) cumulative = NULL, expected = FAILS;
            if (bad == 7) chunks = chance(2) ? -below(3) : INT64_MAX - below(3), expected = FAILS;
            if (bad != 8 && ids != NULL && type == dtype && passed == n && chunks > 0 && chunks < 10 && cumulative != NULL) {
                int32_t *total = make(s->config.n_logical, 4); /* bad == 8 leaves random numbers there */
                lplb_planner_count(s->handle, ids, type, n, total, cumulative, chunks, NULL);
            }
            if (expected == OK && (!s->has_topology || !counts_tokens(s))) expected = FAILS;
            status = lplb_planner_redirect_by_ratio(s->handle, ids, type, passed, ratios, cumulative, chunks, out, NULL);
        } else {
            call = "lplb_planner_run";
            if (bad == 5) blocks = wrong(0) | INT64_MIN, expected = FAILS;
            if (bad == 6 && counter != NULL) counter_type = 2 + (lplb_dtype)below(1000), expected = FAILS;
            if (bad == 7 && s->config.rank == LPLB_WHOLE_BATCH) gathered = make_rows(s), expected = FAILS;
            if (bad == 8 && gathered != NULL) {
                const int64_t width = lplb_counts_width(s->config.n_logical), at = below(sources * width);
                gathered[at] = -1;
                expected = !s->has_replicas ? ANY : !s->has_placement ? FAILS : at % width < width - 1 ? FAILS : LPLB_ERROR_DISAGREEMENT;
            }
            status = lplb_planner_run(s->handle, ids, type, passed, gathered, out, counter, counter_type, blocks, NULL);
            if (status == LPLB_OK && s->has_replicas) s->has_plan = s->ever_planned = 1;
        }
        if (status == LPLB_OK) check_slots(s, call, seen, out, dtype, n);
    }
    after(s, call, status, expected);
}

static void solve(subject *s) {
    const lplb_dtype dtype = (lplb_dtype)below(2);
    int64_t sources = chance(2) ? 1 : s->config.ep_size, n = sources * s->config.n_logical, size = dtype == LPLB_INT32 ? 4 : 8;
    unsigned char *counts = make(n, (size_t)size);
    for (int64_t i = 0; i < n; i++) {
        const int64_t load = below(1 + below(100000));
        if (dtype == LPLB_INT32) ((int32_t *)(void *)counts)[i] = (int32_t)load;
        else ((int64_t *)(void *)counts)[i] = load;
    }
    float *ratios = s->has_topology && chance(2) ? make(s->config.ep_size * s->config.n_redundant, 4) : NULL;
    float *scaled = chance(2) ? make(s->config.n_logical, 4) : NULL;
    void *counter = chance(2) ? NULL : make(1, 8);
    lplb_dtype type = dtype, counter_type = (lplb_dtype)below(2);
    int expected = s->has_placement ? OK : LPLB_ERROR_WRONG_ORDER;
    const int64_t at = below(n), large[] = {INT64_MAX, INT64_MAX - 1, LPLB_MAX_LOAD + 1, INT64_MAX / 2};
    switch (chance(2) ? 0 : 1 + below(9)) {
        case 1: counts = NULL, expected = FAILS; break;
        case 2: type = (lplb_dtype)(2 + below(1000)) * (chance(2) ? -1 : 1), expected = FAILS; break;
        case 3:
            do sources = wrong(sources);
            while (sources == 1 || sources == s->config.ep_size);
            expected = FAILS;
            break;
        case 4: /* a negative count */
            if (dtype == LPLB_INT32) ((int32_t *)(void *)counts)[at] = chance(2) ? -1 : INT32_MIN;
            else ((int64_t *)(void *)counts)[at] = chance(2) ? -1 : INT64_MIN;
            expected = FAILS;
            break;
        case 5: /* beyond LPLB_MAX_LOAD, alone or in the sum of the sources */
            if (dtype == LPLB_INT32) break;
            for (int64_t e = at % s->config.n_logical; e < n; e += s->config.n_logical) ((int64_t *)(void *)counts)[e] = large[below(4)];
            expected = FAILS;
            break;
        case 6: /* the largest that is allowed, everywhere */
            for (int64_t i = 0; i < n; i++) {
                if (dtype == LPLB_INT32) ((int32_t *)(void *)counts)[i] = INT32_MAX;
                else ((int64_t *)(void *)counts)[i] = LPLB_MAX_LOAD / sources;
            }
            if (s->ranked && expected == OK) expected = ANY; /* together too much for ranks that differ */
            break;
        case 7: if (counter != NULL) counter_type = 2 + (lplb_dtype)below(1000), expected = FAILS; break;
        case 8: if (!s->has_topology) ratios = make(s->config.ep_size, 4), expected = FAILS; break;
        case 9: memset(counts, 0, (size_t)(n * size)); break;
        default: break;
    }
    if (ratios != NULL && (!counts_tokens(s) || s->ranked)) expected = FAILS;
    lplb_status status = lplb_planner_solve(s->handle, counts, type, sources, ratios, scaled, counter, counter_type, NULL);
    if (status == LPLB_OK) s->has_plan = s->ever_planned = 1;
    for (int64_t i = 0; status == LPLB_OK && ratios != NULL && i < s->config.ep_size * s->config.n_redundant; i++)
        if (!(ratios[i] >= 0 && ratios[i] <= 1)) fail("lplb_planner_solve wrote the ratio %g", (double)ratios[i]);
    after(s, "lplb_planner_solve", status, expected);
}

static void read_plan(subject *s) {
    int expected = s->has_plan ? OK : LPLB_ERROR_WRONG_ORDER;
    const int bad = chance(2) ? 0 : 1 + (int)below(3);
    lplb_plan_info *plan = make(1, sizeof *plan);
    lplb_group_info *groups = make(s->n_groups, sizeof *groups);
    const lplb_plan_info fresh = LPLB_PLAN_INFO_INIT;
    *plan = fresh;
    if (bad == 1) plan->struct_size = wrong_size(fresh.struct_size), expected = FAILS;
    if (bad == 3) expected = FAILS;
    if (bad != 1 && chance(4)) plan = NULL;
    lplb_status status = lplb_planner_info(s->handle, plan, groups, bad == 3 ? wrong(s->n_groups) : s->n_groups, NULL);
    for (int64_t g = 0; status == LPLB_OK && g < s->n_groups; g++)
        if (!groups[g].certified || groups[g].witness_size < 1 ||
            (groups[g].max_load != groups[g].bound && counts_tokens(s) && !s->ever_ranked))
            fail("group %" PRId64 " is not certified", g);
    after(s, "lplb_planner_info", status, expected);
    expected = bad ? FAILS : s->has_plan ? OK : LPLB_ERROR_WRONG_ORDER;
    for (int i = 0; i < 2; i++) {
        int64_t *tokens = bad == 1 ? NULL : make(s->config.n_physical, sizeof *tokens), n = s->config.n_physical;
        if (bad >= 2) n = wrong(n);
        status = i == 0 ? lplb_planner_split(s->handle, tokens, n, NULL) : lplb_planner_assignment(s->handle, tokens, n, NULL);
        after(s, i == 0 ? "lplb_planner_split" : "lplb_planner_assignment", status, expected);
    }
}

#include "fuzz_layout.h"
#include "fuzz_records.h"
#include "fuzz_free.h"
#include "fuzz_place.h"

int main(int argc, char **argv) {
    const uint64_t iterations = argc > 1 ? strtoull(argv[1], NULL, 10) : 20000;
    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    static void (*const calls[])(subject *) = {place, set_placement, set_placement, read_placement, plan_ids, plan_ids, plan_ids, rows,
                                               solve, solve, read_plan, layout, layout, set_capacity, read_levels, records};
    null_handles();
    subject subjects[4] = {{0}};
    for (iteration = 0; iteration < iterations; iteration++) {
        state = seed * UINT64_C(0x2545F4914F6CDD1D) + iteration;
        subject *s = &subjects[below(4)];
        if (s->handle == NULL) create(s);
        else if (chance(40)) destroy(s);
        else if (chance(8)) one_off();
        else if (chance(16)) solve_with();
        else if (chance(20)) placements();
        else if (chance(20)) judgement();
        else if (chance(20)) exchange_config();
        else if (chance(20)) connect_config();
        else if (chance(20)) replicas_config();
        else if (chance(20)) agree();
        else calls[below((int64_t)(sizeof calls / sizeof *calls))](s);
    }
    for (int i = 0; i < 4; i++) destroy(&subjects[i]);
    printf("fuzz: seed %" PRIu64 ", %" PRIu64 " steps: %" PRIu64 " calls accepted, %" PRIu64 " refused, nothing found\n", seed, iterations,
           accepted, refusals);
    return 0;
}
