#include <algorithm>

#include "cuda/product.cuh"
#include "cuda/residual.cuh"

namespace bmm::cuda {
namespace {

constexpr std::size_t kExpertsPerPass = 16;
constexpr std::int64_t kMembersPerPass = 65535;  // the grid's third dimension

template <class T>
struct Pass {
    Batch anchor;
    Batch experts[kExpertsPerPass];
    Batch grams[kExpertsPerPass];
    T weights[kExpertsPerPass];
    Batch out;
    int count;
    int rows;
    int cols;
    bool weights_at_once;  // of the anchor and the experts, and so on: runs are loaded at once
    bool grams_at_once;
    bool out_at_once;
    bool add_to_out;
};

__device__ inline std::int64_t line_start(const Batch& matrix, std::int64_t member, std::int64_t row) {
    return member * matrix.member_stride + row * matrix.row_stride;
}

__device__ inline int clamp_run(int there, int run) { return min(max(there, 0), run); }

// W_t - W_a, formed on the way from registers into the panel.
template <class Shape>
class Difference {
   public:
    using T = typename Shape::Element;

    __device__ explicit Difference(const Pass<T>& pass)
        : pass_(pass), row_(static_cast<int>(blockIdx.y) * Shape::rows + Lanes::line()) {}

    __device__ void begin(int t, int k, T*) {
        const int depth = k + Lanes::depth();
        const int valid = row_ < pass_.rows ? clamp_run(pass_.cols - depth, Lanes::kRun) : 0;
        const Batch& expert = pass_.experts[t];
        expert_.load(expert.data, expert.dtype, line_start(expert, blockIdx.z, row_) + depth, valid,
                     pass_.weights_at_once);
        const Batch& anchor = pass_.anchor;
        anchor_.load(anchor.data, anchor.dtype, line_start(anchor, blockIdx.z, row_) + depth, valid,
                     pass_.weights_at_once);
    }

    __device__ void finish(int t, T* panel) const {
#pragma unroll
        for (int v = 0; v < Lanes::kRun; ++v) {
            Lanes::put(panel, v, expert_.value(v, pass_.experts[t].dtype) - anchor_.value(v, pass_.anchor.dtype));
        }
    }

   private:
    using Lanes = AlongDepth<T, Shape::rows, Shape::left_pitch>;

    const Pass<T>& pass_;
    const int row_;
    Raw<T, Lanes::kRun> expert_, anchor_;
};

// G_t in the type of the sum: copied into the panel as it is.
template <class Shape>
class SameType {
   public:
    using T = typename Shape::Element;

    __device__ explicit SameType(const Pass<T>& pass)
        : pass_(pass), col_(static_cast<int>(blockIdx.x) * Shape::cols + Lanes::line()) {}

    __device__ void begin(int t, int k, T* panel) const {
        const int depth = k + Lanes::depth();
        const int valid = depth < pass_.cols ? clamp_run(pass_.cols - col_, Lanes::kRun) : 0;
        const Batch& gram = pass_.grams[t];
        // Where nothing is valid nothing is read; the address is kept inside the matrix all the same.
        const std::int64_t start = valid > 0 ? line_start(gram, blockIdx.z, depth) + col_ : 0;
        Lanes::copy(panel, static_cast<const T*>(gram.data) + start, valid, pass_.grams_at_once);
    }

    __device__ void finish(int, T*) const { copy_async_wait(); }

   private:
    using Lanes = AcrossDepth<T, Shape::cols, Shape::right_pitch>;

    const Pass<T>& pass_;
    const int col_;
};

// G_t in f32 or f64, converted on the way.
template <class Shape>
class OtherType {
   public:
    using T = typename Shape::Element;

    __device__ explicit OtherType(const Pass<T>& pass)
        : pass_(pass), col_(static_cast<int>(blockIdx.x) * Shape::cols + Lanes::line()) {}

    __device__ void begin(int t, int k, T*) {
        const int depth = k + Lanes::depth();
        const int valid = depth < pass_.cols ? clamp_run(pass_.cols - col_, Lanes::kRun) : 0;
        const Batch& gram = pass_.grams[t];
        gram_.load(gram.data, gram.dtype, line_start(gram, blockIdx.z, depth) + col_, valid, pass_.grams_at_once);
    }

    __device__ void finish(int t, T* panel) const {
        struct alignas(Lanes::kRun * sizeof(T)) Run {
            T values[Lanes::kRun];
        } run;
#pragma unroll
        for (int v = 0; v < Lanes::kRun; ++v) run.values[v] = gram_.value(v, pass_.grams[t].dtype);
        *reinterpret_cast<Run*>(Lanes::place(panel)) = run;
    }

   private:
    using Lanes = AcrossDepth<T, Shape::cols, Shape::right_pitch>;

