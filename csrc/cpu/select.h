#pragma once

#include <cstdint>

#include "cpu/magnitude.h"

namespace bmm {

// Magnitudes as the bits of a non-negative float, which order as the numbers do (NaN above infinity).
//   upper < 0   counts (32768,): how many of the values have each upper half
//   upper >= 0  counts (65536,): of those whose upper half is `upper`, how many have each lower half
// Adds to counts.
void magnitude_histogram(const Magnitudes& magnitudes, std::int64_t count, int upper, std::int64_t* counts,
                         int threads);

}  // namespace bmm
