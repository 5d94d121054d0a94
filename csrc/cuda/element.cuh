#pragma once

// Elements of any dtype in device code: loaded as they lie in memory, widened when they are used.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace bmm::cuda {

__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16); }
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

// Rounds to nearest, once.
template <class T>
__device__ void store(void* address, DType dtype, T value) {
    switch (dtype) {
        case DType::f32: *static_cast<float*>(address) = static_cast<float>(value); break;
        case DType::f64: *static_cast<double*>(address) = static_cast<double>(value); break;
        case DType::f16:
            if constexpr (sizeof(T) == 8) {
                *static_cast<__half*>(address) = __double2half(value);
            } else {
                *static_cast<__half*>(address) = __float2half_rn(value);
            }
            break;
        case DType::bf16:
            if constexpr (sizeof(T) == 8) {
                *static_cast<__nv_bfloat16*>(address) = __double2bfloat16(value);
            } else {
                *static_cast<__nv_bfloat16*>(address) = __float2bfloat16_rn(value);
            }
            break;
    }
}

template <class T>
__device__ T load(const void* address, DType dtype) {
    switch (dtype) {
        case DType::f32: return static_cast<T>(*static_cast<const float*>(address));
        case DType::f64: return static_cast<T>(*static_cast<const double*>(address));
        case DType::f16: return static_cast<T>(widen(*static_cast<const Half*>(address)));
        case DType::bf16: return static_cast<T>(widen(*static_cast<const BFloat16*>(address)));
    }
    return T(0);
}

// kBytes (a multiple of 4) from an address aligned to them, or to 16.
template <int kBytes>
__device__ inline void load_words(std::uint32_t* words, const void* data) {
    if constexpr (kBytes >= 16) {
#pragma unroll
        for (int part = 0; part < kBytes / 16; ++part) {
            const uint4 four = static_cast<const uint4*>(data)[part];
            words[4 * part] = four.x;
            words[4 * part + 1] = four.y;
            words[4 * part + 2] = four.z;
            words[4 * part + 3] = four.w;
        }
    } else if constexpr (kBytes == 8) {
        const uint2 two = *static_cast<const uint2*>(data);
        words[0] = two.x;
        words[1] = two.y;
    } else {
        static_assert(kBytes == 4);
        words[0] = *static_cast<const std::uint32_t*>(data);
    }
}

// kCount (2 or 4) consecutive elements as they lie in memory, to be used as T. Widening waits for the load, so it is
// left to `value`, behind whatever work hides the load's latency. (Only float64 read as float32 is converted at once.)
template <class T, int kCount>
class Raw {
   public:
    // Elements `index` to `index + kCount - 1`; those from `valid` on are not read, and are 0. `aligned`: an index that
    // is a multiple of kCount is at an address that load_words takes.
    __device__ void load(const void* data, DType dtype, std::int64_t index, int valid, bool aligned) {
        const bool whole = aligned && valid >= kCount;
        if (dtype == DType::f32) {
            load_as<std::uint32_t>(data, index, valid, whole);
        } else if (dtype != DType::f64) {
            load_as<std::uint16_t>(data, index, valid, whole);
        } else if constexpr (sizeof(T) == 8) {
            load_as<std::uint64_t>(data, index, valid, whole);
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                words_[i] =
                    i < valid ? __float_as_uint(static_cast<float>(static_cast<const double*>(data)[index + i])) : 0;
            }
        }
    }

    __device__ T value(int i, DType dtype) const {
        if constexpr (sizeof(T) == 8) {
            if (dtype == DType::f64) {
                return __hiloint2double(static_cast<int>(words_[2 * i + 1]), static_cast<int>(words_[2 * i]));
            }
        }
        if (dtype == DType::f32 || dtype == DType::f64) return static_cast<T>(__uint_as_float(words_[i]));
        const auto bits = static_cast<std::uint16_t>(words_[i / 2] >> (16 * (i % 2)));
        return static_cast<T>(dtype == DType::f16 ? widen(Half{bits}) : widen(BFloat16{bits}));
    }

   private:
    template <class Bits>
    __device__ void load_as(const void* data, std::int64_t index, int valid, bool whole) {
        constexpr int bytes = kCount * sizeof(Bits);
        const Bits* source = static_cast<const Bits*>(data) + index;
        if (whole) {
            load_words<bytes>(words_, source);
            return;
        }
#pragma unroll
        for (int word = 0; word < bytes / 4; ++word) words_[word] = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const Bits bits = i < valid ? source[i] : Bits(0);
            if constexpr (sizeof(Bits) == 8) {
                words_[2 * i] = static_cast<std::uint32_t>(bits);
                words_[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
            } else if constexpr (sizeof(Bits) == 4) {
                words_[i] = bits;
            } else {
                words_[i / 2] |= static_cast<std::uint32_t>(bits) << (16 * (i % 2));
            }
        }
    }

    std::uint32_t words_[kCount * sizeof(T) / 4];
};

}  // namespace bmm::cuda
