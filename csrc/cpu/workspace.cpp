#include "cpu/workspace.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace bmm {
namespace {

struct Kept {
    void* data;
    std::size_t bytes;
};

std::mutex mutex;
constexpr std::size_t kMostKept = 8;
std::vector<Kept> kept = [] {  // smallest first; its own memory is there already when one is returned
    std::vector<Kept> none;
    none.reserve(kMostKept);
    return none;
}();
std::size_t kept_bytes = 0;

}  // namespace

Workspace::Workspace(std::size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    {
        const std::lock_guard lock(mutex);
        const auto fits = std::find_if(kept.begin(), kept.end(), [&](const Kept& one) { return one.bytes >= bytes_; });
        if (fits != kept.end()) {
            data_ = fits->data;
            bytes_ = fits->bytes;
            kept_bytes -= bytes_;
            kept.erase(fits);
            return;
        }
    }
    data_ = std::aligned_alloc(64, bytes_);
    if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() {
    const std::lock_guard lock(mutex);
    if (bytes_ > kKeptBytes) {
        std::free(data_);
        return;
    }
    while (kept.size() == kMostKept || kept_bytes + bytes_ > kKeptBytes) {  // the smallest go first
        std::free(kept.front().data);
        kept_bytes -= kept.front().bytes;
        kept.erase(kept.begin());
    }
    kept.insert(std::find_if(kept.begin(), kept.end(), [&](const Kept& one) { return one.bytes >= bytes_; }),
                {data_, bytes_});
    kept_bytes += bytes_;
}

}  // namespace bmm
