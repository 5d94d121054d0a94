// The blocked, threaded matrix product behind gram, cross_gram, residual and spectral.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace bmm {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A block of one result: rows [i_begin, i_end), columns [j_begin, j_end).
struct Block {
    std::int64_t i_begin;
    std::int64_t i_end;
    std::int64_t j_begin;
    std::int64_t j_end;
    bool diagonal;  // only its elements on and above the diagonal count
};

// What is multiplied and where it goes. The summed dimension comes in chunks, each packed once; all calls may come from
// any thread. Left factors (and so results) are numbered in the order of Product::add.
template <class T>
class Factors {
   public:
    static constexpr int kRight = -1;
    virtual ~Factors() = default;
    virtual std::int64_t chunks() const = 0;
    virtual std::int64_t depth(std::int64_t chunk) const = 0;  // at most Product::kDepth
    // A part of a panel of the right factor (`result` kRight) or of a left one (Left::panels): the columns from `col`
    // on, `rows` of the chunk's rows from `row` on.
    virtual void pack_panel(int result, std::int64_t chunk, std::int64_t row, std::int64_t rows, std::int64_t col,
                            T* panel) const = 0;
    // A left factor by rows (Left::rows only): `count` rows from `first` on, `ld` elements apart, over a whole chunk.
    virtual void pack_rows(int /*result*/, std::int64_t /*chunk*/, std::int64_t /*first*/, std::int64_t /*count*/,
                           std::int64_t /*ld*/, T* /*out*/) const {}
    // The sums of one block over one group of chunks, sums[0] being its first element. The groups of a block come in
    // order, one after the other.
    virtual void take(int result, const Block& block, const T* sums, std::int64_t ld, bool first, bool last) const = 0;
};

// Where a left factor comes from: the right factor's own panels, panels of its own, or rows (already transposed).
enum class Left { same_as_right, panels, rows };

// Sums run over chunks in one order whatever the number of threads: the bits depend on the kernel and the shapes only.
template <class T>
class Product {
   public:
    static constexpr std::int64_t kSteps = 256;  // steps in one panel, at most: a right panel stays near the core
    // Rows of the source in one chunk, at most. Where a step takes two of them panels are half full: rounding errors
    // grow with the depth, and faster than it.
    static constexpr std::int64_t kDepth = kSteps;

    Product(const Kernel<T>& kernel, std::int64_t columns, const Factors<T>& factors)
        : kernel_(kernel), factors_(factors), n_(columns), panels_(ceil_div(columns, kernel.nr)) {}

    // A result of left^T right with `rows` rows, the upper triangle only if `upper` says so.
    void add(std::int64_t rows, Left left, bool upper = false) { parts_.push_back({rows, left, upper, 0, 0, 0}); }

    // Fixes the blocks; returns in how many groups of chunks each of them will be summed.
    std::int64_t plan(int threads) {
        threads_ = operations() < kSerialOperations ? 1 : threads;
        lay_out();
        return ceil_div(factors_.chunks(), group_);
    }

    // After plan(). Throws std::bad_alloc before anything is taken.
    void run() {
        const std::int64_t chunks = factors_.chunks();
        const std::int64_t groups = ceil_div(chunks, group_);
        if (groups == 0) return;
        const std::int64_t buffer = group_ * chunk_size_;
        const Workspace workspace(sizeof(T) * ((groups > 1 ? 2 : 1) * buffer + threads_ * block_size()));
        T* packed = static_cast<T*>(workspace.data());
        T* sums = packed + (groups > 1 ? 2 : 1) * buffer;
        parallel(threads_, [&](Team& team, int worker) {
            // Each phase multiplies one group of chunks and packs the next one beside it.
            for (std::int64_t phase = -1; phase < groups; ++phase) {
                const std::int64_t next = phase + 1 < groups ? chunks_in(phase + 1, chunks) : 0;
                const std::int64_t pack_items = next * packs_per_chunk_;
                const std::int64_t items = phase >= 0 ? items_ : 0;
                team.share(pack_items + items, [&](std::int64_t item) {
                    if (item < pack_items) {
                        pack((phase + 1) * group_ + item / packs_per_chunk_, item % packs_per_chunk_,
                             packed + (phase + 1) % 2 * buffer + item / packs_per_chunk_ * chunk_size_);
                    } else {
                        multiply(phase * group_, chunks_in(phase, chunks), item - pack_items, phase == 0,
                                 phase + 1 == groups, packed + phase % 2 * buffer, sums + worker * block_size());
                    }
                });
            }
        });
    }

