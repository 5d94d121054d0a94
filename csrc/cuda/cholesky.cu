#include "cuda/cholesky.cuh"
#include "cuda/common.cuh"

namespace bmm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = kCholeskyBlock;
constexpr int kMicro = 16;          // columns that one warp factors at a time, a row in each lane's registers
constexpr int kPitch = kBlock + 1;  // of the blocks in shared memory: rows and columns spread over all banks
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
struct Call {
    Squares source, target, inverse;
    std::int32_t* info;
    int offset;
    int width;
};

template <class T>
struct Shared {
    T lower[kBlock * kPitch];
    T inverse[kBlock * kPitch];
    T reciprocal[kBlock];  // of the diagonal of `lower`
    int failed;            // order of the first minor that is not positive definite, or 0
};

__device__ constexpr int at(int row, int col) { return row * kPitch + col; }

__device__ inline float root(float value) { return sqrtf(value); }
__device__ inline double root(double value) { return sqrt(value); }

// The kMicro columns from `first` on, as far as the diagonal reaches; by one warp. Lane r holds row r, and so does lane
// r + 16. What is computed above the diagonal is not used.
template <class T>
__device__ void factor_micro(Shared<T>& shared, int first) {
    const int lane = threadIdx.x % 32, row = lane % kMicro;
    T entry[kMicro];
#pragma unroll
    for (int col = 0; col < kMicro; ++col) entry[col] = col <= row ? shared.lower[at(first + row, first + col)] : T(0);
    int failed = 0;
#pragma unroll
    for (int col = 0; col < kMicro; ++col) {
        T pivot = __shfl_sync(kWholeWarp, entry[col], col);
        if (!(pivot > 0)) {  // NaN, too
            if (failed == 0) failed = first + col + 1;
            pivot = T(1);
        }
        const T diagonal = root(pivot);
        const T reciprocal = T(1) / diagonal;
        entry[col] = row == col ? diagonal : entry[col] * reciprocal;
        if (lane == col) shared.reciprocal[first + col] = reciprocal;
#pragma unroll
        for (int later = col + 1; later < kMicro; ++later) {
            entry[later] -= entry[col] * __shfl_sync(kWholeWarp, entry[col], later);
        }
    }
#pragma unroll
    for (int col = 0; col < kMicro; ++col) {
        if (lane < kMicro && col <= row) shared.lower[at(first + row, first + col)] = entry[col];
    }
    if (lane == 0 && failed) shared.failed = failed;
}

// Rows below a factored micro block: x L^T = row, by substitution; a thread per row.
template <class T>
__device__ void solve_below(Shared<T>& shared, int first) {
    const int row = first + kMicro + static_cast<int>(threadIdx.x);
    if (row >= kBlock) return;
    T x[kMicro];
#pragma unroll
    for (int col = 0; col < kMicro; ++col) x[col] = shared.lower[at(row, first + col)];
#pragma unroll
    for (int col = 0; col < kMicro; ++col) {
        x[col] *= shared.reciprocal[first + col];
#pragma unroll
        for (int later = col + 1; later < kMicro; ++later) {
            x[later] -= x[col] * shared.lower[at(first + later, first + col)];
        }
    }
#pragma unroll
    for (int col = 0; col < kMicro; ++col) shared.lower[at(row, first + col)] = x[col];
}

// Lower triangle right of a factored micro panel: minus panel * panel^T. A warp per 16 x 16 tile, 2 x 4 entries per
// lane.
template <class T>
__device__ void update_right(Shared<T>& shared, int first) {
    const int lane = threadIdx.x % 32;
    int tile = 0;
    for (int tile_row = first + kMicro; tile_row < kBlock; tile_row += kMicro) {
        for (int tile_col = first + kMicro; tile_col <= tile_row; tile_col += kMicro, ++tile) {
            if (tile % (kThreads / 32) != static_cast<int>(threadIdx.x) / 32) continue;
            const int row = tile_row + lane % 8, col = tile_col + lane / 8 * 4;
            T sum[2][4] = {};
#pragma unroll
            for (int k = first; k < first + kMicro; ++k) {
                T left[2], right[4];
#pragma unroll
                for (int i = 0; i < 2; ++i) left[i] = shared.lower[at(row + 8 * i, k)];
#pragma unroll
                for (int j = 0; j < 4; ++j) right[j] = shared.lower[at(col + j, k)];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) shared.lower[at(row + 8 * i, col + j)] -= sum[i][j];
            }
        }
    }
}

// The diagonal micro blocks of L^-1: a thread per column, by substitution.
template <class T>
__device__ void invert_micros(Shared<T>& shared) {
    const int col = threadIdx.x;
    if (col >= kBlock) return;
    const int first = col / kMicro * kMicro;
    T x[kMicro];
#pragma unroll
    for (int row = 0; row < kMicro; ++row) x[row] = first + row == col ? T(1) : T(0);
#pragma unroll
    for (int row = 0; row < kMicro; ++row) {
        x[row] *= shared.reciprocal[first + row];
#pragma unroll
        for (int later = row + 1; later < kMicro; ++later) {
            x[later] -= x[row] * shared.lower[at(first + later, first + row)];
        }
    }
#pragma unroll
    for (int row = 0; row < kMicro; ++row) shared.inverse[at(first + row, col)] = x[row];
}

