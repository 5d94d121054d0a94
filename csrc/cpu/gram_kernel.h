// Included once by each gram_<isa>.cpp, which sets the flags and the sizes. Everything here has internal linkage and
// nothing from the standard library is instantiated: code compiled for AVX-512 must never be the linker's choice for
// a function that a lesser machine calls.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/view.h"
#include "cpu/gram_isa.h"

namespace bmm {
namespace {

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float widen(float value) { return value; }
double widen(double value) { return value; }
float widen(BFloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

// Free of branches, so that it vectorises, and of subnormal inputs, so that it holds under flush-to-zero.
float widen(Half value) {
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);
    const std::uint32_t special = (magnitude << 13) | (255u << 23);
    const std::uint32_t subnormal = to_bits(from_bits((126u << 23) | magnitude) - 0.5f);
    std::uint32_t bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x0400u ? subnormal : bits;
    return from_bits(bits | (std::uint32_t{value.bits} & 0x8000u) << 16);
}

template <class T, class Source, int NR, bool Contiguous>
void pack_rows(const View& x, const std::int64_t* rows, std::int64_t first, const T* weights, std::int64_t depth,
               std::int64_t col, T* panel) {
    const std::int64_t left = x.cols - col;
    const int width = left < NR ? static_cast<int>(left) : NR;
    const std::int64_t step = Contiguous ? 1 : x.col_stride;
    for (std::int64_t k = 0; k < depth; ++k, panel += NR) {
        const std::int64_t row = rows ? rows[k] : first + k;
        const Source* source = static_cast<const Source*>(x.data) + row * x.row_stride + col * step;
        if (Contiguous) {
            const char* ahead = reinterpret_cast<const char*>(source + 16 * x.row_stride);
            for (int byte = 0; byte < NR * static_cast<int>(sizeof(Source)); byte += 64)
                __builtin_prefetch(ahead + byte);
        }
        if (width == NR) {
            for (int j = 0; j < NR; ++j) panel[j] = widen(source[j * step]);
        } else {
            for (int j = 0; j < width; ++j) panel[j] = widen(source[j * step]);
            for (int j = width; j < NR; ++j) panel[j] = T(0);
        }
        if (weights) {
            const T weight = weights[k];
            for (int j = 0; j < NR; ++j) panel[j] *= weight;
        }
    }
}

template <class T, class Source, int NR>
void pack_from(const View& x, const std::int64_t* rows, std::int64_t first, const T* weights, std::int64_t depth,
               std::int64_t col, T* panel) {
    if (x.col_stride == 1) {
        pack_rows<T, Source, NR, true>(x, rows, first, weights, depth, col, panel);
    } else {
        pack_rows<T, Source, NR, false>(x, rows, first, weights, depth, col, panel);
    }
}

template <int NR>
void pack_f32(const View& x, const std::int64_t* rows, std::int64_t first, const float* weights, std::int64_t depth,
              std::int64_t col, float* panel) {
    switch (x.dtype) {
        case DType::bf16: return pack_from<float, BFloat16, NR>(x, rows, first, weights, depth, col, panel);
        case DType::f16: return pack_from<float, Half, NR>(x, rows, first, weights, depth, col, panel);
        default: return pack_from<float, float, NR>(x, rows, first, weights, depth, col, panel);
    }
}

// MR x (NV vectors of Bytes) sums live in registers; each k costs NV loads and MR broadcasts for MR * NV multiply-adds.
template <class T, int Bytes, int MR, int NV>
void tile(std::int64_t depth, const T* left, const T* right, T* c, std::int64_t ldc, const T* next_left,
          const T* next_right) {
    typedef T Vector __attribute__((vector_size(Bytes)));
    typedef T Unaligned __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
    constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
    constexpr int nr = NV * lanes;

    Vector sums[MR][NV] = {};
    for (int i = 0; i < MR; ++i) {
        __builtin_prefetch(c + i * ldc, 1);
        __builtin_prefetch(c + i * ldc + nr - 1, 1);
    }
    for (std::int64_t k = 0; k < depth; ++k, left += nr, right += nr) {
        __builtin_prefetch(reinterpret_cast<const char*>(next_left) + 8 * k, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(next_right) + 8 * k, 0, 2);
        Vector b[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) b[v] = *reinterpret_cast<const Unaligned*>(right + v * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const T a = left[i];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sums[i][v] += a * b[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) *reinterpret_cast<Unaligned*>(c + i * ldc + v * lanes) += sums[i][v];
    }
}

// Multiply-adds on registers alone, for the machine's peak; returns how many floating-point operations it did.
template <class T, int Bytes, int MR, int NV>
double multiply_add(std::int64_t steps, T* sink) {
    typedef T Vector __attribute__((vector_size(Bytes)));
    const Vector factor = Vector{} + sink[0];
    const Vector term = Vector{} + sink[1];
    Vector sums[MR * NV];
    for (int i = 0; i < MR * NV; ++i) sums[i] = Vector{} + static_cast<T>(i);
    for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int i = 0; i < MR * NV; ++i) sums[i] = sums[i] * factor + term;
    }
    Vector total = {};
    for (int i = 0; i < MR * NV; ++i) total += sums[i];
    sink[2] = total[0];
    return 2.0 * MR * NV * (Bytes / sizeof(T)) * static_cast<double>(steps);
}

template <int Bytes, int MR, int NV>
constexpr GramIsa make_isa(const char* name) {
    constexpr int nr32 = NV * Bytes / 4;
    constexpr int nr64 = NV * Bytes / 8;
    static_assert(nr64 % MR == 0, "panels are shared between both factors");
    return {name,
            {MR, nr32, pack_f32<nr32>, tile<float, Bytes, MR, NV>},
            {MR, nr64, pack_from<double, double, nr64>, tile<double, Bytes, MR, NV>},
            multiply_add<float, Bytes, MR, NV>};
}

}  // namespace
}  // namespace bmm
