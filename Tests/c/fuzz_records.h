/* What a planner records: lplb_planner_history, lplb_planner_get_metrics, lplb_planner_reset. Histories and metrics that began together
   tell of the same tokens. */

static lplb_metrics metrics_of(const subject *s) {
    lplb_metrics found = LPLB_METRICS_INIT;
    check("lplb_planner_get_metrics", lplb_planner_get_metrics(s->handle, &found), OK, "");
    return found;
}

static void records(subject *s) {
    const int64_t n = s->config.n_logical;
    const int keeps = (s->config.record & LPLB_RECORD_HISTORY) != 0, bad = chance(2) ? 0 : 1 + (int)below(4);
    const lplb_metrics now = metrics_of(s);
    int64_t *tokens = bad == 1 ? NULL : make(n, sizeof *tokens), *plans = chance(4) ? NULL : make(1, sizeof *plans), at = LPLB_ANY_PLAN;
    if (bad == 2) at = chance(2) ? -2 - below(1000) : (INT64_C(1) << 40) + below(1000);
    lplb_status status = lplb_planner_history(s->handle, at, tokens, bad == 3 ? wrong(n) : n, plans, NULL);
    if (status == LPLB_OK && plans != NULL && s->began_together) {
        int64_t all = 0;
        for (int64_t e = 0; e < n; e++) all += tokens[e];
        if (*plans != now.plans || all != now.tokens) fail("the history has %" PRId64 " tokens, the metrics have %" PRId64, all, now.tokens);
    }
    after(s, "lplb_planner_history", status, bad != 0 && bad != 4 ? FAILS : keeps ? OK : LPLB_ERROR_WRONG_ORDER);
    lplb_metrics *found = make(1, sizeof *found);
    found->struct_size = bad == 4 ? wrong_size((int64_t)sizeof *found) : (int64_t)sizeof *found;
    status = lplb_planner_get_metrics(s->handle, found);
    if ((status == LPLB_OK) != (bad != 4)) fail("lplb_planner_get_metrics returned %d", status);
    drop("lplb_planner_get_metrics");
    const int64_t record = chance(4) ? wrong(3) : below(4);
    status = lplb_planner_reset(s->handle, record, NULL);
    if (status == LPLB_OK && (record & LPLB_RECORD_METRICS) != 0) s->metrics = metrics_of(s);
    if (status == LPLB_OK && record != 0) s->began_together = s->config.record == 3 && record == 3;
    after(s, "lplb_planner_reset", status, record >= 0 && record <= 3 ? OK : FAILS);
}
