#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bmm {

// Which of an expert's elements take part: magnitudes in [lower, upper], and u < low + width * rank where `uniform`
// holds u. Ranks are 0 where there are none.
struct Keep {
    float lower;
    float upper;
    const float* uniform;  // null: nothing is left to chance
    float low;
    float width;
    const float* ranks;
    bool inverse;  // what is kept by chance is divided by its probability
};

// Where an expert's contribution goes, element by element. Which arrays a rule uses is said at each step.
template <class T>
struct Sums {
    T* total;
    T* positive;
    T* negative;
    T* positive_weight;
    T* negative_weight;
    T* kept;
};

// The steps of a blend on one span of elements, in sums of type T. All arrays are contiguous and do not overlap. Each
// operation is rounded by itself, without fused multiply-adds: every instruction set, and torch, give the same bits.
template <class T>
struct BlendSteps {
    // values = source; whether all are finite.
    bool (*load)(const void* source, DType dtype, std::int64_t count, T* values);
    // d = source - base; whether the source is finite.
    bool (*subtract)(const void* source, DType dtype, const T* base, std::int64_t count, T* d);
    // total += factor * (source - base); whether the source is finite.
    bool (*add)(const void* source, DType dtype, const T* base, T factor, std::int64_t count, T* total);
    // u[i] = the number in [0, 1) that `seed` has for element first + i.
    void (*uniform)(std::uint64_t seed, std::uint64_t first, std::int64_t count, float* u);
    // d = 0 where it is not kept, with `inverse` over its probability where it is; kept += 1 where it is, unless null.
    void (*mask)(const Keep& keep, std::int64_t count, T* d, T* kept);

    // v = factor * d goes to:
    void (*sum)(const T* d, T factor, std::int64_t count, T* total);
    // total (v, or its sign), and positive or negative by its sign, with `weight` where those arrays are not null;
    void (*elect)(const T* d, T factor, bool by_count, T weight, std::int64_t count, const Sums<T>& sums);
    // best, where its magnitude is at least that of what is there;
    void (*largest)(const T* d, T factor, std::int64_t count, T* best);
    // total, and, times `unique`, to positive.
    void (*sum_unique)(const T* d, T factor, T unique, std::int64_t count, T* total, T* positive);

    // total = positive or negative, by the sign of total or `tie`, over the weight of its side where there is one.
    void (*elected)(bool tie, std::int64_t count, const Sums<T>& sums);
    // total = positive where one expert is kept, else the mean over those that are.
    void (*mean)(std::int64_t count, const Sums<T>& sums);
    // votes += 1 where |v| > dominance * |total - v|.
    void (*vote)(const T* v, const T* total, T dominance, std::int64_t count, T* votes);
    // total = 0 where there are fewer votes than `needed`.
    void (*veto)(const T* votes, T needed, std::int64_t count, T* total);
    // The sum of the signs of total.
    std::int64_t (*balance)(const T* total, std::int64_t count);

    // The sum of the magnitudes.
    double (*magnitudes)(const T* values, std::int64_t count);

    // out = base + scaling * total, rounded to its dtype.
    void (*store)(const T* base, const T* total, T scaling, std::int64_t count, void* out, DType dtype);
};

struct BlendIsa {
    BlendSteps<float> f32;
    BlendSteps<double> f64;
};

extern const BlendIsa blend_portable;
extern const BlendIsa blend_avx2;
extern const BlendIsa blend_avx512;

}  // namespace bmm
