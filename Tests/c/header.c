/* lplb.h alone, as C99; and the layout that compiled callers and the Python shim rely on. */
#include "lplb.h"

#include <stddef.h>

#define CHECK(name, condition) typedef char check_##name[(condition) ? 1 : -1]

CHECK(version, LPLB_VERSION == 10000 * LPLB_VERSION_MAJOR + 100 * LPLB_VERSION_MINOR + LPLB_VERSION_PATCH);
CHECK(status_size, sizeof(lplb_status) == 4 && sizeof(lplb_dtype) == 4);
CHECK(config_size, sizeof(lplb_config) == 104);
CHECK(config_ep_size, offsetof(lplb_config, ep_size) == 16);
CHECK(config_r2o, offsetof(lplb_config, r2o) == 72);
CHECK(config_policy, offsetof(lplb_config, policy) == 88);
CHECK(agree_config_size, sizeof(lplb_agree_config) == 80);
CHECK(agreement_size, sizeof(lplb_agreement) == 40);
CHECK(group_size, sizeof(lplb_group_info) == 48 + LPLB_MAX_RANKS / 8);
CHECK(group_witness, offsetof(lplb_group_info, witness) == 48);
CHECK(plan_size, sizeof(lplb_plan_info) == 56);
CHECK(metrics_size, sizeof(lplb_metrics) == 120);
CHECK(exchange_config_size, sizeof(lplb_exchange_config) == 80);
CHECK(connect_config_size, sizeof(lplb_connect_config) == 96);
CHECK(exchange_config_rail, offsetof(lplb_exchange_config, rail) == 72);
CHECK(exchange_report_size, sizeof(lplb_exchange_report) == 40);
CHECK(exchange_report_oldest, offsetof(lplb_exchange_report, peer_node) == 32); /* where an older caller's ends */
CHECK(rail_size, sizeof(lplb_rail_ops) == 64);
CHECK(replicas_config_size, sizeof(lplb_replicas_config) == 40);
CHECK(replicas_tensor_size, sizeof(lplb_replicas_tensor) == 56);
CHECK(rail_oldest, offsetof(lplb_rail_ops, abort) == 40);

lplb_config config_of_defaults(void);
lplb_plan_info info_of_defaults(void);
lplb_metrics metrics_of_defaults(void);
lplb_exchange_config exchange_config_of_defaults(void);
lplb_agree_config agree_config_of_defaults(void);
lplb_connect_config connect_config_of_defaults(void);
lplb_replicas_config replicas_config_of_defaults(void);
lplb_replicas_tensor replicas_tensor_of_defaults(void);

lplb_config config_of_defaults(void) {
    lplb_config config = LPLB_CONFIG_INIT;
    return config;
}

lplb_plan_info info_of_defaults(void) {
    lplb_plan_info info = LPLB_PLAN_INFO_INIT;
    return info;
}

lplb_metrics metrics_of_defaults(void) {
    lplb_metrics metrics = LPLB_METRICS_INIT;
    return metrics;
}

lplb_exchange_config exchange_config_of_defaults(void) {
    lplb_exchange_config config = LPLB_EXCHANGE_CONFIG_INIT;
    return config;
}

lplb_agree_config agree_config_of_defaults(void) {
    lplb_agree_config config = LPLB_AGREE_CONFIG_INIT;
    return config;
}

lplb_connect_config connect_config_of_defaults(void) {
    lplb_connect_config config = LPLB_CONNECT_CONFIG_INIT;
    return config;
}

lplb_replicas_config replicas_config_of_defaults(void) {
    lplb_replicas_config config = LPLB_REPLICAS_CONFIG_INIT;
    return config;
}

lplb_replicas_tensor replicas_tensor_of_defaults(void) {
    lplb_replicas_tensor tensor = LPLB_REPLICAS_TENSOR_INIT;
    return tensor;
}
