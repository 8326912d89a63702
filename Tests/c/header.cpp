// lplb.h alone, as C++17: plain structs, C linkage, and initialisers that C++ accepts too.
#include "lplb.h"

#include <type_traits>

static_assert(std::is_trivially_copyable_v<lplb_config> && std::is_standard_layout_v<lplb_config>);
static_assert(std::is_trivially_copyable_v<lplb_group_info> && std::is_standard_layout_v<lplb_group_info>);
static_assert(std::is_trivially_copyable_v<lplb_plan_info> && std::is_standard_layout_v<lplb_plan_info>);
static_assert(std::is_trivially_copyable_v<lplb_metrics> && std::is_standard_layout_v<lplb_metrics>);
static_assert(std::is_trivially_copyable_v<lplb_exchange_config> && std::is_standard_layout_v<lplb_exchange_config>);

lplb_config configOfDefaults() {
    lplb_config config = LPLB_CONFIG_INIT;
    return config;
}

lplb_plan_info infoOfDefaults() {
    lplb_plan_info info = LPLB_PLAN_INFO_INIT;
    return info;
}

lplb_metrics metricsOfDefaults() {
    lplb_metrics metrics = LPLB_METRICS_INIT;
    return metrics;
}

lplb_exchange_config exchangeConfigOfDefaults() {
    lplb_exchange_config config = LPLB_EXCHANGE_CONFIG_INIT;
    return config;
}