    const Pass<T>& pass_;
    const int col_;
    Raw<T, Lanes::kRun> gram_;
};

template <class Shape, template <class> class Gram>
__global__ void __launch_bounds__(kProductThreads, 2)
    residual_kernel(const __grid_constant__ Pass<typename Shape::Element> pass) {
    using T = typename Shape::Element;
    __shared__ Panels<Shape> panels;
    Difference<Shape> left(pass);
    Gram<Shape> right(pass);
    T* const out = static_cast<T*>(pass.out.data) + blockIdx.z * pass.out.member_stride;
    const int first_row = static_cast<int>(blockIdx.y) * Shape::rows;
    const int first_col = static_cast<int>(blockIdx.x) * Shape::cols;
    // Each product is added to out by itself: one long sum over all of them would round worse than T short ones.
    const auto take = [&](int t, int tile_row, int tile_col, const auto& values) {
        constexpr int run = sizeof(values) / sizeof(T);
        struct alignas(sizeof(values)) Run {
            T values[run];
        };
        const int row = first_row + tile_row, col = first_col + tile_col;
        if (row >= pass.rows || col >= pass.cols) return;
        T* const target = out + row * pass.out.row_stride + col;
        const bool add = t > 0 || pass.add_to_out;
        if (pass.out_at_once && col + run <= pass.cols) {
            Run sum = add ? *reinterpret_cast<const Run*>(target) : Run{};
#pragma unroll
            for (int v = 0; v < run; ++v) sum.values[v] += pass.weights[t] * values[v];
            *reinterpret_cast<Run*>(target) = sum;
        } else {
#pragma unroll
            for (int v = 0; v < run; ++v) {
                if (col + v < pass.cols) target[v] = (add ? target[v] : T(0)) + pass.weights[t] * values[v];
            }
        }
    };
    multiply_stages<Shape>(left, right, pass.count, pass.cols, panels, take);
}

template <class T, bool kLarge>
void start(const Pass<T>& pass, std::int64_t members, cudaStream_t stream) {
    using Shape = Tile<T, kLarge>;
    const bool same_type = std::all_of(pass.grams, pass.grams + pass.count, [](const Batch& gram) {
        return gram.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32);
    });
    launch("residual_kernel", same_type ? residual_kernel<Shape, SameType> : residual_kernel<Shape, OtherType>,
           product_grid<Shape>(pass.rows, pass.cols, members), kProductThreads, 0, stream, pass);
}

Batch skip_members(Batch matrix, std::int64_t members) {
    matrix.data = static_cast<char*>(matrix.data) + members * matrix.member_stride * size_of(matrix.dtype);
    return matrix;
}

bool at_once(const Batch& matrix) {
    return loads_at_once(matrix.data, matrix.dtype, matrix.member_stride, matrix.row_stride);
}

template <class T>
void run(const Batch& anchor, const std::vector<Batch>& experts, const std::vector<Batch>& grams,
         const std::vector<double>& weights, const Batch& out, std::int64_t members, std::int64_t rows,
         std::int64_t cols, int processors, cudaStream_t stream) {
    for (std::int64_t member = 0; member < members; member += kMembersPerPass) {
        const std::int64_t count = std::min(kMembersPerPass, members - member);
        for (std::size_t first = 0; first < experts.size(); first += kExpertsPerPass) {
            Pass<T> pass = {};
            pass.count = static_cast<int>(std::min(kExpertsPerPass, experts.size() - first));
            pass.rows = static_cast<int>(rows);
            pass.cols = static_cast<int>(cols);
            pass.anchor = skip_members(anchor, member);
            pass.out = skip_members(out, member);
            pass.add_to_out = first > 0;
            pass.weights_at_once = at_once(pass.anchor);
            pass.grams_at_once = true;
            pass.out_at_once = at_once(pass.out);
            for (int t = 0; t < pass.count; ++t) {
                pass.experts[t] = skip_members(experts[first + t], member);
                pass.grams[t] = skip_members(grams[first + t], member);
                pass.weights[t] = static_cast<T>(weights[first + t]);
                pass.weights_at_once = pass.weights_at_once && at_once(pass.experts[t]);
                pass.grams_at_once = pass.grams_at_once && at_once(pass.grams[t]);
            }
            if (large_tiles_suffice<T>(rows, cols, count, processors)) {
                start<T, true>(pass, count, stream);
            } else {
                start<T, false>(pass, count, stream);
            }
        }
    }
}

}  // namespace

void residual(const Batch& anchor, const std::vector<Batch>& experts, const std::vector<Batch>& grams,
              const std::vector<double>& weights, const Batch& out, std::int64_t members, std::int64_t rows,
              std::int64_t cols, int device, std::uintptr_t stream) {
    BMM_CHECK(!experts.empty() && experts.size() == grams.size() && experts.size() == weights.size(), experts.size(),
              " experts, ", grams.size(), " Grams, ", weights.size(), " weights");
    BMM_CHECK(members >= 0 && rows >= 0 && cols >= 0 && rows < 1 << 30 && cols < 1 << 30, members, " members of ", rows,
              " x ", cols);
    for (const Batch& gram : grams) {
        BMM_CHECK(gram.dtype == DType::f32 || gram.dtype == DType::f64, "dtype code of a Gram is ",
                  static_cast<int>(gram.dtype));
    }
    BMM_CHECK(out.dtype == DType::f32 || out.dtype == DType::f64, "dtype code of out is ", static_cast<int>(out.dtype));
    if (members == 0 || rows == 0 || cols == 0) return;
    for (const Batch* matrix : {&anchor, &out}) BMM_CHECK(matrix->data, "null pointer for a matrix");
    for (std::size_t t = 0; t < experts.size(); ++t) {
        BMM_CHECK(experts[t].data && grams[t].data, "null pointer for expert or Gram ", t);
    }
    const DeviceGuard guard(device);
    const int processors = processor_count(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (out.dtype == DType::f64) {
        run<double>(anchor, experts, grams, weights, out, members, rows, cols, processors, cuda_stream);
    } else {
        run<float>(anchor, experts, grams, weights, out, members, rows, cols, processors, cuda_stream);
    }
}

}  // namespace bmm::cuda
