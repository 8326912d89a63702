/* 256 experts on 8 GPUs, two of each GPU's experts copied along the edges of a cube; one micro-batch is balanced, here on the CPU. */
#include <lplb.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 8, COPIES = 2, EXPERTS = 256, SLOTS = EXPERTS + RANKS * COPIES, IDS = 4096 * 8 };

static int64_t ids[IDS], slots[IDS];

int main(void) {
    /* Rank r holds a copy of an expert of rank r2o[r][0] and of one of rank r2o[r][1]. */
    const int32_t r2o[RANKS][COPIES] = {{3, 6}, {0, 7}, {1, 4}, {2, 5}, {7, 0}, {4, 1}, {5, 2}, {6, 3}};
    lplb_config config = LPLB_CONFIG_INIT;
    config.ep_size = RANKS;
    config.n_logical = EXPERTS;
    config.n_physical = SLOTS;
    config.n_redundant = COPIES;
    config.r2o = r2o[0];

    char message[256];
    lplb_planner *planner = NULL;
    if (lplb_planner_create(&config, &planner, message, sizeof message) != LPLB_OK) {
        fprintf(stderr, "%s\n", message);
        return 1;
    }

    srand(1); /* what a router chose: some ranks' experts more often than others' */
    for (int i = 0; i < IDS; i++) ids[i] = rand() % (rand() % 4 ? EXPERTS : EXPERTS / 2);

    if (lplb_planner_run(planner, ids, LPLB_INT64, IDS, NULL, slots, NULL, LPLB_INT64, 0, NULL) != LPLB_OK) {
        fprintf(stderr, "%s\n", lplb_planner_error(planner));
        return 1;
    }

    long before[RANKS] = {0}, after[RANKS] = {0}; /* tokens on each GPU: all at the originals, and by the rewritten ids */
    for (int i = 0; i < IDS; i++) before[ids[i] / (EXPERTS / RANKS)]++, after[slots[i] / (SLOTS / RANKS)]++;

    lplb_group_info group;
    if (lplb_planner_info(planner, NULL, &group, 1, NULL) != LPLB_OK) return 1;
    printf("%s\n", lplb_build_info());
    for (int r = 0; r < RANKS; r++) printf("rank %d: %ld -> %ld tokens\n", r, before[r], after[r]);
    printf("busiest %lld, bound %lld, mean %.1f: %s\n", (long long)group.max_load, (long long)group.bound, (double)group.total / RANKS,
           group.certified ? "proven optimal" : "not proven optimal");
    lplb_planner_destroy(planner);
    return group.certified ? 0 : 1;
}
