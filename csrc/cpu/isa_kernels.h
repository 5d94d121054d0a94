// Included once by each isa_<name>.cpp, which sets the flags and the sizes. Everything here has internal linkage and
// nothing from the standard library is instantiated: code compiled for AVX-512 must never be the linker's choice for
// a function that a lesser machine calls.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/view.h"
#include "cpu/convert.h"
#include "cpu/isa.h"

namespace bmm {
namespace {

constexpr int kAhead = 16;  // rows that packing looks ahead

template <class T, class Source, int NR, bool Contiguous>
void pack_rows(const View& x, const Source* data, const std::int64_t* rows, std::int64_t first, const T* weights,
               std::int64_t depth, std::int64_t col, T* panel) {
    const std::int64_t left = x.cols - col;
    const int width = left < NR ? static_cast<int>(left) : NR;
    const std::int64_t step = Contiguous ? 1 : x.col_stride;
    for (std::int64_t k = 0; k < depth; ++k, panel += NR) {
        const Source* source = data + (rows ? rows[k] : first + k) * x.row_stride + col * step;
        if (Contiguous) {
            const char* ahead = reinterpret_cast<const char*>(source + kAhead * x.row_stride);
            for (int byte = 0; byte < NR * static_cast<int>(sizeof(Source)); byte += 64)
                __builtin_prefetch(ahead + byte);
        }
        if (width == NR) {
            for (int j = 0; j < NR; ++j) panel[j] = static_cast<T>(widen(source[j * step]));
        } else {
            for (int j = 0; j < width; ++j) panel[j] = static_cast<T>(widen(source[j * step]));
            for (int j = width; j < NR; ++j) panel[j] = T(0);
        }
        if (weights) {
            const T weight = weights[k];
            for (int j = 0; j < NR; ++j) panel[j] *= weight;
        }
    }
}

template <class T, int NR>
void pack(const View& x, const std::int64_t* rows, std::int64_t first, const T* weights, std::int64_t depth,
          std::int64_t col, T* panel) {
    with_source(x.data, x.dtype, [&](const auto* data) {
        if (x.col_stride == 1) {
            pack_rows<T, std::remove_cvref_t<decltype(*data)>, NR, true>(x, data, rows, first, weights, depth, col,
                                                                         panel);
        } else {
            pack_rows<T, std::remove_cvref_t<decltype(*data)>, NR, false>(x, data, rows, first, weights, depth, col,
                                                                          panel);
        }
    });
}

template <class T>
void load(const void* source, DType dtype, std::int64_t stride, std::int64_t count, T* values) {
    with_source(source, dtype, [&](const auto* data) {
        if (stride == 1) {
            for (std::int64_t k = 0; k < count; ++k) values[k] = static_cast<T>(widen(data[k]));
        } else {
            for (std::int64_t k = 0; k < count; ++k) values[k] = static_cast<T>(widen(data[k * stride]));
        }
    });
}

template <class T>
void add(const void* source, DType dtype, std::int64_t stride, T weight, std::int64_t count, T* sum) {
    with_source(source, dtype, [&](const auto* data) {
        if (stride == 1) {
            for (std::int64_t k = 0; k < count; ++k) sum[k] += weight * static_cast<T>(widen(data[k]));
        } else {
            for (std::int64_t k = 0; k < count; ++k) sum[k] += weight * static_cast<T>(widen(data[k * stride]));
        }
    });
}

template <class T>
void store(const T* values, std::int64_t count, void* target, DType dtype, std::int64_t stride) {
    with_source(target, dtype, [&](const auto* read_only) {
        auto* out = const_cast<std::remove_cvref_t<decltype(*read_only)>*>(read_only);
        if (stride == 1) {
            for (std::int64_t k = 0; k < count; ++k) narrow(values[k], out[k]);
        } else {
            for (std::int64_t k = 0; k < count; ++k) narrow(values[k], out[k * stride]);
        }
    });
}

template <class T, int Bytes>
struct Register {
    typedef T Aligned __attribute__((vector_size(Bytes)));
    typedef T Type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
    static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
};

// sums += a * b, lane by lane: the multiply-add of plain panels.
struct MultiplyAdd {
    static constexpr int products = 1;  // per lane
    template <class T, class Vector>
    static void run(const T* a, const Vector& b, Vector& sum) {
        sum += *a * b;
    }
    // As many operations, each waiting for the last.
    template <class Vector>
    static void chain(const Vector& factor, const Vector& term, Vector& sum) {
        sum = sum * factor + term;
    }
};

// MR x (Used vectors of Bytes) sums live in registers; each step costs Used loads and MR broadcasts for MR * Used
// multiply-adds. A left factor of stride 0 is a panel; otherwise it is stored by rows.
template <class T, int Bytes, int MR, int NV, int Used, bool LeftByRows, class Op>
void run_tile(std::int64_t steps, const T* left, std::int64_t ldl, const T* right, T* c, std::int64_t ldc,
              const char* next) {
    using Vector = typename Register<T, Bytes>::Aligned;
    using Unaligned = typename Register<T, Bytes>::Type;
    constexpr int lanes = Register<T, Bytes>::lanes;
    constexpr int nr = NV * lanes;
    constexpr int skip = (NV - Used) * lanes;

    right += skip;
    c += skip;
    Vector sums[MR][Used] = {};
    for (int i = 0; i < MR; ++i) {
        __builtin_prefetch(c + i * ldc, 1);
        __builtin_prefetch(c + i * ldc + Used * lanes - 1, 1);
    }
    for (std::int64_t k = 0; k < steps; ++k, right += nr) {
        __builtin_prefetch(next + 16 * k, 0, 2);
        Vector b[Used];
#pragma GCC unroll 8
        for (int v = 0; v < Used; ++v) b[v] = *reinterpret_cast<const Unaligned*>(right + v * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const T* a = LeftByRows ? left + i * ldl + k : left + k * nr + i;
#pragma GCC unroll 8
            for (int v = 0; v < Used; ++v) Op::run(a, b[v], sums[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < Used; ++v) *reinterpret_cast<Unaligned*>(c + i * ldc + v * lanes) += sums[i][v];
    }
}

template <class T, int Bytes, int MR, int NV, int Used, class Op>
void tile(std::int64_t steps, const T* left, const T* right, T* c, std::int64_t ldc, const char* next) {
    run_tile<T, Bytes, MR, NV, Used, false, Op>(steps, left, 0, right, c, ldc, next);
}

template <class T, int Bytes, int MR, int NV>
void tile_rows(std::int64_t steps, const T* left, std::int64_t ldl, const T* right, T* c, std::int64_t ldc,
               const char* next) {
    run_tile<T, Bytes, MR, NV, NV, true, MultiplyAdd>(steps, left, ldl, right, c, ldc, next);
}

// Multiply-adds on registers alone, for the machine's peak; returns how many operations it did.
template <class T, int Bytes, int MR, int NV, class Op = MultiplyAdd>
double multiply_add(std::int64_t steps, T* sink) {
    using Vector = typename Register<T, Bytes>::Aligned;
    const Vector factor = Vector{} + sink[0];
    const Vector term = Vector{} + sink[1];
    Vector sums[MR * NV];
    for (int i = 0; i < MR * NV; ++i) sums[i] = Vector{} + static_cast<T>(i);
    for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
        for (int i = 0; i < MR * NV; ++i) Op::chain(factor, term, sums[i]);
    }
    Vector total = {};
    for (int i = 0; i < MR * NV; ++i) total += sums[i];
    sink[2] = total[0];
    return 2.0 * Op::products * MR * NV * (Bytes / sizeof(T)) * static_cast<double>(steps);
}

template <class T, int Bytes, int MR, int NV, class Op = MultiplyAdd>
constexpr Kernel<T> make_kernel(int rows_per_step, decltype(Kernel<T>::pack) pack_function) {
    constexpr int lanes = Register<T, Bytes>::lanes;
    static_assert(NV >= 1 && NV <= 4 && NV * lanes % MR == 0, "panels are shared between both factors");
    Kernel<T> kernel = {MR,      NV * lanes, lanes,   rows_per_step, pack_function, {}, tile_rows<T, Bytes, MR, NV>,
                        load<T>, add<T>,     store<T>};
    kernel.tile[1] = tile<T, Bytes, MR, NV, 1, Op>;
    if constexpr (NV >= 2) kernel.tile[2] = tile<T, Bytes, MR, NV, 2, Op>;
    if constexpr (NV >= 3) kernel.tile[3] = tile<T, Bytes, MR, NV, 3, Op>;
    if constexpr (NV >= 4) kernel.tile[4] = tile<T, Bytes, MR, NV, 4, Op>;
    return kernel;
}

template <int Bytes, int MR, int NV>
constexpr Isa make_isa(const char* name, const BlendIsa* blend) {
    return {name,
            make_kernel<float, Bytes, MR, NV>(1, pack<float, NV * Bytes / 4>),
            make_kernel<double, Bytes, MR, NV>(1, pack<double, NV * Bytes / 8>),
            nullptr,
            multiply_add<float, Bytes, MR, NV>,
            multiply_add<double, Bytes, MR, NV>,
            nullptr,
            blend};
}

}  // namespace
}  // namespace bmm
