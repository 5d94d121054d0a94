#include "cpu/probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/gram_isa.h"
#include "cpu/parallel.h"

namespace bmm {
namespace {

// Seconds of the fastest of five runs of work(0) ... work(threads - 1) side by side.
template <class Work>
double fastest(int threads, const Work& work) {
    BMM_CHECK(threads >= 1, "threads is ", threads);
    double best = 1e30;
    for (int run = 0; run < 5; ++run) {
        const auto start = std::chrono::steady_clock::now();
        parallel(threads, [&](Team& team, int) { team.share(threads, work); });
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

}  // namespace

double probe_fma_gflops(int threads) {
    constexpr std::int64_t steps = 4'000'000;
    const GramIsa& isa = gram_isa("");
    std::vector<double> flops(threads);
    const double seconds = fastest(threads, [&](std::int64_t item) {
        float sink[3] = {0.5f, 1.0f, 0.0f};
        flops[item] = isa.multiply_add(steps, sink);
    });
    return threads * flops[0] / seconds * 1e-9;
}

double probe_copy_gbytes_per_s(int threads) {
    constexpr std::size_t bytes = 256u << 20;
    std::vector<std::vector<char>> source(threads, std::vector<char>(bytes, 1));
    std::vector<std::vector<char>> target(threads, std::vector<char>(bytes, 0));
    const double seconds =
        fastest(threads, [&](std::int64_t item) { std::memcpy(target[item].data(), source[item].data(), bytes); });
    return 2.0 * threads * static_cast<double>(bytes) / seconds * 1e-9;
}

}  // namespace bmm