   private:
    struct Part {
        std::int64_t rows;
        Left left;
        bool upper;
        std::int64_t offset;  // of its packed left factor within a chunk
        std::int64_t panels;  // and how many it has: none when it is the right factor
        std::int64_t first_item;
    };

    static constexpr std::int64_t kMaxStrip = 8;            // panels that one work item packs
    static constexpr std::int64_t kPackSteps = 16;          // steps of each before it turns to the next one
    static constexpr std::int64_t kPrefetch = 16;           // bytes that a tile asks for in each step
    static constexpr double kSerialOperations = 4e6;        // below, waking a thread costs more than it saves
    static constexpr std::int64_t kMaxBlockPanels = 5;      // panels on a side of a block: two blocks and their sums
                                                            // fit in a second-level cache
    static constexpr std::int64_t kItemsPerThread = 4;      // work items below which they are made smaller
    static constexpr std::int64_t kMaxGroup = 4;            // chunks that are packed before C is touched
    static constexpr std::int64_t kPackedBytes = 32 << 20;  // and how much they may take

    double operations() const {
        double depth = 0;
        for (std::int64_t chunk = 0; chunk < factors_.chunks(); ++chunk)
            depth += static_cast<double>(factors_.depth(chunk));
        double area = 0;
        for (const Part& part : parts_) area += static_cast<double>(part.rows) * (part.upper ? 0.5 : 1.0);
        return 2.0 * depth * area * static_cast<double>(n_);
    }

    std::int64_t side() const { return block_panels_ * kernel_.nr; }
    std::int64_t block_size() const { return side() * side(); }
    std::int64_t panel_size() const { return kSteps * kernel_.nr; }
    std::int64_t chunks_in(std::int64_t group, std::int64_t chunks) const {
        return std::min(group_, chunks - group * group_);
    }
    std::int64_t column_blocks() const { return ceil_div(panels_, block_panels_); }

    void lay_out() {
        for (block_panels_ = kMaxBlockPanels;; --block_panels_) {
            items_ = 0;
            for (Part& part : parts_) {
                part.first_item = items_;
                items_ += part.upper ? column_blocks() * (column_blocks() + 1) / 2
                                     : ceil_div(part.rows, side()) * column_blocks();
            }
            if (block_panels_ == 1 || items_ >= kItemsPerThread * threads_) break;
        }
        chunk_size_ = panels_ * panel_size();
        strip_ = threads_ == 1 ? kMaxStrip : std::clamp<std::int64_t>(panels_ / (2 * threads_), 1, kMaxStrip);
        packs_per_chunk_ = ceil_div(panels_, strip_);
        for (Part& part : parts_) {
            const bool own = part.left != Left::same_as_right;
            part.offset = own ? chunk_size_ : 0;
            part.panels = own ? ceil_div(part.rows, kernel_.nr) : 0;
            chunk_size_ += part.panels * panel_size();
            packs_per_chunk_ += ceil_div(part.panels, strip_);
        }
        const std::int64_t fitting = kPackedBytes / (2 * chunk_size_ * static_cast<std::int64_t>(sizeof(T)));
        group_ = std::max<std::int64_t>(1, std::min({kMaxGroup, fitting, factors_.chunks()}));
    }

    // Packs one strip of panels of one factor.
    void pack(std::int64_t chunk, std::int64_t item, T* out) const {
        int result = Factors<T>::kRight;
        std::int64_t panels = panels_;
        std::int64_t offset = 0;
        while (item >= ceil_div(panels, strip_)) {
            item -= ceil_div(panels, strip_);
            ++result;
            panels = parts_[result].panels;
            offset = parts_[result].offset;
        }
        const std::int64_t begin = item * strip_;
        const std::int64_t end = std::min(panels, begin + strip_);
        out += offset;
        if (result >= 0 && parts_[result].left == Left::rows) {
            const std::int64_t first = begin * kernel_.nr;
            const std::int64_t count = std::min(parts_[result].rows, end * kernel_.nr) - first;
            return factors_.pack_rows(result, chunk, first, count, kSteps, out + begin * panel_size());
        }
        // A few rows of all panels at a time: that reads long runs of each row of the source.
        const std::int64_t depth = factors_.depth(chunk);
        const std::int64_t some = kPackSteps * kernel_.rows_per_step;
        for (std::int64_t row = 0; row < depth; row += some) {
            for (std::int64_t panel = begin; panel < end; ++panel) {
                factors_.pack_panel(result, chunk, row, std::min(some, depth - row), panel * kernel_.nr,
                                    out + panel * panel_size() + row / kernel_.rows_per_step * kernel_.nr);
            }
        }
    }

