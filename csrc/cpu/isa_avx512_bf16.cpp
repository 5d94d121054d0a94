#include <immintrin.h>

#include "cpu/blend_isa.h"
#include "cpu/isa_kernels.h"

namespace bmm {
namespace {

// sums += a0 * b0 + a1 * b1 for pairs of bf16, in one instruction: exact products, float sums, subnormals as zero.
struct PairDot {
    static constexpr int products = 2;
    using Vector = Register<float, 64>::Aligned;
    static void run(const float* a, const Vector& b, Vector& sum) {
        int pair;
        std::memcpy(&pair, a, sizeof pair);
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), reinterpret_cast<__m512bh>(b));
    }
    static void chain(const Vector& factor, const Vector& term, Vector& sum) {
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(factor), reinterpret_cast<__m512bh>(term));
    }
};

// Two rows of x in one step of the panel: column j holds rows 2k and 2k + 1 in its low and its high half.
template <int NR>
void pack_pairs(const View& x, const std::int64_t* rows, std::int64_t first, const float*, std::int64_t depth,
                std::int64_t col, float* panel) {
    const BFloat16* data = static_cast<const BFloat16*>(x.data) + col * x.col_stride;
    const std::int64_t left = x.cols - col;
    const int width = left < NR ? static_cast<int>(left) : NR;
    std::uint32_t pairs[NR] = {};
    for (std::int64_t k = 0; k < depth; k += 2, panel += NR) {
        const BFloat16* low = data + (rows ? rows[k] : first + k) * x.row_stride;
        if (k + 1 < depth) {
            const BFloat16* high = data + (rows ? rows[k + 1] : first + k + 1) * x.row_stride;
            if (width == NR && x.col_stride == 1) {
                for (int j = 0; j < NR; ++j) pairs[j] = low[j].bits | std::uint32_t{high[j].bits} << 16;
            } else {
                for (int j = 0; j < width; ++j) {
                    pairs[j] = low[j * x.col_stride].bits | std::uint32_t{high[j * x.col_stride].bits} << 16;
                }
            }
        } else {
            for (int j = 0; j < width; ++j) pairs[j] = low[j * x.col_stride].bits;
        }
        std::memcpy(panel, pairs, sizeof pairs);
    }
}

constexpr Kernel<float> pairs = make_kernel<float, 64, 8, 3, PairDot>(2, pack_pairs<48>);

constexpr Isa with_pairs() {
    Isa isa = make_isa<64, 8, 3>("avx512_bf16", &blend_avx512);
    isa.bf16 = &pairs;
    isa.multiply_add_bf16 = multiply_add<float, 64, 8, 3, PairDot>;
    return isa;
}

}  // namespace

const Isa isa_avx512_bf16 = with_pairs();

}  // namespace bmm
