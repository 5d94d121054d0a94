#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"

namespace bmm {

// out = sum_t weights[t] * inputs[t], off-diagonal elements times `shrink`, plus ridge * I, in one pass over
// `out.rows / out.cols` square matrices one below the other.
//   inputs   contiguous, f32 or f64 each, of the shape of out; out may be one of them, but not overlap one otherwise
//   ridges   one for all matrices, or one for each
//   out      contiguous, f32 or f64: also the type of the sum
struct Input {
    const void* data;
    DType dtype;
};
void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, const std::vector<double>& ridges,
              double shrink, const View& out, int threads);

}  // namespace bmm
