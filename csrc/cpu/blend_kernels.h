// Included once by each blend_<name>.cpp, which sets the flags: those of the instruction set, and no contraction of
// products and sums. Internal linkage throughout, for the reason that cpu/isa_kernels.h gives. The loops are free of
// branches, so that they vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/blend_isa.h"
#include "cpu/convert.h"

namespace bmm {
namespace {

// Exceeds every finite number's: the sign bit is set when the exponent is all ones.
inline std::uint32_t finite_test(float value) { return (to_bits(value) & 0x7fffffffu) + 0x00800000u; }
inline std::uint64_t finite_test(double value) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffffffffffffu) + 0x0010000000000000u;
}

template <class T>
struct Finite {
    using Bits = decltype(finite_test(T()));
    Bits seen = 0;
    void see(T value) { seen |= finite_test(value); }
    bool all() const { return seen >> (8 * sizeof(Bits) - 1) == 0; }
};

// Calls body(i, source[i] in T); whether all are finite.
template <class T, class Body>
bool for_each(const void* source, DType dtype, std::int64_t count, const Body& body) {
    bool all = true;
    with_source(source, dtype, [&](const auto* data) {
        Finite<T> finite;
        for (std::int64_t i = 0; i < count; ++i) {
            const T x = static_cast<T>(widen(data[i]));
            finite.see(x);
            body(i, x);
        }
        all = finite.all();
    });
    return all;
}

template <class T>
bool load_span(const void* source, DType dtype, std::int64_t count, T* __restrict values) {
    return for_each<T>(source, dtype, count, [&](std::int64_t i, T x) { values[i] = x; });
}

template <class T>
bool subtract(const void* source, DType dtype, const T* __restrict base, std::int64_t count, T* __restrict d) {
    return for_each<T>(source, dtype, count, [&](std::int64_t i, T x) { d[i] = x - base[i]; });
}

template <class T>
bool add_difference(const void* source, DType dtype, const T* __restrict base, T factor, std::int64_t count,
                    T* __restrict total) {
    return for_each<T>(source, dtype, count, [&](std::int64_t i, T x) { total[i] += factor * (x - base[i]); });
}

// SplitMix64 (Steele, Lea, Flood 2014) of seed + (index + 1) * golden, its upper 24 bits. The last step of its mixing,
// z ^= z >> 31, does not reach those.
void uniform(std::uint64_t seed, std::uint64_t first, std::int64_t count, float* __restrict u) {
    constexpr std::uint64_t golden = 0x9e3779b97f4a7c15u;
    std::uint64_t state = seed + first * golden;
    for (std::int64_t i = 0; i < count; ++i) {
        state += golden;
        std::uint64_t z = state;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        u[i] = static_cast<float>(static_cast<std::int32_t>(z >> 40)) * 0x1p-24f;
    }
}

template <class T, bool Random, bool Ranked, bool Counted, bool Inverse>
void mask_span(const Keep& keep, std::int64_t count, T* __restrict d, T* __restrict kept) {
    const T lower = keep.lower, upper = keep.upper;
    const float low = keep.low, width = keep.width;
    const float* __restrict u = keep.uniform;
    const float* __restrict ranks = keep.ranks;
    for (std::int64_t i = 0; i < count; ++i) {
        const T magnitude = static_cast<float>(d[i] < 0 ? -d[i] : d[i]);
        bool in = (magnitude >= lower) & (magnitude <= upper);
        const T probability = static_cast<T>(Ranked ? low + width * ranks[i] : low);
        if constexpr (Random) in &= static_cast<T>(u[i]) < probability;
        const T scaled = Inverse ? d[i] / probability : d[i];
        d[i] = in ? scaled : T(0);
        if constexpr (Counted) kept[i] += in ? T(1) : T(0);
    }
}

template <class T, bool Counted, bool Inverse>
void mask_or_count(const Keep& keep, std::int64_t count, T* d, T* kept) {
    if (!keep.uniform) {
        mask_span<T, false, false, Counted, false>(keep, count, d, kept);
    } else if (!keep.ranks) {
        mask_span<T, true, false, Counted, Inverse>(keep, count, d, kept);
    } else {
        mask_span<T, true, true, Counted, Inverse>(keep, count, d, kept);
    }
}

template <class T, bool Inverse>
void mask_and_scale(const Keep& keep, std::int64_t count, T* d, T* kept) {
    kept ? mask_or_count<T, true, Inverse>(keep, count, d, kept)
         : mask_or_count<T, false, Inverse>(keep, count, d, kept);
}

template <class T>
void mask(const Keep& keep, std::int64_t count, T* d, T* kept) {
    keep.inverse ? mask_and_scale<T, true>(keep, count, d, kept) : mask_and_scale<T, false>(keep, count, d, kept);
}

template <class T>
void sum(const T* __restrict d, T factor, std::int64_t count, T* __restrict total) {
    for (std::int64_t i = 0; i < count; ++i) total[i] += factor * d[i];
}

