#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bmm::cuda {

// Adds the histogram of the bits of |x|, as float32, to `counts`: without `upper` (-1) of their upper 16 bits, into
// 32768 bins; with it of their lower 16 bits, among the elements whose upper ones are `upper`, into 65536 bins.
//   x        `elements` elements without gaps, any dtype
//   counts   64-bit integers; whole ones, so the result does not depend on the order of the additions
void add_magnitude_histogram(const void* x, std::int64_t elements, DType dtype, std::int64_t* counts, int upper,
                             int device, std::uintptr_t stream);

}  // namespace bmm::cuda
