/* fuzz.c, the calls without a planner: lplb_eplb_rebalance, lplb_solve, and every call on NULL. */
#ifndef LPLB_TESTS_FUZZ_FREE_H
#define LPLB_TESTS_FUZZ_FREE_H

/* Rows of a valid placement twice, the second ones after the first; then moves between them, or hostile calls. */
static void rows_and_moves(const int32_t *phy2log, int64_t physical, int64_t logical, int64_t ranks) {
    const int64_t slack = below(4), n_rows = physical / ranks + 2 * slack, size = ranks * (1 + n_rows);
    int32_t *rows = make(size, 4), *former = chance(2) ? NULL : make(size, 4), *homes = chance(2) ? NULL : make(logical, 4);
    int32_t *row_of_slot = make(physical, 4), *moves = make(5 * ranks * n_rows, 4);
    const int bad = chance(2) ? 0 : 1 + (int)below(6);
    int expected = OK;
    memset(message, 'x', sizeof message);
    if (former != NULL)
        check("lplb_placement_rows",
              lplb_placement_rows(phy2log, physical, logical, ranks, slack, NULL, former, NULL, NULL, message, sizeof message), OK,
              message);
    if (former != NULL && bad == 1) former[below(size)] = (int32_t)wrong(0), expected = ANY;
    if (bad == 2) expected = FAILS;
    if (bad == 3) rows = NULL, expected = FAILS;
    memset(message, 'x', sizeof message);
    const int64_t given = bad == 2 ? (chance(2) ? -1 : INT64_MAX) : slack;
    check("lplb_placement_rows",
          lplb_placement_rows(bad == 4 ? NULL : phy2log, physical, logical, ranks, given, former, rows, homes, row_of_slot, message,
                              sizeof message), bad == 4 ? FAILS : expected, message);
    if (rows == NULL || bad != 0) return;
    for (int64_t p = 0; p < physical; p++) {
        const int32_t *of_rank = rows + p / (physical / ranks) * (1 + n_rows) + 1;
        if (phy2log[p] < 0 ? row_of_slot[p] != -1 : row_of_slot[p] < 0 || of_rank[row_of_slot[p]] != phy2log[p])
            fail("slot %" PRId64 " has no row", p);
    }
    int64_t n_moves = -1, asked = n_rows;
    int32_t kind = (int32_t)below(3);
    expected = kind == LPLB_MOVES_PUSH && former != NULL ? FAILS : kind == LPLB_MOVES_HOMES && former == NULL ? FAILS : OK;
    switch (chance(2) ? 0 : 1 + below(4)) {
        case 1: kind = chance(2) ? 3 : INT32_MIN, expected = FAILS; break;
        case 2: asked = chance(2) ? -1 : INT64_MAX, expected = FAILS; break;
        case 3: moves = NULL, expected = FAILS; break;
        case 4: rows[below(size)] = (int32_t)wrong(0), expected = ANY; break;
        default: break;
    }
    memset(message, 'x', sizeof message);
    const lplb_status status = lplb_placement_moves(kind, rows, former, logical, ranks, asked, moves, &n_moves, message, sizeof message);
    check("lplb_placement_moves", status, expected, message);
    for (const int32_t *move = moves; status == LPLB_OK && move < moves + 5 * n_moves; move += 5)
        if (move[1] >= ranks || move[2] >= n_rows || move[3] >= ranks || move[4] >= n_rows) fail("a move leaves the rows");
}

