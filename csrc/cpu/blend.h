#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace bmm {

// The codes cross the Python boundary: bmm_engine/ops/blend/cpu.py holds the same numbers.
enum class Combine : int { sum = 0, elect_sum = 1, elect_count = 2, largest = 3, mean_kept = 4, consensus = 5 };

// An expert's difference from the base, d, contributes v = factor * d where it is kept: where its magnitude, as float,
// is in [lower, upper], and, with `random`, where u(seed, first + index) < keep + keep_width * rank.
struct BlendExpert {
    const void* data;
    DType dtype;
    double factor;
    double weight;
    float lower;
    float upper;
    bool random;
    std::uint64_t seed;
    float keep;
    float keep_width;
    const float* ranks;  // null: 0
    double unique;
    double dominance;
};

struct BlendRule {
    Combine combine;
    bool inverse;  // v over the probability it was kept with
    bool normalize;
    bool tie;  // whether a sign of 0 counts as plus
    std::int64_t votes;
    double scaling;
    std::uint64_t first;
};

// out = base + scaling * (the experts' contributions combined), element by element, in one pass; what each rule does is
// said in bmm_engine/ops/blend. Sums are of type double if base or an expert is, else float.
//   base, experts   contiguous, of `count` elements, of any floating type each
//   out             contiguous, of any floating type; it may be base or an expert of its own type, but must not
//                   overlap one otherwise
// Returns the index of the first input that is not finite (0 is base, t + 1 expert t), or -1; out then holds anything.
std::int64_t blend(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts, const BlendRule& rule,
                   std::int64_t count, void* out, DType out_dtype, int threads, const std::string& isa);

struct SignBalance {
    std::int64_t not_finite;  // as blend returns it
    std::int64_t balance;
};

// The sum over all elements of the sign of the experts' summed contributions.
SignBalance sign_balance(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts,
                         std::int64_t count, int threads, const std::string& isa);

struct MagnitudeSums {
    std::int64_t not_finite;                      // as blend returns it
    std::vector<std::pair<double, double>> sums;  // of each expert: over all elements, and over those that are kept
};

// The sums of the magnitudes of the experts' differences from the base, in an order that does not depend on the
// threads.
MagnitudeSums magnitude_sums(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts,
                             std::uint64_t first, std::int64_t count, int threads, const std::string& isa);

}  // namespace bmm