template <class T, bool ByCount, bool Weighed>
void elect_span(const T* __restrict d, T factor, T weight, std::int64_t count, T* __restrict total,
                T* __restrict positive, T* __restrict negative, T* __restrict positive_weight,
                T* __restrict negative_weight) {
    for (std::int64_t i = 0; i < count; ++i) {
        const T v = factor * d[i];
        const bool up = v > 0, down = v < 0;
        if constexpr (ByCount) {
            total[i] += (up ? T(1) : T(0)) - (down ? T(1) : T(0));
        } else {
            total[i] += v;
        }
        positive[i] += up ? v : T(0);
        negative[i] += down ? v : T(0);
        if constexpr (Weighed) {
            positive_weight[i] += up ? weight : T(0);
            negative_weight[i] += down ? weight : T(0);
        }
    }
}

template <class T>
void elect(const T* d, T factor, bool by_count, T weight, std::int64_t count, const Sums<T>& s) {
    const auto span = s.positive_weight ? (by_count ? elect_span<T, true, true> : elect_span<T, false, true>)
                                        : (by_count ? elect_span<T, true, false> : elect_span<T, false, false>);
    span(d, factor, weight, count, s.total, s.positive, s.negative, s.positive_weight, s.negative_weight);
}

template <class T>
T magnitude(T value) {
    return value < 0 ? -value : value;
}

template <class T>
void largest(const T* __restrict d, T factor, std::int64_t count, T* __restrict best) {
    for (std::int64_t i = 0; i < count; ++i) {
        const T v = factor * d[i];
        best[i] = magnitude(v) >= magnitude(best[i]) ? v : best[i];
    }
}

template <class T>
void sum_unique(const T* __restrict d, T factor, T unique, std::int64_t count, T* __restrict total,
                T* __restrict positive) {
    for (std::int64_t i = 0; i < count; ++i) {
        const T v = factor * d[i];
        total[i] += v;
        positive[i] += unique * v;
    }
}

template <class T, bool Weighed>
void elected_span(bool tie, std::int64_t count, T* __restrict total, const T* __restrict positive,
                  const T* __restrict negative, const T* __restrict positive_weight,
                  const T* __restrict negative_weight) {
    // -1 or 1 in the place of a total of 0
    const T instead = tie ? T(1) : T(-1);
    for (std::int64_t i = 0; i < count; ++i) {
        const T sign = total[i] == 0 ? instead : total[i];
        T m = sign > 0 ? positive[i] : negative[i];
        if constexpr (Weighed) {
            const T weight = sign > 0 ? positive_weight[i] : negative_weight[i];
            m /= weight == 0 ? T(1) : weight;
        }
        total[i] = m;
    }
}

template <class T>
void elected(bool tie, std::int64_t count, const Sums<T>& s) {
    const auto span = s.positive_weight ? elected_span<T, true> : elected_span<T, false>;
    span(tie, count, s.total, s.positive, s.negative, s.positive_weight, s.negative_weight);
}

template <class T>
void mean_span(std::int64_t count, T* __restrict total, const T* __restrict positive, const T* __restrict kept) {
    for (std::int64_t i = 0; i < count; ++i) {
        const T quotient = total[i] / (kept[i] == 0 ? T(1) : kept[i]);
        total[i] = kept[i] == 1 ? positive[i] : quotient;
    }
}

template <class T>
void mean(std::int64_t count, const Sums<T>& s) {
    mean_span(count, s.total, s.positive, s.kept);
}

template <class T>
void vote(const T* __restrict v, const T* __restrict total, T dominance, std::int64_t count, T* __restrict votes) {
    for (std::int64_t i = 0; i < count; ++i) {
        votes[i] += magnitude(v[i]) > dominance * magnitude(total[i] - v[i]) ? T(1) : T(0);
    }
}

template <class T>
void veto(const T* __restrict votes, T needed, std::int64_t count, T* __restrict total) {
    for (std::int64_t i = 0; i < count; ++i) total[i] = votes[i] >= needed ? total[i] : T(0);
}

template <class T>
std::int64_t balance(const T* total, std::int64_t count) {
    std::int32_t signs = 0;
    for (std::int64_t i = 0; i < count; ++i) signs += (total[i] > 0) - (total[i] < 0);
    return signs;
}

// In lanes of its own, which are added in one order: a compiler may not reorder a sum, but can keep these apart.
template <class T>
double magnitudes(const T* __restrict values, std::int64_t count) {
    constexpr int lanes = 16;
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        for (int lane = 0; lane < lanes; ++lane) sums[lane] += magnitude(values[i + lane]);
    }
    for (int lane = 0; i < count; ++i, ++lane) sums[lane] += magnitude(values[i]);
    double total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += sums[lane];
    return total;
}

template <class T>
void store_blend(const T* __restrict base, const T* __restrict total, T scaling, std::int64_t count, void* out,
                 DType dtype) {
    with_source(out, dtype, [&](const auto* read_only) {
        auto* __restrict target = const_cast<std::remove_cvref_t<decltype(*read_only)>*>(read_only);
        for (std::int64_t i = 0; i < count; ++i) narrow(base[i] + scaling * total[i], target[i]);
    });
}

template <class T>
constexpr BlendSteps<T> blend_steps = {load_span<T>, subtract<T>, add_difference<T>, uniform,       mask<T>, sum<T>,
                                       elect<T>,     largest<T>,  sum_unique<T>,     elected<T>,    mean<T>, vote<T>,
                                       veto<T>,      balance<T>,  magnitudes<T>,     store_blend<T>};

constexpr BlendIsa make_blend_isa() { return {blend_steps<float>, blend_steps<double>}; }

}  // namespace
}  // namespace bmm