static void one_off(void) {
    int64_t ranks = 1 + below(8), nodes = chance(2) ? 1 : ranks, groups = 1 + below(4), layers = 1 + below(3);
    int64_t logical = groups * (1 + below(6));
    int64_t physical = (logical + ranks - 1) / ranks * ranks + ranks * below(3);
    const int bad = chance(2) ? 0 : 1 + (int)below(10);
    int expected = ANY;
    memset(message, 'x', sizeof message);
    if (chance(2)) {
        /* Hierarchical calls need more divisibility than is arranged here: they may be refused. */
        expected = groups % nodes != 0 || nodes == 1 ? OK : ANY;
        int64_t *sizes[] = {&layers, &logical, &physical, &groups, &nodes, &ranks};
        if (bad >= 1 && bad <= 6) *sizes[bad - 1] = wrong(*sizes[bad - 1]), expected = ANY;
        if (layers > 100) layers = INT64_MAX; /* there is no limit but memory, so that only the impossible is sure to be refused */
        const int64_t rows = layers > 0 && layers < 100 ? layers : 1, l = logical > 0 && logical < 1000 ? logical : 1;
        float *weight = make(rows * l, sizeof *weight);
        for (int64_t i = 0; i < rows * l; i++) weight[i] = (float)below(1 + below(1000));
        const uint32_t bits[] = {0x7FC00000, 0x7F800000, 0xFF800000, 0xBF800000}; /* NaN, both infinities, -1 */
        if (bad == 7) memcpy(&weight[below(rows * l)], &bits[below(4)], 4), expected = FAILS;
        if (bad == 8) weight = NULL, expected = FAILS;
        if (bad == 9 && weight != NULL) weight[below(rows * l)] = 3.4e38F; /* valid; sums of it overflow float32 */
        const int64_t p = physical > 0 && physical < 1000 ? physical : 1;
        int64_t *phy2log = chance(4) ? NULL : make(rows * p, 8), *replica = chance(4) ? NULL : make(rows * p, 8);
        int64_t *logcnt = chance(4) ? NULL : make(rows * l, 8);
        lplb_status status = lplb_eplb_rebalance(weight, layers, logical, physical, groups, nodes, ranks, phy2log, replica, logcnt, message,
                                                 sizeof message);
        for (int64_t i = 0; status == LPLB_OK && phy2log != NULL && layers > 0 && i < rows * p; i++)
            if (phy2log[i] < 0 || phy2log[i] >= logical) fail("lplb_eplb_rebalance put expert %" PRId64 " into a slot", phy2log[i]);
        check("lplb_eplb_rebalance", status, expected, message);
        drop("lplb_eplb_rebalance");
        return;
    }
    int64_t *loads = make(logical, sizeof *loads), *tokens = make(physical, sizeof *tokens);
    int32_t *phy2log = make(physical, sizeof *phy2log);
    lplb_group_info *info = make(1, sizeof *info);
    for (int64_t e = 0; e < logical; e++) loads[e] = chance(8) ? LPLB_MAX_LOAD : below(1 + below(100000));
    for (int64_t p = 0; p < physical; p++) phy2log[p] = (int32_t)(p < logical ? p : chance(4) ? -1 : below(logical));
    expected = OK;
    const int64_t size = physical;
    switch (bad) {
        case 1: logical = wrong(logical), expected = FAILS; break; /* fewer than phy2log names, or one that has no slot */
        case 2: physical = wrong(physical), expected = FAILS; break;
        case 3: ranks = wrong(ranks), expected = ranks > 0 && physical % ranks == 0 ? ANY : FAILS; break;
        case 4: loads = NULL, expected = FAILS; break;
        case 5: phy2log = NULL, expected = FAILS; break;
        case 6: loads[below(logical)] = chance(2) ? LPLB_MAX_LOAD + 1 : INT64_MAX, expected = FAILS; break;
        case 7: loads[below(logical)] = chance(2) ? -1 : INT64_MIN, expected = FAILS; break;
        case 8: phy2log[below(size)] = (int32_t)wrong(0), expected = ANY; break;
        case 9: tokens = NULL; break;
        case 10: info = NULL; break;
        default: break;
    }
    if (bad == 2) expected = physical > size || physical < logical ? FAILS : ANY;
    /* phy2log and tokens of a size that is accepted must be there in full. */
    if (physical > size && physical < 1000) {
        int32_t *longer = make(physical, sizeof *longer);
        for (int64_t p = 0; p < physical; p++) longer[p] = p < size ? phy2log[p] : 0;
        phy2log = longer, tokens = make(physical, sizeof *tokens), expected = ANY;
    }
    if (logical > 0 && logical < 1000 && bad == 1) {
        loads = make(logical, sizeof *loads);
        for (int64_t e = 0; e < logical; e++) loads[e] = e;
    }
    lplb_status status = lplb_solve(loads, logical, phy2log, physical, ranks, tokens, info, message, sizeof message);
    if (status == LPLB_OK && info != NULL && (!info->certified || info->max_load != info->bound)) fail("lplb_solve: not certified");
    check("lplb_solve", status, expected, message);
    if (status == LPLB_OK) { /* a placement that can be solved has homes */
        int32_t *homes = make(logical, sizeof *homes), *former = chance(2) ? NULL : make(logical, sizeof *former);
        for (int64_t e = 0; former != NULL && e < logical; e++) former[e] = (int32_t)below(physical);
        const int spoilt = former != NULL && chance(4);
        if (spoilt) former[below(logical)] = (int32_t)(chance(2) ? physical : -1 - below(9));
        memset(message, 'x', sizeof message);
        check("lplb_placement_homes",
              lplb_placement_homes(phy2log, physical, logical, ranks, former, homes, message, sizeof message), spoilt ? FAILS : OK, message);
        for (int64_t e = 0; !spoilt && e < logical; e++)
            if (homes[e] < 0 || homes[e] >= physical || phy2log[homes[e]] != e) fail("the home of %" PRId64 " does not hold it", e);
        rows_and_moves(phy2log, physical, logical, ranks);
    }
    drop("lplb_solve");
}

