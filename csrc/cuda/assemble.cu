#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "cuda/assemble.cuh"

namespace bmm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // elements per thread and step: one 16-byte load of float
constexpr int kBlocksPerProcessor = 8;

void check(cudaError_t status, const char* what) {
    BMM_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

// Makes a device current for one scope.
class DeviceGuard {
   public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }

   private:
    int previous_ = 0;
};

template <class T>
struct Pass {
    const void* data[kInputsPerPass];
    T weight[kInputsPerPass];
    std::uint32_t is_double;  // bit t: input t holds f64
    int inputs;
    bool add_to_out;
    T ridge;
};

template <class Source, class T>
__device__ void add(const Source* source, std::int64_t begin, int count, bool aligned, T weight, T (&sum)[kWidth]) {
    if (aligned && count == kWidth) {
        struct alignas(16) Pack {
            Source values[16 / sizeof(Source)];
        };
        constexpr int per_pack = 16 / sizeof(Source);
        const Pack* packs = reinterpret_cast<const Pack*>(source + begin);
#pragma unroll
        for (int p = 0; p < kWidth / per_pack; ++p) {
            const Pack pack = packs[p];
#pragma unroll
            for (int v = 0; v < per_pack; ++v) sum[p * per_pack + v] += weight * static_cast<T>(pack.values[v]);
        }
    } else {
        for (int v = 0; v < count; ++v) sum[v] += weight * static_cast<T>(source[begin + v]);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(const __grid_constant__ Pass<T> pass, T* out, std::int64_t elements, std::int64_t n) {
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads * kWidth;
    std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
    for (; begin < elements; begin += stride) {
        const int count = static_cast<int>(min(elements - begin, static_cast<std::int64_t>(kWidth)));
        T sum[kWidth] = {};
        if (pass.add_to_out) add(out, begin, count, false, T(1), sum);
        for (int t = 0; t < pass.inputs; ++t) {
            const bool aligned = reinterpret_cast<std::uintptr_t>(pass.data[t]) % 16 == 0;
            if (pass.is_double >> t & 1) {
                add(static_cast<const double*>(pass.data[t]), begin, count, aligned, pass.weight[t], sum);
            } else {
                add(static_cast<const float*>(pass.data[t]), begin, count, aligned, pass.weight[t], sum);
            }
        }
        for (int v = 0; v < count; ++v) {
            const std::int64_t row = (begin + v) / n;
            if (begin + v - row * n == row % n) sum[v] += pass.ridge;
            out[begin + v] = sum[v];
        }
    }
}

template <class T>
void run(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, const View& out,
         int processors, cudaStream_t stream) {
    const std::int64_t elements = out.rows * out.cols;
    const std::int64_t needed = (elements + kThreads * kWidth - 1) / (kThreads * kWidth);
    const int blocks = static_cast<int>(std::min<std::int64_t>(needed, processors * kBlocksPerProcessor));
    const std::size_t total = inputs.size();
    std::size_t first = 0;
    do {
        const std::size_t end = std::min(total, first + kInputsPerPass);
        Pass<T> pass = {};
        for (std::size_t t = first; t < end; ++t) {
            pass.data[t - first] = inputs[t].data;
            pass.weight[t - first] = static_cast<T>(weights[t]);
            if (inputs[t].dtype == DType::f64) pass.is_double |= 1u << (t - first);
        }
        pass.inputs = static_cast<int>(end - first);
        pass.add_to_out = first > 0;
        pass.ridge = end == total ? static_cast<T>(ridge) : T(0);
        assemble_kernel<T><<<blocks, kThreads, 0, stream>>>(pass, static_cast<T*>(out.data), elements, out.cols);
        check(cudaGetLastError(), "assemble_kernel");
        first = end;
    } while (first < total);
}

}  // namespace

void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, const View& out,
              int device, std::uintptr_t stream) {
    BMM_CHECK(inputs.size() == weights.size(), inputs.size(), " inputs, ", weights.size(), " weights");
    BMM_CHECK(out.col_stride == 1 && out.row_stride == out.cols, "strides of out are ", out.row_stride, ", ",
              out.col_stride);
    BMM_CHECK(out.cols == 0 || out.rows % out.cols == 0, "out is ", out.rows, " x ", out.cols);
    for (const Input& input : inputs) {
        BMM_CHECK(input.dtype == DType::f32 || input.dtype == DType::f64, "dtype code of an input is ",
                  static_cast<int>(input.dtype));
    }
    if (out.rows == 0) return;
    const DeviceGuard guard(device);
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (out.dtype == DType::f64) {
        run<double>(inputs, weights, ridge, out, processors, cuda_stream);
    } else {
        BMM_CHECK(out.dtype == DType::f32, "dtype code of out is ", static_cast<int>(out.dtype));
        run<float>(inputs, weights, ridge, out, processors, cuda_stream);
    }
}

}  // namespace bmm::cuda
