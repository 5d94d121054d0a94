#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"

namespace bmm::cuda {

// out = sum_t weights[t] * inputs[t], entries off the diagonal times `shrink`, then + ridges[member] * I, on the given
// stream of the given device, in one pass per kInputsPerPass inputs; `out.rows / out.cols` square matrices (members)
// one below the other.
//   inputs   device memory, contiguous, f32 or f64 each, of the shape of out; out may be one of them
//   ridges   one for all members, or one for each
//   out      device memory, contiguous, f32 or f64: also the type of the sum
struct Input {
    const void* data;
    DType dtype;
};
constexpr int kInputsPerPass = 32;

void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, const std::vector<double>& ridges,
              double shrink, const View& out, int device, std::uintptr_t stream);

}  // namespace bmm::cuda
