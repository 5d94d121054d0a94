#include "cpu/gram.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.h"
#include "cpu/gram_isa.h"
#include "cpu/parallel.h"

namespace bmm {
namespace {

constexpr std::int64_t kDepth = 256;              // rows in one panel: a right panel stays near the core
constexpr std::int64_t kChunks = 4;               // panels in depth that are packed before G is touched
constexpr std::int64_t kMaxBlockPanels = 5;       // panels on a side of one work item: two blocks and their sums fit in
                                                  // a second-level cache
constexpr std::int64_t kItemsPerThread = 8;       // work items below which they are made smaller
constexpr std::int64_t kSerialFlops = 4'000'000;  // below, starting a thread costs more than it saves

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T[], FreeAligned> allocate(std::int64_t count) {
    const std::int64_t bytes = ceil_div(count * static_cast<std::int64_t>(sizeof(T)), 64) * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(p));
}

// Which rows count. `index` is empty when all do, `values` when every weight that counts is 1.
template <class T>
struct RowChoice {
    std::vector<std::int64_t> index;
    std::vector<T> values;
    std::int64_t count;

    RowChoice(const T* weights, std::int64_t rows) : count(rows) {
        if (!weights) return;
        bool all_ones = true;
        for (std::int64_t r = 0; r < rows; ++r) {
            if (weights[r] == T(0)) continue;
            index.push_back(r);
            values.push_back(weights[r]);
            all_ones = all_ones && weights[r] == T(1);
        }
        count = static_cast<std::int64_t>(index.size());
        if (all_ones) values.clear();
        if (count == rows) index.clear();
    }
};

template <class T>
class Gram {
   public:
    Gram(const GramKernel<T>& kernel, const View& x, const T* weights, const View& g)
        : kernel_(kernel),
          x_(x),
          g_(static_cast<T*>(g.data)),
          ldg_(g.row_stride),
          rows_(weights, x.rows),
          n_(x.cols),
          panels_(ceil_div(n_, kernel.nr)),
          chunks_(std::clamp<std::int64_t>(ceil_div(rows_.count, kDepth), 1, kChunks)),
          block_panels_(kMaxBlockPanels) {
        const std::int64_t size = chunks_ * panels_ * panel_size();
        right_ = allocate<T>(size);
        if (!rows_.values.empty()) left_ = allocate<T>(size);
    }

    void run(int threads) {
        if (rows_.count == 0) return;
        if (rows_.count * n_ * n_ < kSerialFlops) threads = 1;
        while (block_panels_ > 1 && items() < kItemsPerThread * threads) --block_panels_;
        const std::int64_t block_size = side() * side();
        const auto sums = allocate<T>(threads * block_size);
        parallel(threads, [&](Team& team, int worker) {
            for (std::int64_t start = 0; start < rows_.count; start += chunks_ * kDepth) {
                const std::int64_t chunks = std::min(chunks_, ceil_div(rows_.count - start, kDepth));
                const bool last = start + chunks * kDepth >= rows_.count;
                team.share(chunks * panels_, [&](std::int64_t item) { pack(start, item / panels_, item % panels_); });
                team.share(items(), [&](std::int64_t item) {
                    multiply(start, chunks, item, last, sums.get() + worker * block_size);
                });
            }
        });
    }

   private:
    std::int64_t side() const { return block_panels_ * kernel_.nr; }
    std::int64_t blocks() const { return ceil_div(panels_, block_panels_); }
    std::int64_t items() const { return blocks() * (blocks() + 1) / 2; }
    std::int64_t panel_size() const { return kDepth * kernel_.nr; }
    std::int64_t depth(std::int64_t start, std::int64_t chunk) const {
        return std::min(kDepth, rows_.count - start - chunk * kDepth);
    }

    void pack(std::int64_t start, std::int64_t chunk, std::int64_t panel) {
        const std::int64_t first = start + chunk * kDepth;
        const std::int64_t offset = (chunk * panels_ + panel) * panel_size();
        const std::int64_t* index = rows_.index.empty() ? nullptr : rows_.index.data() + first;
        const std::int64_t col = panel * kernel_.nr;
        kernel_.pack(x_, index, first, nullptr, depth(start, chunk), col, right_.get() + offset);
        if (left_) {
            kernel_.pack(x_, index, first, rows_.values.data() + first, depth(start, chunk), col, left_.get() + offset);
        }
    }

