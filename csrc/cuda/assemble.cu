#include <algorithm>

#include "cuda/assemble.cuh"
#include "cuda/common.cuh"

namespace bmm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 12;
constexpr int kMembersPerPass = 256;  // their ridges travel in the kernel's parameters: no copy, no allocation
constexpr int kElements = 8;          // per thread and round, of up to 4 inputs at once: 128 bytes in flight

template <class T>
struct Pass {
    const void* data[kInputsPerPass];
    T weight[kInputsPerPass];
    T ridge[kMembersPerPass];
    T shrink;
    std::uint32_t is_double;  // bit t: input t holds f64
    int inputs;
    bool add_to_out;
};

// Where the diagonal is, without a division per element: entry e of an n x n matrix is on it exactly if its phase,
// e mod (n + 1), is 0.
struct Phases {
    int order;      // n + 1
    int unit_step;  // from one of a thread's units to its next in the same round
    int grid_step;  // from one round to the next
};

template <int kWidth>
__device__ void load(const float* source, float (&values)[kWidth]) {
    if constexpr (kWidth == 4) {
        const float4 four = __ldcs(reinterpret_cast<const float4*>(source));
        values[0] = four.x;
        values[1] = four.y;
        values[2] = four.z;
        values[3] = four.w;
    } else {
        values[0] = __ldcs(source);
    }
}

template <int kWidth>
__device__ void load(const double* source, double (&values)[kWidth]) {
    if constexpr (kWidth == 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const double2 two = __ldcs(reinterpret_cast<const double2*>(source) + half);
            values[2 * half] = two.x;
            values[2 * half + 1] = two.y;
        }
    } else {
        values[0] = __ldcs(source);
    }
}

template <class T, int kWidth>
__device__ void store(T* target, const T (&values)[kWidth]) {
    struct alignas(kWidth == 4 ? 16 : sizeof(T)) Pack {
        T values[kWidth == 4 ? 16 / sizeof(T) : 1];
    };
    constexpr int per_pack = sizeof(Pack) / sizeof(T);
#pragma unroll
    for (int p = 0; p < kWidth / per_pack; ++p) {
        Pack pack;
#pragma unroll
        for (int v = 0; v < per_pack; ++v) pack.values[v] = values[p * per_pack + v];
        reinterpret_cast<Pack*>(target)[p] = pack;
    }
}

// A thread's kUnits units of kWidth elements, kThreads units apart: the first begins at `begin`, all end before `end`.
template <class T, int kWidth, int kUnits>
struct Units {
    std::int64_t begin;
    std::int64_t end;
    T sum[kUnits][kWidth] = {};

    __device__ std::int64_t start(int u) const { return begin + static_cast<std::int64_t>(u) * kThreads * kWidth; }

    // Adds kInputs inputs of one type: all loads are issued before the first is used. A unit past the end loads the
    // first one again; an unconditional load costs no registers beyond its own.
    template <class Source, int kInputs>
    __device__ void add(const void* const* data, const T* weight) {
        Source values[kInputs][kUnits][kWidth];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
                load<kWidth>(static_cast<const Source*>(data[i]) + (start(u) < end ? start(u) : begin), values[i][u]);
            }
        }
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
#pragma unroll
                for (int v = 0; v < kWidth; ++v) sum[u][v] += weight[i] * static_cast<T>(values[i][u][v]);
            }
        }
    }

    __device__ void run(const Pass<T>& pass, T ridge, T* out, int phase, const Phases& phases) {
        if (pass.add_to_out) {
            const void* const self[1] = {out};
            const T one[1] = {T(1)};
            add<T, 1>(self, one);
        }
        for (int t = 0; t < pass.inputs;) {
            const int left = pass.inputs - t;
            const std::uint32_t is_double = pass.is_double >> t;
            if (left >= 4 && (is_double & 15) == 0) {
                add<float, 4>(pass.data + t, pass.weight + t);
                t += 4;
            } else if (left >= 2 && (is_double & 3) == 0) {
                add<float, 2>(pass.data + t, pass.weight + t);
                t += 2;
            } else if (left >= 2 && (is_double & 3) == 3) {
                add<double, 2>(pass.data + t, pass.weight + t);
                t += 2;
            } else if (is_double & 1) {
                add<double, 1>(pass.data + t, pass.weight + t);
                t += 1;
            } else {
                add<float, 1>(pass.data + t, pass.weight + t);
                t += 1;
            }
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if (start(u) < end) {
                int entry = phase;
#pragma unroll
                for (int v = 0; v < kWidth; ++v) {
                    sum[u][v] = entry == 0 ? sum[u][v] + ridge : sum[u][v] * pass.shrink;
                    entry = entry + 1 == phases.order ? 0 : entry + 1;
                }
                store(out + start(u), sum[u]);
            }
            phase += phases.unit_step;
            if (phase >= phases.order) phase -= phases.order;
        }
    }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) * kWidth == 8 ? 3 : 4)
    assemble_kernel(const __grid_constant__ Pass<T> pass, T* out, std::int64_t elements, Phases phases) {
    constexpr int units = kElements / kWidth;
    const std::int64_t offset = blockIdx.y * elements;  // of this member
    const std::int64_t whole = elements - elements % kWidth;
    const T ridge = pass.ridge[blockIdx.y];
    const std::int64_t round = static_cast<std::int64_t>(gridDim.x) * kThreads * units * kWidth;
    std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * kThreads * units + threadIdx.x) * kWidth;
    int phase = static_cast<int>(begin % phases.order);
    for (; begin < whole; begin += round) {
        Units<T, kWidth, units>{offset + begin, offset + whole}.run(pass, ridge, out, phase, phases);
        phase += phases.grid_step;
        if (phase >= phases.order) phase -= phases.order;
    }
    // The last entries of a lone matrix that whole units do not cover.
    const std::int64_t entry = whole + threadIdx.x;
    if (blockIdx.x == 0 && entry < elements) {
        Units<T, 1, 1>{offset + entry, offset + elements}.run(pass, ridge, out, static_cast<int>(entry % phases.order),
                                                              phases);
    }
}

