#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace bmm {

// One contiguous run of any floating type, or its difference from another.
struct Magnitudes {
    const void* values;
    DType dtype;
    const void* minus;  // null: nothing is subtracted
    DType minus_dtype;

    static constexpr std::int64_t kSpan = 512;  // values widened at a time

    // bits[i] = those of |values[i] - minus[i]| as float, for `begin` <= i < begin + count <= begin + kSpan. The
    // difference is computed in double if either is double, else in float.
    void load(const Isa& isa, std::int64_t begin, std::int64_t count, std::uint32_t* bits) const {
        if (!minus && dtype == DType::bf16) {
            const std::uint16_t* upper = static_cast<const std::uint16_t*>(values) + begin;
            for (std::int64_t i = 0; i < count; ++i) bits[i] = (upper[i] & 0x7fffu) << 16;
            return;
        }
        if (!minus && dtype == DType::f32) {
            std::memcpy(bits, static_cast<const float*>(values) + begin, count * sizeof(float));
        } else if (dtype == DType::f64 || (minus && minus_dtype == DType::f64)) {
            double wide[kSpan];
            float single[kSpan];
            difference(isa.f64, begin, count, wide);
            for (std::int64_t i = 0; i < count; ++i) single[i] = static_cast<float>(wide[i]);
            std::memcpy(bits, single, count * sizeof(float));
        } else {
            float single[kSpan];
            difference(isa.f32, begin, count, single);
            std::memcpy(bits, single, count * sizeof(float));
        }
        for (std::int64_t i = 0; i < count; ++i) bits[i] &= 0x7fffffffu;
    }

   private:
    template <class T>
    void difference(const Kernel<T>& kernel, std::int64_t begin, std::int64_t count, T* wide) const {
        kernel.load(static_cast<const char*>(values) + begin * size_of(dtype), dtype, 1, count, wide);
        if (minus) {
            // a product with -1 is exact, fused or not
            kernel.add(static_cast<const char*>(minus) + begin * size_of(minus_dtype), minus_dtype, 1, T(-1), count,
                       wide);
        }
    }
};

}  // namespace bmm
