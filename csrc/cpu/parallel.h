#pragma once

#include <atomic>
#include <cstdint>

namespace bmm {

// The threads of one call. Work is handed out item by item; who gets an item must not change its bits.
class Team {
   public:
    // Runs work(item) for every item in [0, items), then waits for the whole team.
    template <class Work>
    void share(std::int64_t items, const Work& work) {
        for (std::int64_t item = next_++; item < items; item = next_++) work(item);
        wait();
    }

    // Called by every member before its first share(), with the same value.
    void set_size(int size) { size_.store(size, std::memory_order_relaxed); }

   private:
    void wait();

    std::atomic<int> size_{1};
    std::atomic<std::int64_t> next_{0};
    std::atomic<int> arrived_{0};
    std::atomic<std::uint32_t> generation_{0};
};

// Calls body(context, worker, team size) once on each of at most `threads` threads, the caller being worker 0.
void run_on_threads(int threads, void (*body)(void* context, int worker, int size), void* context);

// Calls body(team, worker) once on each of at most `threads` threads, worker < threads. The body must not throw.
// When the system grants fewer threads the team is smaller; results do not depend on its size.
template <class Body>
void parallel(int threads, const Body& body) {
    struct Context {
        const Body& body;
        Team team;
    } context{body, {}};
    run_on_threads(
        threads,
        [](void* data, int worker, int size) {
            Context& own = *static_cast<Context*>(data);
            own.team.set_size(size);
            own.body(own.team, worker);
        },
        &context);
}

}  // namespace bmm
