#pragma once

// A product of two matrices in float32 or float64, tile by tile: a block of 256 threads computes one tile of the
// result, its depth in stages of kDepth. While one stage is multiplied out of shared memory, the next is on its way
// from global memory; the operands (residual.cu, spectral.cu) decide what is formed out of what they load. float32 is
// multiplied as float32 (the tensor cores have no such product), float64 on the tensor cores.

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace bmm::cuda {

constexpr int kProductThreads = 256;  // 8 warps, 4 one below the other and 2 side by side
constexpr int kDepth = 8;

// The tile of a block. Large ones load less per product; small ones keep more processors busy.
template <class T, bool kLarge>
struct Tile {
    using Element = T;
    static constexpr int warp_rows = kLarge ? 32 : 16;
    static constexpr int warp_cols = kLarge && sizeof(T) == 4 ? 64 : 32;
    static constexpr int rows = 4 * warp_rows;
    static constexpr int cols = 2 * warp_cols;
    // A panel holds one stage of an operand, one line per depth. The four extra elements put a warp's accesses into
    // different banks and keep 16-byte alignment.
    static constexpr int left_pitch = rows + 4;
    static constexpr int right_pitch = cols + 4;
};

template <class Shape>
struct Panels {
    alignas(16) typename Shape::Element left[2][kDepth * Shape::left_pitch];
    alignas(16) typename Shape::Element right[2][kDepth * Shape::right_pitch];
};

// A thread's share of the tile, as sums and where they belong.
template <class Shape, class T = typename Shape::Element>
class Sums;

template <class Shape>
class Sums<Shape, float> {
   public:
    static constexpr int kRun = 4;  // sums that lie side by side in a row

    __device__ Sums() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        // Neighbouring lanes differ in their row, so that half a warp reads 128 bytes of either panel.
        row_ = warp / 2 * Shape::warp_rows + (lane / 16 * 2 + lane % 2) * 4;
        col_ = warp % 2 * Shape::warp_cols + lane / 2 % 8 * 4;
    }

    __device__ void multiply(const float* left, const float* right) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
            float a[kRows], b[kCols];
#pragma unroll
            for (int i = 0; i < kRows; i += 4) load_four(left + k * Shape::left_pitch + row_ + 4 * i, a + i);
#pragma unroll
            for (int j = 0; j < kCols; j += 4) load_four(right + k * Shape::right_pitch + col_ + 8 * j, b + j);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int j = 0; j < kCols; ++j) sum_[i][j] = fmaf(a[i], b[j], sum_[i][j]);
            }
        }
    }

    // take(row, col, values): kRun values beginning there. The sums start again from 0.
    template <class Take>
    __device__ void flush(const Take& take) {
        const int row = opaque(row_), col = opaque(col_);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kCols; j += 4) {
                const float values[kRun] = {sum_[i][j], sum_[i][j + 1], sum_[i][j + 2], sum_[i][j + 3]};
                take(row + 16 * (i / 4) + i % 4, col + 8 * j, values);
#pragma unroll
                for (int v = 0; v < kRun; ++v) sum_[i][j + v] = 0;
            }
        }
    }

   private:
    static constexpr int kRows = Shape::warp_rows / 4;
    static constexpr int kCols = Shape::warp_cols / 8;

    __device__ static void load_four(const float* source, float* values) {
        const float4 four = *reinterpret_cast<const float4*>(source);
        values[0] = four.x;
        values[1] = four.y;
        values[2] = four.z;
        values[3] = four.w;
    }

    int row_, col_;
    float sum_[kRows][kCols] = {};
};

template <class Shape>
class Sums<Shape, double> {
   public:
    static constexpr int kRun = 2;

    __device__ Sums() {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        row_ = warp / 2 * Shape::warp_rows + lane / 4;
        col_ = warp % 2 * Shape::warp_cols;
        lane_in_group_ = lane % 4;
    }

    __device__ void multiply(const double* left, const double* right) {
        static_assert(kDepth == 8);
        double a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                a[i][v] = left[(lane_in_group_ + v / 2 * 4) * Shape::left_pitch + row_ + 16 * i + v % 2 * 8];
            }
        }
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
            double b[2];
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                b[v] = right[(lane_in_group_ + 4 * v) * Shape::right_pitch + col_ + 8 * j + threadIdx.x % 32 / 4];
            }
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) multiply_add_16x8x8(sum_[i][j], a[i], b);
        }
    }

    template <class Take>
    __device__ void flush(const Take& take) {
        const int row = opaque(row_), col = opaque(col_ + 2 * lane_in_group_);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const double values[kRun] = {sum_[i][j][2 * half], sum_[i][j][2 * half + 1]};
                    take(row + 16 * i + 8 * half, col + 8 * j, values);
                    sum_[i][j][2 * half] = sum_[i][j][2 * half + 1] = 0;
                }
            }
        }
    }

   private:
    static constexpr int kRowTiles = Shape::warp_rows / 16;
    static constexpr int kColTiles = Shape::warp_cols / 8;

    int row_, col_, lane_in_group_;
    double sum_[kRowTiles][kColTiles][4] = {};
};

