#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/element.cuh"
#include "cuda/select.cuh"

namespace bmm::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1 << 15;  // of upper halves: the sign is 0
constexpr int kBinsBytes = kBins * sizeof(std::uint32_t);
constexpr std::int64_t kElementsPerBlock = std::int64_t{1} << 17;  // fewer are not worth a block's 128 KiB of bins
constexpr int kPacks = 4;                                          // 16-byte loads in flight per thread
constexpr unsigned kWholeWarp = 0xffffffffu;

using Count = unsigned long long;

template <class Element>
__device__ std::uint32_t magnitude_bits(Element element) {
    return __float_as_uint(static_cast<float>(widen(element))) & 0x7fffffffu;
}

// Calls visit(bits, there) for all elements, all lanes of a warp together; `there` is false for a lane that has no
// more.
template <class Element, class Visit>
__device__ void for_each_magnitude(const Element* x, std::int64_t elements, const Visit& visit) {
    struct alignas(16) Pack {
        Element values[16 / sizeof(Element)];
    };
    constexpr int per_pack = sizeof(Pack) / sizeof(Element);
    // The elements before the first 16-byte boundary and behind the last one are visited one by one.
    const std::int64_t to_boundary = (16 - reinterpret_cast<std::uintptr_t>(x) % 16) % 16 / sizeof(Element);
    const std::int64_t head = to_boundary < elements ? to_boundary : elements;
    const std::int64_t packs = (elements - head) / per_pack;
    const Pack* const source = reinterpret_cast<const Pack*>(x + head);
    const std::int64_t round = static_cast<std::int64_t>(gridDim.x) * kThreads * kPacks;
    // All lanes of a warp go round equally often: the bound is compared with the warp's first pack.
    const std::int64_t lane = threadIdx.x % 32;
    std::int64_t pack = static_cast<std::int64_t>(blockIdx.x) * kThreads * kPacks + threadIdx.x;
    for (; pack - lane < packs; pack += round) {
        Pack loaded[kPacks];
        bool there[kPacks];
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
            there[p] = pack + p * kThreads < packs;
            if (there[p]) loaded[p] = source[pack + p * kThreads];
        }
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
#pragma unroll
            for (int v = 0; v < per_pack; ++v) visit(there[p] ? magnitude_bits(loaded[p].values[v]) : 0, there[p]);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) {
        const std::int64_t tail = head + packs * per_pack;
        visit(lane < head ? magnitude_bits(x[lane < head ? lane : 0]) : 0, lane < head);
        visit(lane < elements - tail ? magnitude_bits(x[tail + lane]) : 0, lane < elements - tail);
    }
}

// Each block counts in its own shared memory, and adds that up at the end.
template <class Element>
__global__ void __launch_bounds__(kThreads) upper_kernel(const Element* x, std::int64_t elements, Count* counts) {
    extern __shared__ __align__(16) unsigned char dynamic_memory[];
    std::uint32_t* const bins = reinterpret_cast<std::uint32_t*>(dynamic_memory);
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    std::uint32_t zeros = 0;  // task vectors are full of them: one bin that all threads would queue for
    for_each_magnitude(x, elements, [&](std::uint32_t bits, bool there) {
        if (bits >> 16 != 0) {
            atomicAdd(bins + (bits >> 16), 1u);
        } else {
            zeros += there;
        }
    });
    atomicAdd(bins, zeros);
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (bins[bin]) atomicAdd(counts + bin, static_cast<Count>(bins[bin]));
    }
}

// Counts in device memory: for the few elements that share an upper half, or all of them (`upper` -1) on a device whose
// shared memory is too small. A warp's equal ones are added at once: 16-bit formats leave few different lower halves.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    direct_kernel(const Element* x, std::int64_t elements, Count* counts, int upper) {
    Count zeros = 0;
    for_each_magnitude(x, elements, [&](std::uint32_t bits, bool there) {
        const bool matches = there && (upper < 0 || bits >> 16 == static_cast<std::uint32_t>(upper));
        const std::uint32_t bin = upper < 0 ? bits >> 16 : bits & 0xffff;
        zeros += matches && bin == 0;
        const bool counted = matches && bin != 0;
        if (!__any_sync(kWholeWarp, counted)) return;
        const unsigned peers = __match_any_sync(kWholeWarp, counted ? bin : 0u);
        const bool first = (peers & ((1u << threadIdx.x % 32) - 1)) == 0;
        if (counted && first) atomicAdd(counts + bin, static_cast<Count>(__popc(peers)));
    });
    if (zeros) atomicAdd(counts, zeros);
}

// Whether the current device has shared memory for the bins of upper_kernel.
template <class Element>
bool bins_fit() {
    const cudaError_t status =
        cudaFuncSetAttribute(upper_kernel<Element>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBinsBytes);
    if (status == cudaErrorInvalidValue) {
        cudaGetLastError();  // or the next check would find it
        return false;
    }
    check(status, "cudaFuncSetAttribute");
    return true;
}

template <class Element>
void run(const void* x, std::int64_t elements, Count* counts, int upper, int device, cudaStream_t stream) {
    const auto* source = static_cast<const Element*>(x);
    const std::int64_t blocks = std::min<std::int64_t>(processor_count(device), ceil_div(elements, kElementsPerBlock));
    BMM_CHECK(elements / blocks < std::int64_t{1} << 31, elements, " elements");  // a block's bins have 32 bits
    if (upper < 0 && bins_fit<Element>()) {
        launch("upper_kernel", upper_kernel<Element>, dim3(static_cast<unsigned>(blocks)), kThreads, kBinsBytes, stream,
               source, elements, counts);
    } else {
        launch("direct_kernel", direct_kernel<Element>, dim3(static_cast<unsigned>(2 * blocks)), kThreads, 0, stream,
               source, elements, counts, upper);
    }
}

}  // namespace

void add_magnitude_histogram(const void* x, std::int64_t elements, DType dtype, std::int64_t* counts, int upper,
                             int device, std::uintptr_t stream) {
    BMM_CHECK(elements >= 0, elements, " elements");
    BMM_CHECK(upper >= -1 && upper < kBins, "upper is ", upper);
    if (elements == 0) return;
    BMM_CHECK(x && counts, "null pointer for ", elements, " elements or their counts");
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    auto* const bins = reinterpret_cast<Count*>(counts);
    switch (dtype) {
        case DType::f32: run<float>(x, elements, bins, upper, device, cuda_stream); break;
        case DType::f64: run<double>(x, elements, bins, upper, device, cuda_stream); break;
        case DType::f16: run<Half>(x, elements, bins, upper, device, cuda_stream); break;
        case DType::bf16: run<BFloat16>(x, elements, bins, upper, device, cuda_stream); break;
    }
}

}  // namespace bmm::cuda
