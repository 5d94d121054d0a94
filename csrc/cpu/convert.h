// Conversions between the floating types, included where code is compiled for one instruction set: internal linkage,
// and nothing from the standard library that the linker might share with code for a lesser machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace bmm {
namespace {

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

// Free of branches, so that it vectorises, and of subnormal inputs, so that it holds under flush-to-zero.
inline float widen(Half value) {
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);
    const std::uint32_t special = (magnitude << 13) | (255u << 23);
    const std::uint32_t subnormal = to_bits(from_bits((126u << 23) | magnitude) - 0.5f);
    std::uint32_t bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x0400u ? subnormal : bits;
    return from_bits(bits | (std::uint32_t{value.bits} & 0x8000u) << 16);
}

// Calls body(pointer to the source's own type).
template <class Body>
void with_source(const void* source, DType dtype, const Body& body) {
    switch (dtype) {
        case DType::f32: return body(static_cast<const float*>(source));
        case DType::f64: return body(static_cast<const double*>(source));
        case DType::f16: return body(static_cast<const Half*>(source));
        case DType::bf16: return body(static_cast<const BFloat16*>(source));
    }
}

inline void narrow(double value, double& target) { target = value; }
inline void narrow(double value, float& target) { target = static_cast<float>(value); }
inline void narrow(double value, BFloat16& target) {
    const std::uint32_t bits = to_bits(static_cast<float>(value));
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const std::uint32_t quiet = bits >> 16 | 0x40u;  // a NaN whose payload lies in the lower half must stay one
    target.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void narrow(double value, Half& target) {
    const std::uint32_t bits = to_bits(static_cast<float>(value));
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: move the exponent, round the 13 bits that fall off; a carry runs into the exponent rightly.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
    // Subnormal results are multiples of 2^-24: adding 0.5, whose last place that is, rounds to them.
    const std::uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    std::uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    target.bits = static_cast<std::uint16_t>(sign | result);
}

}  // namespace
}  // namespace bmm
