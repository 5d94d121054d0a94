#pragma once

#include <string>

#include "common/view.h"

namespace bmm {

// G += X^T diag(w) X on the upper triangle, then mirrored: G must be symmetric on entry and is exactly so on return.
//   x        rows (k, n), any strides, f32 | f16 | bf16 (accumulated in float) or f64 (accumulated in double)
//   weights  null, or k values of the accumulation type, finite and >= 0; rows of weight 0 are never read
//   g        (n, n), column stride 1, f32 or f64: the accumulation type
//   isa      "" for the best that this machine runs, or a name from isa_names()
// The bits depend on the instruction set and on how rows are chunked over calls, not on the thread count.
void gram(const View& x, const void* weights, const View& g, int threads, const std::string& isa);

// C += X^T diag(w) Y, and, unless g.data is null, G += Y^T diag(w) Y from the same packed rows.
//   x, y  rows (k, m) and (k, n), as for gram, of one type
//   c     (m, n), column stride 1, the accumulation type; g as for gram
void cross_gram(const View& x, const View& y, const void* weights, const View& c, const View& g, int threads,
                const std::string& isa);

}  // namespace bmm
