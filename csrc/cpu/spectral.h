#pragma once

#include <string>

#include "common/view.h"

namespace bmm {

// out = scale * anchor + (1 - scale) * base + B diag(shrinkage) Q^T in one pass, rounded once.
//   projected     B (m, n), f32 or f64: the type of all sums
//   shrinkage     n values of that type
//   eigenvectors  Q (n, n), that type; packed without a transposition when its rows have stride 1 (as from LAPACK)
//   anchor, base  (m, n), any strides and floating types; base.data null when scale is 1
//   out           (m, n), any strides and floating type; may be anchor or base
void spectral(const View& projected, const void* shrinkage, const View& eigenvectors, const View& anchor,
              const View& base, double scale, const View& out, int threads, const std::string& isa);

}  // namespace bmm