// From inverses of blocks kSize wide to inverses of pairs of them:
//   [L11    ]^-1   [      I11          ]
//   [L21 L22]    = [-I22 L21 I11   I22 ]
// L21 I11 waits in the quadrant of `lower` above its diagonal, which nobody reads. Barriers inside.
template <class T, int kSize>
__device__ void invert_pairs(Shared<T>& shared) {
    constexpr int outputs = kBlock / (2 * kSize) * kSize * kSize / kThreads;  // per thread, in one row
    constexpr int per_row = kSize / outputs;                                  // threads
    const int pair = threadIdx.x / (kSize * per_row) * 2 * kSize;             // where it begins
    const int row = threadIdx.x / per_row % kSize;
    const int col = threadIdx.x % per_row;
    T sum[outputs] = {};
#pragma unroll 8
    for (int k = 0; k < kSize; ++k) {
        const T left = shared.lower[at(pair + kSize + row, pair + k)];
#pragma unroll
        for (int j = 0; j < outputs; ++j) sum[j] += left * shared.inverse[at(pair + k, pair + col + j * per_row)];
    }
#pragma unroll
    for (int j = 0; j < outputs; ++j) {
        shared.lower[at(pair + row, pair + kSize + col + j * per_row)] = sum[j];
        sum[j] = T(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kSize; ++k) {
        const T left = shared.inverse[at(pair + kSize + row, pair + kSize + k)];
#pragma unroll
        for (int j = 0; j < outputs; ++j) {
            sum[j] += left * shared.lower[at(pair + k, pair + kSize + col + j * per_row)];
        }
    }
#pragma unroll
    for (int j = 0; j < outputs; ++j) shared.inverse[at(pair + kSize + row, pair + col + j * per_row)] = -sum[j];
    __syncthreads();
}

// One block of threads per member (x) and diagonal block (y). Rows and columns from the width on are those of an
// identity, which factors and inverts into itself.
template <class T, bool kFactor>
__global__ void __launch_bounds__(kThreads) diagonal_block_kernel(Call<T> call) {
    extern __shared__ __align__(16) unsigned char dynamic_memory[];
    Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_memory);
    const std::int64_t member = blockIdx.x;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kBlock;
    const auto place = [&](const Squares& squares, int row, int col) {
        return static_cast<T*>(squares.data) + member * squares.member_stride + (first + row) * squares.row_stride +
               first + col;
    };
    const int width = min(kBlock, call.width - static_cast<int>(first));
    if (kFactor && call.info[member] != 0) return;
    for (int entry = threadIdx.x; entry < kBlock * kBlock; entry += kThreads) {
        const int row = entry / kBlock, col = entry % kBlock;
        const bool inside = row < width && col <= row;
        shared.lower[at(row, col)] = inside ? *place(call.source, row, col) : row == col ? T(1) : T(0);
        shared.inverse[at(row, col)] = T(0);
    }
    if (threadIdx.x == 0) shared.failed = 0;
    __syncthreads();

    if constexpr (kFactor) {
        for (int micro = 0; micro < kBlock; micro += kMicro) {
            if (threadIdx.x < 32) factor_micro(shared, micro);
            __syncthreads();
            if (shared.failed) {
                if (threadIdx.x == 0) call.info[member] = call.offset + shared.failed;
                return;
            }
            solve_below(shared, micro);
            __syncthreads();
            update_right(shared, micro);
            __syncthreads();
        }
    } else {
        if (threadIdx.x < kBlock) shared.reciprocal[threadIdx.x] = T(1) / shared.lower[at(threadIdx.x, threadIdx.x)];
        __syncthreads();
    }
    invert_micros(shared);
    __syncthreads();
    invert_pairs<T, kMicro>(shared);
    invert_pairs<T, 2 * kMicro>(shared);

    for (int entry = threadIdx.x; entry < kBlock * kBlock; entry += kThreads) {
        const int row = entry / kBlock, col = entry % kBlock;
        if (row >= width || col >= width) continue;
        *place(call.inverse, row, col) = shared.inverse[at(row, col)];
        if (kFactor && col <= row) *place(call.target, row, col) = shared.lower[at(row, col)];
    }
}

template <class T, bool kFactor>
void start(const Call<T>& call, std::int64_t members, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(members), static_cast<unsigned>(ceil_div(call.width, kBlock)));
    launch("diagonal_block_kernel", diagonal_block_kernel<T, kFactor>, grid, kThreads, sizeof(Shared<T>), stream, call);
}

template <bool kFactor>
void start(const Squares& source, const Squares& target, const Squares& inverse, std::int32_t* info, int offset,
           std::int64_t members, int width, DType dtype, int device, std::uintptr_t stream) {
    BMM_CHECK(dtype == DType::f32 || dtype == DType::f64, "dtype code is ", static_cast<int>(dtype));
    BMM_CHECK(members >= 0 && members < std::int64_t{1} << 31 && width >= 0, members, " members of width ", width);
    if (members == 0 || width == 0) return;
    BMM_CHECK(source.data && target.data && inverse.data, "null pointer for ", members, " members of width ", width);
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (dtype == DType::f64) {
        start<double, kFactor>({source, target, inverse, info, offset, width}, members, cuda_stream);
    } else {
        start<float, kFactor>({source, target, inverse, info, offset, width}, members, cuda_stream);
    }
}

}  // namespace

void cholesky_factor(const Squares& source, const Squares& target, const Squares& inverse, std::int32_t* info,
                     int offset, std::int64_t members, int width, DType dtype, int device, std::uintptr_t stream) {
    BMM_CHECK(width <= kBlock, "width is ", width, ", at most ", kBlock, " is factored at once");
    BMM_CHECK(info || members == 0, "null pointer for the info of ", members, " members");
    start<true>(source, target, inverse, info, offset, members, width, dtype, device, stream);
}

void cholesky_invert(const Squares& lower, const Squares& inverse, std::int64_t members, int width, DType dtype,
                     int device, std::uintptr_t stream) {
    BMM_CHECK(width <= 65535 * kBlock, "width is ", width);
    start<false>(lower, lower, inverse, nullptr, 0, members, width, dtype, device, stream);
}

}  // namespace bmm::cuda
