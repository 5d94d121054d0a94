#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"

namespace bmm {

// out = sum_t weights[t] * inputs[t] + ridge * I in one pass, `out.rows / out.cols` square matrices one below the
// other.
//   inputs   contiguous, f32 or f64 each, of the shape of out; out may be one of them, but not overlap one otherwise
//   out      contiguous, f32 or f64: also the type of the sum
struct Input {
    const void* data;
    DType dtype;
};
void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, const View& out,
              int threads);

}  // namespace bmm
