#include "cpu/parallel.h"

#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace bmm {
namespace {

constexpr int kSpins = 4000;  // about 0.1 ms: a phase's stragglers arrive well within it

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    void (*body)(void*, int, int);
    void* context;
};

// The OpenMP runtime that the process has loaded already, if any: torch brings one. Its threads spin for a while after
// each of torch's operations, so a second set of threads would share cores with them; joining them also starts faster.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;

    OpenMp() {
#if defined(__linux__)
        if (std::getenv("BMM_OWN_THREADS")) return;
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
    }

    bool found() const { return parallel && thread_num && num_threads; }
};

const OpenMp& openmp() {
    static const OpenMp runtime;
    return runtime;
}

void run_on_openmp(int threads, const Job& job) {
    openmp().parallel(
        [](void* data) {
            const Job& own = *static_cast<const Job*>(data);
            own.body(own.context, openmp().thread_num(), openmp().num_threads());
        },
        const_cast<Job*>(&job), static_cast<unsigned>(threads), 0);
}

void run_on_own_threads(int threads, const Job& job) {
    std::atomic<int> size{0};  // 0 until it is known how many threads the system granted
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        for (int worker = 1; worker < threads; ++worker) {
            others.emplace_back([&, worker] {
                size.wait(0);
                job.body(job.context, worker, size.load());
            });
        }
    } catch (const std::system_error&) {
    }
    size = static_cast<int>(others.size()) + 1;
    size.notify_all();
    job.body(job.context, 0, size.load());
    for (std::thread& other : others) other.join();
}

}  // namespace

void Team::wait() {
    const std::uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_.load(std::memory_order_relaxed)) {
        next_.store(0, std::memory_order_relaxed);
        arrived_.store(0, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
        if (generation_.load(std::memory_order_acquire) != generation) return;
        relax();
    }
    generation_.wait(generation, std::memory_order_acquire);
}

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
    const Job job{body, context};
    if (threads <= 1) {
        body(context, 0, 1);
    } else if (openmp().found()) {
        run_on_openmp(threads, job);
    } else {
        run_on_own_threads(threads, job);
    }
}

}  // namespace bmm
