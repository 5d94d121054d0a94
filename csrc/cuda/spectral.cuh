#pragma once

#include <cstdint>

#include "common/view.h"

namespace bmm::cuda {

// out = scale * anchor + (1 - scale) * base + (projected * shrinkage) eigenvectors^T, on the given stream of the given
// device.
//   out, anchor, base  (rows, cols) in any dtype and with any strides; base without data for none; out may be one of
//                      the others with the same strides
//   projected          (rows, cols), f32 or f64, col_stride 1: also the type of the sum, rounded once to that of out
//   shrinkage          cols numbers of that type
//   eigenvectors       (cols, cols) of that type, one of the strides 1
void apply_spectral(const View& out, const View& anchor, const View& base, const View& projected, const void* shrinkage,
                    const View& eigenvectors, double scale, int device, std::uintptr_t stream);

}  // namespace bmm::cuda