/* Exchanges need GPUs, so what can be tried everywhere is their configuration: it is refused, with or without CUDA. */
static void exchange_config(void) {
    static const lplb_rail_ops no_rail = {(int64_t)sizeof(lplb_rail_ops), NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    const lplb_exchange_config fresh = LPLB_EXCHANGE_CONFIG_INIT;
    lplb_exchange_config *config = make(1, sizeof *config);
    *config = fresh;
    config->n_ranks = 1 + below(8);
    config->rank = below(config->n_ranks);
    config->n_counts = 1 + below(LPLB_MAX_LOGICAL);
    int expected = OK;
    switch (chance(3) ? 0 : 1 + below(11)) {
        case 1: config->struct_size = wrong_size(fresh.struct_size), expected = FAILS; break;
        case 2: config->n_ranks = wrong(config->n_ranks), expected = ANY; break;
        case 3: config->rank = chance(2) ? config->n_ranks : -1 - below(9), expected = FAILS; break;
        case 4: config->n_counts = wrong(config->n_counts), expected = ANY; break;
        case 5: config->n_nodes = wrong(1), expected = ANY; break; /* several nodes without a rail */
        case 6: config->node = wrong(0), expected = ANY; break;
        case 7: config->timeout_ms = wrong(30000), expected = ANY; break;
        case 8: config->first_epoch = wrong(1), expected = ANY; break;
        case 9: config->policy = (int32_t)wrong(0), expected = ANY; break;
        case 10: config->n_nodes = 2, config->rail = &no_rail, expected = FAILS; break; /* a rail that cannot gather */
        case 11: config = NULL, expected = FAILS; break;
        default: break;
    }
    int64_t *bytes = make(1, sizeof *bytes);
    memset(message, 'x', sizeof message);
    check("lplb_exchange_buffer_bytes", lplb_exchange_buffer_bytes(config, bytes, message, sizeof message), expected, message);
    lplb_exchange *exchange = NULL;
    memset(message, 'x', sizeof message);
    check("lplb_exchange_create", lplb_exchange_create(config, NULL, &exchange, message, sizeof message), FAILS, message);
    if (expected == FAILS) { /* a valid one would need a GPU */
        void *blob = make(1, LPLB_EXCHANGE_BLOB_BYTES);
        memset(message, 'x', sizeof message);
        check("lplb_exchange_begin", lplb_exchange_begin(config, &exchange, blob, message, sizeof message), FAILS, message);
    }
    if (exchange != NULL) fail("a refused exchange was written");
    drop("lplb_exchange_create");
}

/* lplb_exchange_connect by a gather that brings this rank's bytes as everybody's, or nothing, or other bytes: on CPUs it never succeeds. */
static struct { int64_t n_ranks; int fails, spoils; } echo;

static int32_t echoed(void *context, const void *mine, void *all, int64_t bytes) {
    (void)context;
    for (int64_t rank = 0; rank < echo.n_ranks; rank++) {
        memcpy((unsigned char *)all + rank * bytes, mine, (size_t)bytes);
        if (bytes > 16) memcpy((unsigned char *)all + rank * bytes + 8, &rank, sizeof rank);
    }
    if (echo.spoils) ((unsigned char *)all)[below(echo.n_ranks * bytes)] ^= (unsigned char)(1 + below(255));
    return echo.fails;
}

static void connect_config(void) {
    const lplb_connect_config fresh = LPLB_CONNECT_CONFIG_INIT;
    lplb_connect_config *config = make(1, sizeof *config);
    *config = fresh;
    config->n_ranks = 1 + below(8), config->rank = below(config->n_ranks), config->n_counts = 1 + below(LPLB_MAX_LOGICAL);
    config->gather = echoed;
    echo.n_ranks = config->n_ranks, echo.fails = 0, echo.spoils = chance(4);
    int expected = echo.spoils ? FAILS : LPLB_ERROR_UNSUPPORTED; /* a rank on the CPU */
    switch (chance(3) ? 0 : 1 + below(12)) {
        case 1: config->struct_size = wrong_size(fresh.struct_size), expected = FAILS; break;
        case 2: config->n_ranks = wrong(config->n_ranks) < 0 ? -1 : 0, expected = FAILS; break;
        case 3: config->rank = chance(2) ? config->n_ranks : -1 - below(9), expected = FAILS; break;
        case 4: config->n_counts = wrong(config->n_counts), expected = FAILS; break;
        case 5: config->n_nodes = wrong(1), expected = FAILS; break;
        case 6: config->timeout_ms = wrong(30000), expected = FAILS; break;
        case 7: config->first_epoch = wrong(1), expected = FAILS; break;
        case 8: config->policy = (int32_t)wrong(0), expected = FAILS; break;
        case 9: config->failure = "this rank has no GPU \xE9\xFF", expected = FAILS; break;
        case 10: echo.fails = (int32_t)wrong(0), expected = echo.fails ? LPLB_ERROR_PEER_LOST : FAILS; break;
        case 11: config->gather = NULL, expected = FAILS; break;
        case 12: config = NULL, expected = FAILS; break;
        default: break;
    }
    lplb_exchange *exchange = NULL;
    memset(message, 'x', sizeof message);
    check("lplb_exchange_connect", lplb_exchange_connect(config, &exchange, message, sizeof message), expected, message);
    if (exchange != NULL) fail("a refused exchange was handed out");
    drop("lplb_exchange_connect");
}

/* Replicas need an exchange, and that needs GPUs, so that every config is refused here. */
static void replicas_config(void) {
    const lplb_replicas_config fresh = LPLB_REPLICAS_CONFIG_INIT;
    lplb_replicas_config *config = make(1, sizeof *config);
    *config = fresh;
    config->n_logical = 1 + below(100), config->n_rows = 1 + below(100);
    switch (below(6)) {
        case 0: config->struct_size = wrong_size(fresh.struct_size); break;
        case 1: config->n_logical = wrong(1); break;
        case 2: config->n_rows = wrong(1); break;
        case 3: config->blocks = wrong(0); break;
        case 4: config = NULL; break;
        default: break;
    }
    lplb_replicas *replicas = NULL;
    memset(message, 'x', sizeof message);
    check("lplb_replicas_create", lplb_replicas_create(config, &replicas, message, sizeof message), LPLB_ERROR_INVALID_ARGUMENT, message);
    if (replicas != NULL) fail("refused replicas were handed out");
    drop("lplb_replicas_create");
}

static void refused_replicas(const char *call, lplb_status status) {
    check(call, status, LPLB_ERROR_INVALID_ARGUMENT, lplb_replicas_error(NULL));
}

static void refused_exchange(const char *call, lplb_status status) {
    check(call, status, LPLB_ERROR_INVALID_ARGUMENT, lplb_exchange_error(NULL));
}

static void refused(const char *call, lplb_status status) { check(call, status, LPLB_ERROR_INVALID_ARGUMENT, lplb_planner_error(NULL)); }

static void null_handles(void) {
    int32_t i32[1] = {0};
    int64_t i64[1] = {0};
    float f32[1] = {0};
    double f64[1] = {0};
    refused("place", lplb_planner_place(NULL, f64, NULL));
    refused("set_placement", lplb_planner_set_placement(NULL, i32, 1, NULL));
    refused("max_replicas", lplb_planner_max_replicas(NULL, i64));
    refused("phy2log", lplb_planner_phy2log(NULL, i32, 1));
    refused("log2phy", lplb_planner_log2phy(NULL, i32, 1, 1));
    refused("logcnt", lplb_planner_logcnt(NULL, i32, 1));
    refused("count", lplb_planner_count(NULL, i64, LPLB_INT64, 1, i32, NULL, 1, NULL));
    refused("solve", lplb_planner_solve(NULL, i64, LPLB_INT64, 1, NULL, NULL, NULL, LPLB_INT64, NULL));
    refused("redirect", lplb_planner_redirect(NULL, i64, LPLB_INT64, 1, i64, 0, NULL));
    refused("redirect_by_ratio", lplb_planner_redirect_by_ratio(NULL, i64, LPLB_INT64, 1, f32, i32, 1, i64, NULL));
    refused("run", lplb_planner_run(NULL, i64, LPLB_INT64, 1, NULL, i64, NULL, LPLB_INT64, 0, NULL));
    refused("info", lplb_planner_info(NULL, NULL, NULL, 0, NULL));
    refused("split", lplb_planner_split(NULL, i64, 1, NULL));
    refused("assignment", lplb_planner_assignment(NULL, i64, 1, NULL));
    refused("history", lplb_planner_history(NULL, LPLB_ANY_PLAN, i64, 1, NULL, NULL));
    refused("get_metrics", lplb_planner_get_metrics(NULL, NULL));
    refused("reset", lplb_planner_reset(NULL, LPLB_RECORD_METRICS, NULL));
    refused("layout", lplb_planner_layout(NULL, NULL, NULL));
    refused("attach_exchange", lplb_planner_attach_exchange(NULL, NULL));
    refused_exchange("finish", lplb_exchange_finish(NULL, i64));
    refused_exchange("all_gather", lplb_exchange_all_gather(NULL, i32, i32, NULL));
    refused_exchange("set_limits", lplb_exchange_set_limits(NULL, LPLB_EXCHANGE_TRAP, 1));
    refused_exchange("get_report", lplb_exchange_get_report(NULL, NULL));
    lplb_exchange_abort(NULL);
    lplb_exchange_close(NULL);
    lplb_exchange_destroy(NULL);
    lplb_planner_destroy(NULL);
    const lplb_replicas_tensor tensor = LPLB_REPLICAS_TENSOR_INIT;
    void *memory = NULL;
    refused_replicas("add", lplb_replicas_add(NULL, &tensor, &memory));
    refused_replicas("place", lplb_replicas_place(NULL, i32, NULL));
    refused_replicas("pull", lplb_replicas_pull(NULL, 0, NULL));
    refused_replicas("push", lplb_replicas_push(NULL, NULL));
    lplb_replicas_close(NULL);
    lplb_replicas_destroy(NULL);
    for (int32_t status = -2; status < 12; status++)
        if (lplb_status_string(status)[0] == 0) fail("status %d has no text", status);
    if (lplb_version() != LPLB_VERSION) fail("header %d, library %d", LPLB_VERSION, lplb_version());
}

/* lplb_agree among up to 5 ranks, whose gather this program plays: first it takes down what each rank brings, then it shows it to all. */
enum { RECORD = 1024, MOST_RANKS = 5 };
static struct { int showing, n_ranks; unsigned char records[MOST_RANKS][RECORD]; } meeting;

static int32_t meet(void *context, const void *mine, void *all, int64_t bytes) {
    if (bytes != RECORD) fail("lplb_agree gathers %" PRId64 " bytes", bytes);
    if (!meeting.showing) {
        memcpy(meeting.records[*(const int *)context], mine, RECORD);
        return 1;
    }
    memcpy(all, meeting.records, (size_t)meeting.n_ranks * RECORD);
    return 0;
}

static void agree(void) {
    meeting.n_ranks = 1 + (int)below(MOST_RANKS);
    lplb_config common = LPLB_CONFIG_INIT;
    common.ep_size = meeting.n_ranks;
    common.n_logical = meeting.n_ranks * (1 + below(4));
    common.n_physical = common.n_logical;
    const int odd = (int)below(meeting.n_ranks), bad = chance(2) ? 0 : 1 + (int)below(8);
    static double history[MOST_RANKS * 5];
    for (int i = 0; i < MOST_RANKS * 5; i++) history[i] = (double)below(100);
    lplb_status statuses[MOST_RANKS];
    char words[MOST_RANKS][256];
    for (meeting.showing = 0; meeting.showing < 2; meeting.showing++) {
        if (meeting.showing && bad == 7) meeting.records[odd][below(32)] ^= (unsigned char)(1 + below(255));
        for (int rank = 0; rank < meeting.n_ranks; rank++) {
            lplb_config config = common;
            lplb_agree_config asked = LPLB_AGREE_CONFIG_INIT;
            asked.planner = &config, asked.n_ranks = meeting.n_ranks, asked.rank = rank, asked.gather = meet, asked.context = &rank;
            asked.history = bad == 3 && rank == odd ? NULL : history;
            asked.settings = bad == 4 && rank == odd ? "other \xE9\xFF words" : "words";
            if (bad == 1 && rank == odd) config.n_logical += meeting.n_ranks, config.n_physical += meeting.n_ranks;
            if (bad == 2 && rank == odd) config.n_physical = common.n_physical - 1 - below(100);
            if (bad == 5 && rank == odd) asked.failure = "this rank is out of memory", asked.planner = chance(2) ? NULL : &config;
            if (bad == 6 && rank == odd) config.struct_size = wrong_size(config.struct_size);
            if (bad == 8) asked.rank = wrong(rank) < 0 ? -1 : meeting.n_ranks;
            lplb_agreement agreed;
            memset(&agreed, 0, sizeof agreed);
            agreed.struct_size = sizeof agreed;
            words[rank][0] = 0;
            statuses[rank] = lplb_agree(&asked, &agreed, words[rank], sizeof words[rank]);
            check("lplb_agree", statuses[rank], !meeting.showing ? FAILS : bad == 0 ? OK : ANY, words[rank]);
        }
    }
    for (int rank = 1; rank < meeting.n_ranks && bad != 8; rank++) { /* a rank that is no number of theirs is refused before it meets others */
        if (statuses[rank] != statuses[0] || strcmp(words[rank], words[0]) != 0)
            fail("lplb_agree: rank 0 was told %d '%s', rank %d %d '%s'", statuses[0], words[0], rank, statuses[rank], words[rank]);
    }
    const int differs = (bad == 1 || bad == 3 || bad == 4) && meeting.n_ranks > 1;
    if (differs && statuses[0] != LPLB_ERROR_DISAGREEMENT) fail("lplb_agree: differing ranks got %d '%s'", statuses[0], words[0]);
    if ((bad == 2 || bad == 5 || bad == 6 || bad == 8) && statuses[0] == LPLB_OK) fail("lplb_agree accepted what rank %d gave", odd);
}

#endif
