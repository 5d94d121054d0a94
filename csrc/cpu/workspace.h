#pragma once

#include <cstddef>

namespace bmm {

// Scratch memory of one call, aligned to cache lines, not initialised. What is returned is kept for later calls, up to
// kKeptBytes in all: fresh pages cost more than the small products that use them.
class Workspace {
   public:
    static constexpr std::size_t kKeptBytes = 64u << 20;

    explicit Workspace(std::size_t bytes);  // throws std::bad_alloc
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    void* data() const { return data_; }

   private:
    void* data_;
    std::size_t bytes_;
};

}  // namespace bmm
