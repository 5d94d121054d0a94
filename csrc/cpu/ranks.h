#pragma once

#include <cstdint>

#include "cpu/magnitude.h"

namespace bmm {

// out[i][j] = r / (cols - 1), where r magnitudes of row i are smaller, or equal and further left; 1 where cols is 1.
// out is contiguous, rows x cols. Returns whether no magnitude is NaN; otherwise out holds anything.
bool magnitude_ranks(const Magnitudes& magnitudes, std::int64_t rows, std::int64_t cols, float* out, int threads);

}  // namespace bmm
