#include "cpu/ranks.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace bmm {
namespace {

constexpr std::uint32_t kInfinity = 0x7f800000u;
constexpr std::int64_t kWide = 3000;              // columns from which fewer, larger tables are the faster
constexpr std::int64_t kItemElements = 8 * 1024;  // that one work item covers, in whole rows
constexpr std::int64_t kSerialElements = 8 * 1024;

// One thread's memory: a row's magnitudes, and twice its magnitudes with their columns, the magnitude in the upper
// half.
struct Row {
    std::uint32_t* bits;
    std::uint64_t* pairs;
    std::uint64_t* other;
};

// Sorts by digits of `Bits` bits, the lowest first, each pass stable. The last pass only needs to know where each
// column goes. normalised[r] is what rank r is worth. Returns whether no magnitude is NaN.
template <int Bits>
bool rank_row(const Magnitudes& magnitudes, const Isa& isa, std::int64_t begin, std::int64_t cols, const Row& row,
              const float* normalised, float* out) {
    constexpr int passes = (31 + Bits - 1) / Bits;
    constexpr std::uint32_t size = 1u << Bits;
    std::uint32_t counts[passes][size] = {};
    std::uint32_t largest = 0;
    for (std::int64_t start = 0; start < cols; start += Magnitudes::kSpan) {
        const std::int64_t count = std::min(Magnitudes::kSpan, cols - start);
        std::uint32_t* bits = row.bits + start;
        magnitudes.load(isa, begin + start, count, bits);
        for (std::int64_t i = 0; i < count; ++i) {
            largest = std::max(largest, bits[i]);
            for (int pass = 0; pass < passes; ++pass) ++counts[pass][bits[i] >> (pass * Bits) & (size - 1)];
        }
    }
    if (largest > kInfinity) return false;

    // A digit that all share leaves the order as it is, which 16-bit values do with half of theirs.
    int shifts[passes];
    int used = 0;
    for (int pass = 0; pass < passes; ++pass) {
        if (counts[pass][row.bits[0] >> (pass * Bits) & (size - 1)] == cols) continue;
        std::uint32_t position = 0;
        for (std::uint32_t digit = 0; digit < size; ++digit) {
            const std::uint32_t here = counts[pass][digit];
            counts[used][digit] = position;
            position += here;
        }
        shifts[used++] = pass * Bits;
    }
    if (used == 0) {
        std::copy_n(normalised, cols, out);
        return true;
    }
    std::uint64_t* from = row.pairs;
    std::uint64_t* to = row.other;
    if (used == 1) {
        for (std::int64_t j = 0; j < cols; ++j) {
            out[j] = normalised[counts[0][row.bits[j] >> shifts[0] & (size - 1)]++];
        }
        return true;
    }
    for (std::int64_t j = 0; j < cols; ++j) {
        from[counts[0][row.bits[j] >> shifts[0] & (size - 1)]++] =
            std::uint64_t{row.bits[j]} << 32 | static_cast<std::uint32_t>(j);
    }
    for (int pass = 1; pass < used - 1; ++pass) {
        for (std::int64_t k = 0; k < cols; ++k) {
            to[counts[pass][from[k] >> (32 + shifts[pass]) & (size - 1)]++] = from[k];
        }
        std::swap(from, to);
    }
    for (std::int64_t k = 0; k < cols; ++k) {
        const std::uint32_t rank = counts[used - 1][from[k] >> (32 + shifts[used - 1]) & (size - 1)]++;
        out[static_cast<std::uint32_t>(from[k])] = normalised[rank];
    }
    return true;
}

}  // namespace

bool magnitude_ranks(const Magnitudes& magnitudes, std::int64_t rows, std::int64_t cols, float* out, int threads) {
    BMM_CHECK(rows >= 0 && cols >= 0 && cols < std::int64_t{1} << 32, "rows is ", rows, ", cols is ", cols);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (rows == 0 || cols == 0) return true;
    BMM_CHECK(magnitudes.values && out, "null pointer for ", rows, " x ", cols);
    std::vector<float> normalised(cols, 1.0f);
    for (std::int64_t rank = 0; rank < cols - 1; ++rank) {
        normalised[rank] = static_cast<float>(static_cast<double>(rank) / static_cast<double>(cols - 1));
    }
    const std::int64_t item_rows = std::max<std::int64_t>(1, kItemElements / cols);
    const std::int64_t items = (rows + item_rows - 1) / item_rows;
    if (rows * cols < kSerialElements) threads = 1;
    threads = static_cast<int>(std::min<std::int64_t>(threads, items));
    const Isa& isa = find_isa("");
    const auto rank = cols < kWide ? rank_row<8> : rank_row<11>;
    const Workspace workspace(threads * cols * (2 * sizeof(std::uint64_t) + sizeof(std::uint32_t)));
    std::atomic<bool> numbers{true};
    parallel(threads, [&](Team& team, int worker) {
        std::uint64_t* pairs = static_cast<std::uint64_t*>(workspace.data()) + 2 * cols * worker;
        std::uint32_t* bits =
            reinterpret_cast<std::uint32_t*>(static_cast<std::uint64_t*>(workspace.data()) + 2 * cols * threads) +
            cols * worker;
        const Row row = {bits, pairs, pairs + cols};
        team.share(items, [&](std::int64_t item) {
            for (std::int64_t i = item * item_rows; i < std::min(rows, (item + 1) * item_rows); ++i) {
                if (!rank(magnitudes, isa, i * cols, cols, row, normalised.data(), out + i * cols)) numbers = false;
            }
        });
    });
    return numbers;
}

}  // namespace bmm
