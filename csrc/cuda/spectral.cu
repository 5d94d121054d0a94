#include "cuda/product.cuh"
#include "cuda/spectral.cuh"

namespace bmm::cuda {
namespace {

// A matrix in any dtype; the strides count bytes.
struct Weight {
    char* data;
    std::int64_t row_bytes;
    std::int64_t col_bytes;
    DType dtype;

    __device__ char* at(int row, int col) const { return data + row * row_bytes + col * col_bytes; }
};

Weight weight_of(const View& view) {
    const std::int64_t size = size_of(view.dtype);
    return {static_cast<char*>(view.data), view.row_stride * size, view.col_stride * size, view.dtype};
}

template <class T>
struct Problem {
    const T* projected;
    std::int64_t projected_stride;  // from row to row
    const T* shrinkage;
    const T* eigenvectors;
    std::int64_t eigenvector_stride;  // the one of its strides that need not be 1
    Weight out, anchor, base;
    int rows;
    int cols;
    T scale;
    T base_scale;            // 1 - scale
    bool projected_at_once;  // and the shrinkage
    bool eigenvectors_at_once;
};

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// B diag(shrinkage).
template <class Shape>
class Shrunk {
   public:
    using T = typename Shape::Element;

    __device__ explicit Shrunk(const Problem<T>& problem)
        : problem_(problem), row_(static_cast<int>(blockIdx.y) * Shape::rows + Lanes::line()) {}

    __device__ void begin(int, int k, T*) {
        const int depth = k + Lanes::depth();
        const int there = min(max(problem_.cols - depth, 0), Lanes::kRun);
        projected_.load(problem_.projected, dtype_of<T>, row_ * problem_.projected_stride + depth,
                        row_ < problem_.rows ? there : 0, problem_.projected_at_once);
        shrinkage_.load(problem_.shrinkage, dtype_of<T>, depth, there, problem_.projected_at_once);
    }

    __device__ void finish(int, T* panel) const {
#pragma unroll
        for (int v = 0; v < Lanes::kRun; ++v) {
            Lanes::put(panel, v, projected_.value(v, dtype_of<T>) * shrinkage_.value(v, dtype_of<T>));
        }
    }

   private:
    using Lanes = AlongDepth<T, Shape::rows, Shape::left_pitch>;

    const Problem<T>& problem_;
    const int row_;
    Raw<T, Lanes::kRun> projected_, shrinkage_;
};

// Q^T where the rows of Q have no gaps: its depth, an eigenvector's number, is contiguous.
template <class Shape>
class RowMajor {
   public:
    using T = typename Shape::Element;

    __device__ explicit RowMajor(const Problem<T>& problem)
        : problem_(problem), col_(static_cast<int>(blockIdx.x) * Shape::cols + Lanes::line()) {}

    __device__ void begin(int, int k, T*) {
        const int depth = k + Lanes::depth();
        const int valid = col_ < problem_.cols ? min(max(problem_.cols - depth, 0), Lanes::kRun) : 0;
        values_.load(problem_.eigenvectors, dtype_of<T>, col_ * problem_.eigenvector_stride + depth, valid,
                     problem_.eigenvectors_at_once);
    }

    __device__ void finish(int, T* panel) const {
#pragma unroll
        for (int v = 0; v < Lanes::kRun; ++v) Lanes::put(panel, v, values_.value(v, dtype_of<T>));
    }

   private:
    using Lanes = AlongDepth<T, Shape::cols, Shape::right_pitch>;

    const Problem<T>& problem_;
    const int col_;
    Raw<T, Lanes::kRun> values_;
};

// Q^T where each eigenvector is contiguous, as an eigensolver leaves them: copied into the panel as it is.
template <class Shape>
class ColumnMajor {
   public:
    using T = typename Shape::Element;

    __device__ explicit ColumnMajor(const Problem<T>& problem)
        : problem_(problem), col_(static_cast<int>(blockIdx.x) * Shape::cols + Lanes::line()) {}

    __device__ void begin(int, int k, T* panel) const {
        const int depth = k + Lanes::depth();
        const int valid = depth < problem_.cols ? min(max(problem_.cols - col_, 0), Lanes::kRun) : 0;
        // Where nothing is valid nothing is read; the address is kept inside the matrix all the same.
        const std::int64_t start = valid > 0 ? depth * problem_.eigenvector_stride + col_ : 0;
        Lanes::copy(panel, problem_.eigenvectors + start, valid, problem_.eigenvectors_at_once);
    }

    __device__ void finish(int, T*) const { copy_async_wait(); }

   private:
    using Lanes = AcrossDepth<T, Shape::cols, Shape::right_pitch>;