template <class T, int kWidth>
void run(const std::vector<Input>& inputs, const std::vector<double>& weights, const std::vector<double>& ridges,
         double shrink, const View& out, int processors, cudaStream_t stream) {
    constexpr std::int64_t unit = std::int64_t{kThreads} * kWidth;
    constexpr std::int64_t block = unit * (kElements / kWidth);
    const std::int64_t n = out.cols;
    const std::int64_t members = out.rows / n;
    const std::int64_t elements = n * n;
    for (std::int64_t first = 0; first < members; first += kMembersPerPass) {
        const std::int64_t count = std::min<std::int64_t>(kMembersPerPass, members - first);
        const std::int64_t blocks =
            std::min(ceil_div(elements, block), ceil_div(std::int64_t{processors} * kBlocksPerProcessor, count));
        const Phases phases = {static_cast<int>(n + 1), static_cast<int>(unit % (n + 1)),
                               static_cast<int>(blocks * block % (n + 1))};
        for (std::size_t begin = 0; begin < std::max<std::size_t>(inputs.size(), 1); begin += kInputsPerPass) {
            const std::size_t end = std::min(inputs.size(), begin + kInputsPerPass);
            const bool last = end == inputs.size();
            Pass<T> pass = {};
            for (std::size_t t = begin; t < end; ++t) {
                pass.data[t - begin] =
                    static_cast<const char*>(inputs[t].data) + first * elements * size_of(inputs[t].dtype);
                pass.weight[t - begin] = static_cast<T>(weights[t]);
                if (inputs[t].dtype == DType::f64) pass.is_double |= 1u << (t - begin);
            }
            for (std::int64_t member = 0; last && member < count; ++member) {
                pass.ridge[member] = static_cast<T>(ridges.size() == 1 ? ridges[0] : ridges[first + member]);
            }
            pass.shrink = last ? static_cast<T>(shrink) : T(1);
            pass.inputs = static_cast<int>(end - begin);
            pass.add_to_out = begin > 0;
            launch("assemble_kernel", assemble_kernel<T, kWidth>,
                   dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)), kThreads, 0, stream, pass,
                   static_cast<T*>(out.data) + first * elements, elements, phases);
        }
    }
}

template <class T>
void run(const std::vector<Input>& all, const std::vector<double>& all_weights, const std::vector<double>& ridges,
         double shrink, const View& out, int processors, cudaStream_t stream) {
    // The first pass overwrites out: an input that is out belongs to it.
    std::vector<Input> inputs;
    std::vector<double> weights;
    for (const bool is_out : {true, false}) {
        for (std::size_t t = 0; t < all.size(); ++t) {
            if ((all[t].data == out.data) != is_out) continue;
            if (is_out && !inputs.empty()) {
                weights[0] += all_weights[t];
            } else {
                inputs.push_back(all[t]);
                weights.push_back(all_weights[t]);
            }
        }
    }
    bool aligned = is_aligned(out.data, 16) && (out.rows == out.cols || out.cols % 2 == 0);
    for (const Input& input : inputs) aligned = aligned && is_aligned(input.data, 16);
    if (aligned) {
        run<T, 4>(inputs, weights, ridges, shrink, out, processors, stream);
    } else {
        run<T, 1>(inputs, weights, ridges, shrink, out, processors, stream);
    }
}

}  // namespace

void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, const std::vector<double>& ridges,
              double shrink, const View& out, int device, std::uintptr_t stream) {
    BMM_CHECK(inputs.size() == weights.size(), inputs.size(), " inputs, ", weights.size(), " weights");
    BMM_CHECK(out.col_stride == 1 && out.row_stride == out.cols, "strides of out are ", out.row_stride, ", ",
              out.col_stride);
    BMM_CHECK(out.cols == 0 || out.rows % out.cols == 0, "out is ", out.rows, " x ", out.cols);
    BMM_CHECK(out.cols < 1 << 30, "out has ", out.cols, " columns");
    BMM_CHECK(out.dtype == DType::f32 || out.dtype == DType::f64, "dtype code of out is ", static_cast<int>(out.dtype));
    for (const Input& input : inputs) {
        BMM_CHECK(input.dtype == DType::f32 || input.dtype == DType::f64, "dtype code of an input is ",
                  static_cast<int>(input.dtype));
    }
    if (out.rows == 0) return;
    BMM_CHECK(ridges.size() == 1 || static_cast<std::int64_t>(ridges.size()) == out.rows / out.cols, ridges.size(),
              " ridges for ", out.rows / out.cols, " matrices");
    const DeviceGuard guard(device);
    const int processors = processor_count(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (out.dtype == DType::f64) {
        run<double>(inputs, weights, ridges, shrink, out, processors, cuda_stream);
    } else {
        run<float>(inputs, weights, ridges, shrink, out, processors, cuda_stream);
    }
}

}  // namespace bmm::cuda
