#pragma once

#include <atomic>
#include <barrier>
#include <cstdint>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

namespace bmm {

// The threads of one call. Work is handed out item by item; who gets an item must not change its bits.
class Team {
   public:
    explicit Team(int size) : barrier_(size, Reset{&next_}) {}

    // Runs work(item) for every item in [0, items), then waits for the whole team.
    template <class Work>
    void share(std::int64_t items, const Work& work) {
        for (std::int64_t item = next_++; item < items; item = next_++) work(item);
        barrier_.arrive_and_wait();
    }

   private:
    struct Reset {
        std::atomic<std::int64_t>* next;
        void operator()() noexcept { next->store(0); }
    };

    std::atomic<std::int64_t> next_{0};
    std::barrier<Reset> barrier_;
};

// Calls body(team, worker) once on each of `threads` threads, the caller being worker 0. The body must not throw.
// When the system grants fewer threads the team is smaller; results do not depend on its size.
template <class Body>
void parallel(int threads, const Body& body) {
    std::optional<Team> team;
    std::atomic<bool> complete{false};
    std::vector<std::thread> others;
    others.reserve(threads > 1 ? threads - 1 : 0);
    try {
        for (int i = 1; i < threads; ++i) {
            others.emplace_back([&, i] {
                complete.wait(false);
                body(*team, i);
            });
        }
    } catch (const std::system_error&) {
    }
    team.emplace(static_cast<int>(others.size()) + 1);
    complete = true;
    complete.notify_all();
    body(*team, 0);
    for (std::thread& other : others) other.join();
}

}  // namespace bmm
