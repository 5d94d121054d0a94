#include "cpu/workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace bmm {
namespace {

std::mutex mutex;
void* kept = nullptr;
std::size_t kept_bytes = 0;

}  // namespace

Workspace::Workspace(std::size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    {
        const std::lock_guard lock(mutex);
        if (kept && kept_bytes >= bytes_) {
            bytes_ = kept_bytes;
            data_ = std::exchange(kept, nullptr);
            return;
        }
    }
    data_ = std::aligned_alloc(64, bytes_);
    if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() {
    if (bytes_ <= kKeptBytes) {
        const std::lock_guard lock(mutex);
        if (!kept || kept_bytes < bytes_) {
            std::swap(kept, data_);
            std::swap(kept_bytes, bytes_);
        }
    }
    std::free(data_);
}

}  // namespace bmm
