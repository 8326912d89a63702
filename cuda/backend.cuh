// The functions behind lplbk_backend (kernels.h), each defined in the file that is named for what it does.
#pragma once

#include <type_traits>

#include "kernels.h"

// Declares lplbk_<name> with the type of the field.
#define LPLBK_FUNCTION(name, field) extern "C" std::remove_pointer_t<decltype(lplbk_backend::field)> lplbk_##name

// device.cu
LPLBK_FUNCTION(error_kind, error_kind);
LPLBK_FUNCTION(error_name, error_name);
LPLBK_FUNCTION(device_count, device_count);
LPLBK_FUNCTION(device_info_of, device_info);
LPLBK_FUNCTION(alloc, alloc);
LPLBK_FUNCTION(free, free);
LPLBK_FUNCTION(upload, upload);
LPLBK_FUNCTION(download, download);
LPLBK_FUNCTION(alloc_mapped, alloc_mapped);
LPLBK_FUNCTION(free_mapped, free_mapped);
// place.cu
LPLBK_FUNCTION(open, open);
LPLBK_FUNCTION(close, close);
LPLBK_FUNCTION(place, place);
LPLBK_FUNCTION(set_capacity, set_capacity);
LPLBK_FUNCTION(set_digest, set_digest);
LPLBK_FUNCTION(read, read);
LPLBK_FUNCTION(read_history, read_history);
// count.cu, solve.cu, rewrite.cu, run.cu, layout.cu
LPLBK_FUNCTION(count, count);
LPLBK_FUNCTION(count_row, count_row);
LPLBK_FUNCTION(make_row, make_row);
LPLBK_FUNCTION(solve, solve);
LPLBK_FUNCTION(solve_rows, solve_rows);
LPLBK_FUNCTION(redirect, redirect);
LPLBK_FUNCTION(redirect_by_ratio, redirect_by_ratio);
LPLBK_FUNCTION(run, run);
LPLBK_FUNCTION(run_exchanging, run_exchanging);
LPLBK_FUNCTION(lay_out, lay_out);
// metrics.cu
LPLBK_FUNCTION(reset, reset);
// exchange.cu
LPLBK_FUNCTION(exchange_alloc, exchange_alloc);
LPLBK_FUNCTION(exchange_fill, exchange_fill);
LPLBK_FUNCTION(exchange_export, exchange_export);
LPLBK_FUNCTION(exchange_import, exchange_import);
LPLBK_FUNCTION(exchange_unimport, exchange_unimport);
LPLBK_FUNCTION(exchange_identity, exchange_identity);
LPLBK_FUNCTION(exchange_reach, exchange_reach);
LPLBK_FUNCTION(exchange_settle, exchange_settle);
LPLBK_FUNCTION(exchange_open, exchange_open);
LPLBK_FUNCTION(exchange_close, exchange_close);
LPLBK_FUNCTION(exchange_launch, exchange_launch);
// replicas.cu
LPLBK_FUNCTION(replicas_prepare, replicas_prepare);
LPLBK_FUNCTION(replicas_allocation, replicas_allocation);
LPLBK_FUNCTION(replicas_pull, replicas_pull);
LPLBK_FUNCTION(replicas_push, replicas_push);

#undef LPLBK_FUNCTION
