#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace bmm::cuda {

// One matrix per member of a batch, rows without gaps; strides count elements.
struct Batch {
    void* data;
    std::int64_t member_stride;
    std::int64_t row_stride;
    DType dtype;
};

// out = sum_t weights[t] * (experts[t] - anchor) grams[t] for each member, on the given stream of the given device.
//   anchor, experts  (members, rows, cols) in any dtype each; the difference is formed in the dtype of out
//   grams            (members, cols, cols), f32 or f64 each
//   out              (members, rows, cols), f32 or f64: also the type of the sum; overlaps nothing
void residual(const Batch& anchor, const std::vector<Batch>& experts, const std::vector<Batch>& grams,
              const std::vector<double>& weights, const Batch& out, std::int64_t members, std::int64_t rows,
              std::int64_t cols, int device, std::uintptr_t stream);

}  // namespace bmm::cuda
