#include "cpu/probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"
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

// Operations per nanosecond of `work(steps, sink)` on every thread.
template <class T>
double gflops(int threads, double (*work)(std::int64_t, T*)) {
    constexpr std::int64_t steps = 2'000'000;
    std::vector<double> operations(threads);
    const double seconds = fastest(threads, [&](std::int64_t item) {
        T sink[3] = {T(0.5), T(1), T(0)};
        operations[item] = work(steps, sink);
    });
    return threads * operations[0] / seconds * 1e-9;
}

}  // namespace

double probe_f32_gflops(int threads) { return gflops<float>(threads, find_isa("").multiply_add_f32); }

double probe_f64_gflops(int threads) { return gflops<double>(threads, find_isa("").multiply_add_f64); }

double probe_bf16_gflops(int threads) {
    const Isa& isa = find_isa("");
    return isa.bf16 ? gflops<float>(threads, isa.multiply_add_bf16) : 0.0;
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