    const Problem<T>& problem_;
    const int col_;
};

template <class Shape, template <class> class Eigenvectors>
__global__ void __launch_bounds__(kProductThreads, 2)
    spectral_kernel(const __grid_constant__ Problem<typename Shape::Element> problem) {
    using T = typename Shape::Element;
    __shared__ Panels<Shape> panels;
    Shrunk<Shape> left(problem);
    Eigenvectors<Shape> right(problem);
    const int first_row = static_cast<int>(blockIdx.y) * Shape::rows;
    const int first_col = static_cast<int>(blockIdx.x) * Shape::cols;
    const auto take = [&](int, int tile_row, int tile_col, const auto& values) {
        constexpr int run = sizeof(values) / sizeof(T);
        const int row = first_row + tile_row, col = first_col + tile_col;
        if (row >= problem.rows) return;
        T sums[run];
#pragma unroll
        for (int v = 0; v < run; ++v) {
            sums[v] = values[v];
            if (col + v < problem.cols) {
                sums[v] += problem.scale * load<T>(problem.anchor.at(row, col + v), problem.anchor.dtype);
            }
        }
        if (problem.base.data) {
#pragma unroll
            for (int v = 0; v < run; ++v) {
                if (col + v < problem.cols) {
                    sums[v] += problem.base_scale * load<T>(problem.base.at(row, col + v), problem.base.dtype);
                }
            }
        }
#pragma unroll
        for (int v = 0; v < run; ++v) {
            if (col + v < problem.cols) store(problem.out.at(row, col + v), problem.out.dtype, sums[v]);
        }
    };
    multiply_stages<Shape>(left, right, 1, problem.cols, panels, take);
}

template <class T, bool kLarge>
void start(const Problem<T>& problem, bool row_major, cudaStream_t stream) {
    using Shape = Tile<T, kLarge>;
    launch("spectral_kernel", row_major ? spectral_kernel<Shape, RowMajor> : spectral_kernel<Shape, ColumnMajor>,
           product_grid<Shape>(problem.rows, problem.cols, 1), kProductThreads, 0, stream, problem);
}

template <class T>
void run(const View& out, const View& anchor, const View& base, const View& projected, const void* shrinkage,
         const View& eigenvectors, double scale, int processors, cudaStream_t stream) {
    const bool row_major = out.cols == 1 || eigenvectors.col_stride == 1;
    Problem<T> problem = {};
    problem.projected = static_cast<const T*>(projected.data);
    problem.projected_stride = projected.row_stride;
    problem.shrinkage = static_cast<const T*>(shrinkage);
    problem.eigenvectors = static_cast<const T*>(eigenvectors.data);
    problem.eigenvector_stride = row_major ? eigenvectors.row_stride : eigenvectors.col_stride;
    problem.out = weight_of(out);
    problem.anchor = weight_of(anchor);
    problem.base = weight_of(base);
    problem.rows = static_cast<int>(out.rows);
    problem.cols = static_cast<int>(out.cols);
    problem.scale = static_cast<T>(scale);
    problem.base_scale = static_cast<T>(1 - scale);
    problem.projected_at_once =
        loads_at_once(projected.data, dtype_of<T>, projected.row_stride) && loads_at_once(shrinkage, dtype_of<T>, 0);
    problem.eigenvectors_at_once = loads_at_once(eigenvectors.data, dtype_of<T>, problem.eigenvector_stride);
    if (large_tiles_suffice<T>(out.rows, out.cols, 1, processors)) {
        start<T, true>(problem, row_major, stream);
    } else {
        start<T, false>(problem, row_major, stream);
    }
}

}  // namespace

void apply_spectral(const View& out, const View& anchor, const View& base, const View& projected, const void* shrinkage,
                    const View& eigenvectors, double scale, int device, std::uintptr_t stream) {
    BMM_CHECK(out.rows < 1 << 30 && out.cols < 1 << 30, "out is ", out.rows, " x ", out.cols);
    for (const View* same : {&anchor, &base, &projected}) {
        if (same == &base && !base.data) continue;
        BMM_CHECK(same->rows == out.rows && same->cols == out.cols, same->rows, " x ", same->cols, " for out ",
                  out.rows, " x ", out.cols);
    }
    BMM_CHECK(eigenvectors.rows == out.cols && eigenvectors.cols == out.cols, eigenvectors.rows, " x ",
              eigenvectors.cols, " eigenvectors for out ", out.rows, " x ", out.cols);
    BMM_CHECK(projected.dtype == DType::f32 || projected.dtype == DType::f64, "dtype code of projected is ",
              static_cast<int>(projected.dtype));
    BMM_CHECK(eigenvectors.dtype == projected.dtype, "dtype codes are ", static_cast<int>(eigenvectors.dtype), " and ",
              static_cast<int>(projected.dtype));
    BMM_CHECK(projected.cols <= 1 || projected.col_stride == 1, "col_stride of projected is ", projected.col_stride);
    BMM_CHECK(out.cols <= 1 || eigenvectors.row_stride == 1 || eigenvectors.col_stride == 1,
              "strides of eigenvectors are ", eigenvectors.row_stride, ", ", eigenvectors.col_stride);
    if (out.rows == 0 || out.cols == 0) return;
    BMM_CHECK(shrinkage, "null pointer for ", out.cols, " numbers");
    const DeviceGuard guard(device);
    const int processors = processor_count(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (projected.dtype == DType::f64) {
        run<double>(out, anchor, base, projected, shrinkage, eigenvectors, scale, processors, cuda_stream);
    } else {
        run<float>(out, anchor, base, projected, shrinkage, eigenvectors, scale, processors, cuda_stream);
    }
}

}  // namespace bmm::cuda
