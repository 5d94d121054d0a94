#include "cpu/select.h"

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace bmm {
namespace {

constexpr std::int64_t kUpper = 1 << 15;
constexpr std::int64_t kLower = 1 << 16;
constexpr std::int64_t kItem = 1 << 18;  // values in one work item
constexpr std::int64_t kSerial = 1 << 15;
constexpr int kLanes = 2;  // tables per thread: neighbours in one bin need not wait for each other's increment

// Calls body(index, bits of the magnitude as float) for each value.
template <class Body>
void for_each_magnitude(const Magnitudes& magnitudes, std::int64_t begin, std::int64_t end, const Isa& isa,
                        const Body& body) {
    std::uint32_t bits[Magnitudes::kSpan];
    for (std::int64_t start = begin; start < end; start += Magnitudes::kSpan) {
        const std::int64_t count = std::min(Magnitudes::kSpan, end - start);
        magnitudes.load(isa, start, count, bits);
        for (std::int64_t i = 0; i < count; ++i) body(i, bits[i]);
    }
}

}  // namespace

void magnitude_histogram(const Magnitudes& magnitudes, std::int64_t count, int upper, std::int64_t* counts,
                         int threads) {
    BMM_CHECK(count >= 0 && (magnitudes.values || count == 0), "count is ", count);
    BMM_CHECK(upper < kUpper, "the upper half is ", upper);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (count == 0) return;
    const std::int64_t bins = upper < 0 ? kUpper : kLower;
    const Isa& isa = find_isa("");
    if (count < kSerial) threads = 1;
    const std::int64_t items = (count + kItem - 1) / kItem;
    threads = static_cast<int>(std::min<std::int64_t>(threads, items));
    std::vector<std::int64_t> own(threads * kLanes * bins);
    parallel(threads, [&](Team& team, int worker) {
        std::int64_t* lanes[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = own.data() + (worker * kLanes + lane) * bins;
        team.share(items, [&](std::int64_t item) {
            const std::int64_t begin = item * kItem;
            const std::int64_t end = std::min(count, begin + kItem);
            if (upper < 0) {
                for_each_magnitude(magnitudes, begin, end, isa,
                                   [&](std::int64_t i, std::uint32_t bits) { ++lanes[i % kLanes][bits >> 16]; });
            } else {
                for_each_magnitude(magnitudes, begin, end, isa, [&](std::int64_t i, std::uint32_t bits) {
                    if (bits >> 16 == static_cast<std::uint32_t>(upper)) ++lanes[i % kLanes][bits & 0xffffu];
                });
            }
        });
        constexpr std::int64_t slice = 4096;
        team.share(bins / slice, [&](std::int64_t item) {
            for (std::int64_t table = 0; table < threads * kLanes; ++table) {
                for (std::int64_t bin = item * slice; bin < (item + 1) * slice; ++bin) {
                    counts[bin] += own[table * bins + bin];
                }
            }
        });
    });
}

}  // namespace bmm