    // One block of one result. Its sums over the group grow in a buffer of its own, which stays in cache.
    void multiply(std::int64_t first_chunk, std::int64_t chunks, std::int64_t item, bool first, bool last,
                  const T* packed, T* sums) const {
        std::size_t p = parts_.size() - 1;
        while (item < parts_[p].first_item) --p;
        const Part& part = parts_[p];
        item -= part.first_item;
        std::int64_t block_i = 0;
        std::int64_t block_j = 0;
        if (part.upper) {
            for (std::int64_t left = column_blocks(); item >= left; --left, ++block_i) item -= left;
            block_j = block_i + item;
        } else {
            block_i = item / column_blocks();
            block_j = item % column_blocks();
        }
        const Block block = {block_i * side(), std::min(part.rows, (block_i + 1) * side()), block_j * side(),
                             std::min(n_, (block_j + 1) * side()), part.upper && block_i == block_j};
        std::fill_n(sums, side() * ceil_div(block.i_end - block.i_begin, kernel_.mr) * kernel_.mr, T(0));
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            const std::int64_t depth = factors_.depth(first_chunk + chunk);
            const T* data = packed + chunk * chunk_size_;
            multiply_chunk(part, data, ceil_div(depth, kernel_.rows_per_step), block,
                           chunk + 1 < chunks ? data + chunk_size_ : packed, chunk + 1 < chunks ? 0 : side(), sums);
        }
        factors_.take(static_cast<int>(p), block, sums, side(), first, last);
    }

    // `soon` is the chunk that comes next and `shift` how far its columns are to the right: on the way its panels are
    // asked for, half of the tiles taking the left factor's and half the right one's.
    void multiply_chunk(const Part& part, const T* data, std::int64_t steps, const Block& block, const T* soon,
                        std::int64_t shift, T* sums) const {
        const auto [i_begin, i_end, j_begin, j_end, diagonal] = block;
        const std::int64_t column_tiles = ceil_div(i_end - i_begin, kernel_.mr);
        const std::int64_t tiles = column_tiles * ceil_div(j_end - j_begin, kernel_.nr);
        const std::int64_t left_soon = part.offset + i_begin / kernel_.nr * panel_size();
        const std::int64_t right_soon = (j_begin + shift) / kernel_.nr * panel_size();
        std::int64_t done = 0;
        for (std::int64_t j = j_begin; j < j_end; j += kernel_.nr) {
            const T* right = data + j / kernel_.nr * panel_size();
            T* column = sums + j - j_begin;
            const std::int64_t end = diagonal ? std::min(i_end, j + kernel_.nr) : i_end;
            for (std::int64_t i = i_begin; i < end; i += kernel_.mr, ++done) {
                const bool of_left = 2 * done < tiles;
                const char* next = reinterpret_cast<const char*>(soon + (of_left ? left_soon : right_soon)) +
                                   kPrefetch * steps * (of_left ? done : done - tiles / 2);
                T* c = column + (i - i_begin) * side();
                if (part.left == Left::rows) {
                    kernel_.tile_rows(steps, data + part.offset + i * kSteps, kSteps, right, c, side(), next);
                    continue;
                }
                // Columns before i are below the diagonal: whole registers of them are left out.
                const std::int64_t skipped = diagonal && i > j ? (i - j) / kernel_.lanes : 0;
                const T* left = data + part.offset + i / kernel_.nr * panel_size() + i % kernel_.nr;
                kernel_.tile[kernel_.nr / kernel_.lanes - skipped](steps, left, right, c, side(), next);
            }
        }
    }

    const Kernel<T>& kernel_;
    const Factors<T>& factors_;
    std::int64_t n_;
    std::int64_t panels_;
    std::vector<Part> parts_;
    int threads_ = 1;
    std::int64_t block_panels_ = 1;  // free to depend on the thread count: no sum runs across blocks
    std::int64_t items_ = 0;
    std::int64_t chunk_size_ = 0;
    std::int64_t packs_per_chunk_ = 0;
    std::int64_t strip_ = 1;
    std::int64_t group_ = 1;
};

}  // namespace bmm
