#pragma once

// What the kernels' .cu files share on the host side: checked calls, the device of a scope, launches.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"

namespace bmm::cuda {

inline void check(cudaError_t status, const char* what) {
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
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_ = 0;
};

inline int processor_count(int device) {
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return processors;
}

inline std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

inline bool is_aligned(const void* data, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

// Starts a kernel on the current device. `dynamic_bytes` of shared memory may be more than the 48 KiB that need no
// asking.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t dynamic_bytes,
            cudaStream_t stream, const std::type_identity_t<Parameters>&... arguments) {
    if (dynamic_bytes > 48 * 1024) {
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes)),
            name);
    }
    kernel<<<grid, threads, dynamic_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), name);
}

}  // namespace bmm::cuda
