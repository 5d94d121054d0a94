#pragma once

#include <cstddef>
#include <cstdint>

#include "common/check.h"

namespace bmm {

// The codes cross the Python boundary: bmm_engine/ops/_native.py holds the same numbers.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// The two 16-bit formats are storage only: arithmetic happens after widening to float.
struct Half {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline DType dtype_from_code(int code) {
    BMM_CHECK(code >= 0 && code <= 3, "dtype code is ", code, ", known are 0 (f32), 1 (f64), 2 (f16), 3 (bf16)");
    return static_cast<DType>(code);
}

}  // namespace bmm
