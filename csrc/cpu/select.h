#pragma once

#include <cstdint>

#include "common/view.h"

namespace bmm {

// Magnitudes as the bits of a non-negative float, which order as the numbers do (NaN above infinity).
//   upper < 0   counts (32768,): how many of the values have each upper half
//   upper >= 0  counts (65536,): of those whose upper half is `upper`, how many have each lower half
// values is one contiguous run of any floating type (f64 is rounded to float first). Adds to counts.
void magnitude_histogram(const void* values, std::int64_t count, DType dtype, int upper, std::int64_t* counts,
                         int threads);

}  // namespace bmm
