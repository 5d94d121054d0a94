#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bmm::cuda {

// The diagonal blocks of a blocked Cholesky factorisation: the part that is no matrix product. Device memory, f32 or
// f64; on the given stream of the given device.

constexpr int kCholeskyBlock = 64;

// One square matrix per member of a batch, rows without gaps; strides count elements.
struct Squares {
    void* data;
    std::int64_t member_stride;
    std::int64_t row_stride;
};

// For each member, `source = L L^T` (width x width, width <= kCholeskyBlock, of which the lower triangle is read): L
// into the lower triangle of `target`, which may be `source`, and L^-1 into `inverse`, zeros above its diagonal.
// info[member] becomes offset + the order of the first leading minor that is not positive definite (NaN counts as
// such), and nothing else is written then; a member whose info is not 0 on entry is left alone.
void cholesky_factor(const Squares& source, const Squares& target, const Squares& inverse, std::int32_t* info,
                     int offset, std::int64_t members, int width, DType dtype, int device, std::uintptr_t stream);

// Inverts the diagonal blocks, kCholeskyBlock wide (the last one narrower), of the lower triangular `lower`
// (width x width) into the same places of `inverse`, zeros above their diagonals; the rest is neither read nor written.
void cholesky_invert(const Squares& lower, const Squares& inverse, std::int64_t members, int width, DType dtype,
                     int device, std::uintptr_t stream);

}  // namespace bmm::cuda
