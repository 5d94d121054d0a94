#pragma once

#include <string>
#include <vector>

#include "common/view.h"

namespace bmm {

// R = sum_t weights[t] * (experts[t] - anchor) * grams[t], the differences formed while they are packed.
//   anchor, experts  (m, n), any strides and floating types
//   grams            (n, n), any strides, f32 or f64
//   r                (m, n), column stride 1, f32 or f64: also the type of all sums; overwritten
void residual(const View& anchor, const std::vector<View>& experts, const std::vector<View>& grams,
              const std::vector<double>& weights, const View& r, int threads, const std::string& isa);

}  // namespace bmm