// How a block's threads load one stage of an operand whose depth is contiguous in memory: each kRun consecutive depths
// of one of the kLines rows (of the left operand) or columns (of the right one).
template <class T, int kLines, int kPitch>
struct AlongDepth {
    static constexpr int kRun = kLines * kDepth / kProductThreads;

    __device__ static int line() { return threadIdx.x / (kDepth / kRun); }
    __device__ static int depth() { return threadIdx.x % (kDepth / kRun) * kRun; }
    __device__ static void put(T* panel, int v, T value) { panel[(depth() + v) * kPitch + line()] = value; }
};

// The same for one whose lines are contiguous in memory: each kRun consecutive lines at one depth.
template <class T, int kLines, int kPitch>
struct AcrossDepth {
    static constexpr int kRun = kLines * kDepth / kProductThreads;

    __device__ static int line() { return threadIdx.x % (kLines / kRun) * kRun; }
    __device__ static int depth() { return threadIdx.x / (kLines / kRun); }
    __device__ static T* place(T* panel) { return panel + depth() * kPitch + line(); }

    // Starts copying the run that begins at `source`, of which `valid` elements are there, into the panel.
    __device__ static void copy(T* panel, const T* source, int valid, bool aligned) {
        if (aligned) {
            copy_async<kRun * sizeof(T)>(place(panel), source, valid * static_cast<int>(sizeof(T)));
            return;
        }
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
            const bool there = v < valid;
            copy_async<sizeof(T)>(place(panel) + v, source + (there ? v : 0), there ? sizeof(T) : 0);
        }
    }
};

// Adds up left * right over `segments` products of the same depth, one after the other, and flushes each to
// take(segment, row, col, values). An operand has begin(segment, k, panel), which starts loading the stage at depth k,
// and finish(segment, panel), after which the panel is complete as far as this thread fills it.
template <class Shape, class Left, class Right, class Take>
__device__ void multiply_stages(Left& left, Right& right, int segments, int depth, Panels<Shape>& panels,
                                const Take& take) {
    Sums<Shape> sums;
    left.begin(0, 0, panels.left[0]);
    right.begin(0, 0, panels.right[0]);
    left.finish(0, panels.left[0]);
    right.finish(0, panels.right[0]);
    __syncthreads();
    int stage = 0;
    for (int segment = 0; segment < segments; ++segment) {
        for (int k = 0; k < depth; k += kDepth) {
            const bool ends = k + kDepth >= depth;
            const int next = segment + ends;
            // The other stage's panels were last read before the barrier that ended the round before.
            if (next < segments) {
                left.begin(next, ends ? 0 : k + kDepth, panels.left[stage ^ 1]);
                right.begin(next, ends ? 0 : k + kDepth, panels.right[stage ^ 1]);
            }
            sums.multiply(panels.left[stage], panels.right[stage]);
            if (next < segments) {
                left.finish(next, panels.left[stage ^ 1]);
                right.finish(next, panels.right[stage ^ 1]);
            }
            __syncthreads();
            stage ^= 1;
        }
        sums.flush([&](int row, int col, const auto& values) { take(segment, row, col, values); });
    }
}

// Whether runs of up to four elements that begin at a multiple of four in any line can be loaded at once.
inline bool loads_at_once(const void* data, DType dtype, std::int64_t stride, std::int64_t other_stride = 0) {
    const std::size_t bytes = dtype == DType::f16 || dtype == DType::bf16 ? 8 : 16;
    return is_aligned(data, bytes) && stride % 4 == 0 && other_stride % 4 == 0;
}

// Whether the large tiles of a result keep all processors busy.
template <class T>
bool large_tiles_suffice(std::int64_t rows, std::int64_t cols, std::int64_t members, int processors) {
    using Large = Tile<T, true>;
    return ceil_div(rows, Large::rows) * ceil_div(cols, Large::cols) * members >= processors;
}

template <class Shape>
dim3 product_grid(std::int64_t rows, std::int64_t cols, std::int64_t members) {
    const std::int64_t down = ceil_div(rows, Shape::rows);
    BMM_CHECK(down <= 65535, rows, " rows");
    return dim3(static_cast<unsigned>(ceil_div(cols, Shape::cols)), static_cast<unsigned>(down),
                static_cast<unsigned>(members));
}

}  // namespace bmm::cuda