    // One block of G on or above the diagonal; the item counts blocks row by row. Its sums over the packed rows grow
    // in a buffer of its own, which stays in cache, before G is touched.
    void multiply(std::int64_t start, std::int64_t chunks, std::int64_t item, bool last, T* sums) {
        std::int64_t block_i = 0;
        for (std::int64_t left = blocks(); item >= left; --left, ++block_i) item -= left;
        const std::int64_t block_j = block_i + item;
        const std::int64_t side = this->side();
        const std::int64_t i_begin = block_i * side;
        const std::int64_t i_end = std::min(n_, i_begin + side);
        const std::int64_t panel_end = std::min(panels_, (block_j + 1) * block_panels_);
        const std::int64_t share =
            panel_size() / ceil_div(side, kernel_.mr);  // of each block, for one tile to prefetch
        std::fill_n(sums, side * side, T(0));
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            const T* right = right_.get() + chunk * panels_ * panel_size();
            const T* left = left_ ? left_.get() + chunk * panels_ * panel_size() : right;
            const std::int64_t step = chunk + 1 < chunks ? panels_ : 0;  // to the next chunk's panels
            const T* next_left = left + (block_i * block_panels_ + step) * panel_size();
            const T* next_right = right + (block_j * block_panels_ + step) * panel_size();
            for (std::int64_t panel = block_j * block_panels_; panel < panel_end; ++panel) {
                const std::int64_t j = panel * kernel_.nr;
                for (std::int64_t i = i_begin; i < std::min(i_end, j + kernel_.nr); i += kernel_.mr) {
                    kernel_.tile(depth(start, chunk), left + (i / kernel_.nr) * panel_size() + i % kernel_.nr,
                                 right + panel * panel_size(), sums + (i - i_begin) * side + j - block_j * side, side,
                                 next_left, next_right);
                    next_left += share;
                    next_right += share;
                }
            }
        }
        const std::int64_t j_begin = block_j * side;
        const std::int64_t j_end = std::min(n_, j_begin + side);
        for (std::int64_t i = i_begin; i < i_end; ++i) {
            for (std::int64_t j = std::max(i, j_begin); j < j_end; ++j) {
                g_[i * ldg_ + j] += sums[(i - i_begin) * side + j - j_begin];
            }
        }
        if (last) mirror(i_begin, i_end, j_begin, j_end);
    }

    // Copies a finished block below the diagonal while it is still in cache, a square of cache lines at a time.
    void mirror(std::int64_t i_begin, std::int64_t i_end, std::int64_t j_begin, std::int64_t j_end) {
        constexpr std::int64_t square = 64 / sizeof(T);
        for (std::int64_t j0 = j_begin; j0 < j_end; j0 += square) {
            for (std::int64_t i0 = i_begin; i0 < std::min(i_end, j0 + square); i0 += square) {
                for (std::int64_t j = j0; j < std::min(j0 + square, j_end); ++j) {
                    for (std::int64_t i = i0; i < std::min({i0 + square, i_end, j}); ++i) {
                        g_[j * ldg_ + i] = g_[i * ldg_ + j];
                    }
                }
            }
        }
    }

    const GramKernel<T>& kernel_;
    const View& x_;
    T* g_;
    std::int64_t ldg_;
    RowChoice<T> rows_;
    std::int64_t n_;
    std::int64_t panels_;
    std::int64_t chunks_;
    std::int64_t block_panels_;                // free to depend on the thread count: no sum runs across blocks
    std::unique_ptr<T[], FreeAligned> right_;  // panels as they are
    std::unique_ptr<T[], FreeAligned> left_;   // panels with their rows weighted; none when every weight is 1
};

std::vector<const GramIsa*> usable() {
    std::vector<const GramIsa*> found;
#ifdef BMM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        found.push_back(&gram_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&gram_avx2);
#endif
    found.push_back(&gram_portable);
    return found;
}

}  // namespace

const GramIsa& gram_isa(const std::string& name) {
    static const std::vector<const GramIsa*> isas = usable();
    for (const GramIsa* isa : isas) {
        if (name.empty() || name == isa->name) return *isa;
    }
    fail(__FILE__, __LINE__, "instruction set '", name,
         "' is not among those that this build has and this machine runs");
}

void gram(const View& x, const void* weights, const View& g, int threads, const std::string& isa) {
    const bool wide = x.dtype == DType::f64;
    BMM_CHECK(g.rows == x.cols && g.cols == x.cols, "G is ", g.rows, " x ", g.cols, ", X has ", x.cols, " columns");
    BMM_CHECK(g.dtype == (wide ? DType::f64 : DType::f32), "dtype code of G is ", static_cast<int>(g.dtype), ", of X ",
              static_cast<int>(x.dtype));
    BMM_CHECK(g.col_stride == 1 && g.row_stride >= g.cols, "strides of G are ", g.row_stride, ", ", g.col_stride);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (x.rows == 0 || x.cols == 0) return;
    if (wide) {
        Gram<double>(gram_isa(isa).f64, x, static_cast<const double*>(weights), g).run(threads);
    } else {
        Gram<float>(gram_isa(isa).f32, x, static_cast<const float*>(weights), g).run(threads);
    }
}

std::vector<std::string> gram_isas() {
    std::vector<std::string> names;
    for (const GramIsa* isa : usable()) names.emplace_back(isa->name);
    return names;
}

}  // namespace bmm
