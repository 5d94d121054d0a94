#pragma once

// The instructions that CUDA C++ has no name for.

#include <cuda_runtime.h>

namespace bmm::cuda {

// Starts copying kBytes (4, 8 or 16; both addresses aligned to them) from global to shared memory. Only the first
// `valid_bytes` are read; the others become 0.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, int valid_bytes) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(address), "l"(global), "r"(valid_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(address), "l"(global), "n"(kBytes), "r"(valid_bytes)
                     : "memory");
    }
}

// Waits for all copies that this thread has started; other threads see them after the next barrier.
__device__ inline void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The value itself, which the compiler cannot see through: what is computed from it stays where it is written, in place
// of being computed ahead of a loop and kept in registers.
__device__ inline int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// A warp's c (16 x 8) += a (16 x 8) b (8 x 8) in float64, each step a fused multiply-add. With lane = 4 g + l:
//   a = A[g][l], A[g + 8][l], A[g][l + 4], A[g + 8][l + 4]      b = B[l][g], B[l + 4][g]
//   c = C[g][2 l], C[g][2 l + 1], C[g + 8][2 l], C[g + 8][2 l + 1]
__device__ inline void multiply_add_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the depth
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
            asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+d"(c[2 * rows]), "+d"(c[2 * rows + 1])
                : "d"(a[2 * half + rows]), "d"(b[half]));
        }
    }
#endif
}

}  // namespace bmm::cuda
