#include "cpu/spectral.h"

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "cpu/product.h"

namespace bmm {
namespace {

constexpr std::int64_t kSpan = 256;  // elements of a row that are finished at a time

template <class T>
struct Problem {
    const Kernel<T>& kernel;
    const View& projected;
    const T* shrinkage;
    const View& eigenvectors;
    const View& anchor;
    const View& base;
    double scale;
    const View& out;
};

template <class T>
class SpectralFactors final : public Factors<T> {
   public:
    explicit SpectralFactors(const Problem<T>& problem)
        : p_(problem),
          transposed_{problem.eigenvectors.data,       problem.eigenvectors.cols,       problem.eigenvectors.rows,
                      problem.eigenvectors.col_stride, problem.eigenvectors.row_stride, problem.eigenvectors.dtype} {}

    // Where sums wait between groups of chunks; (m, n). Not needed when there is only one group.
    void set_partial(T* partial) { partial_ = partial; }

    std::int64_t chunks() const override { return ceil_div(p_.projected.cols, kDepth); }
    std::int64_t depth(std::int64_t chunk) const override {
        return std::min(kDepth, p_.projected.cols - chunk * kDepth);
    }
    void pack_panel(int, std::int64_t chunk, std::int64_t row, std::int64_t rows, std::int64_t col,
                    T* panel) const override {
        const std::int64_t first = chunk * kDepth + row;
        p_.kernel.pack(transposed_, nullptr, first, p_.shrinkage + first, rows, col, panel);
    }
    void pack_rows(int, std::int64_t chunk, std::int64_t row, std::int64_t count, std::int64_t ld,
                   T* out) const override {
        for (std::int64_t i = row; i < row + count; ++i, out += ld) {
            p_.kernel.load(p_.projected.at(i, chunk * kDepth), p_.projected.dtype, p_.projected.col_stride,
                           depth(chunk), out);
        }
    }
    void take(int, const Block& block, const T* sums, std::int64_t ld, bool first, bool last) const override {
        const std::int64_t width = block.j_end - block.j_begin;
        for (std::int64_t i = block.i_begin; i < block.i_end; ++i, sums += ld) {
            T* waiting = partial_ ? partial_ + i * p_.out.cols + block.j_begin : nullptr;
            for (std::int64_t start = 0; start < width; start += kSpan) {
                const std::int64_t count = std::min(kSpan, width - start);
                T values[kSpan];
                std::copy_n(sums + start, count, values);
                if (!first) p_.kernel.add(waiting + start, p_.projected.dtype, 1, T(1), count, values);
                if (last) {
                    finish(i, block.j_begin + start, count, values);
                } else {
                    std::copy_n(values, count, waiting + start);
                }
            }
        }
    }

   private:
    static constexpr std::int64_t kDepth = Product<T>::kDepth;

    void finish(std::int64_t i, std::int64_t j, std::int64_t count, T* values) const {
        p_.kernel.add(p_.anchor.at(i, j), p_.anchor.dtype, p_.anchor.col_stride, static_cast<T>(p_.scale), count,
                      values);
        if (p_.base.data) {
            p_.kernel.add(p_.base.at(i, j), p_.base.dtype, p_.base.col_stride, static_cast<T>(1.0 - p_.scale), count,
                          values);
        }
        p_.kernel.store(values, count, p_.out.at(i, j), p_.out.dtype, p_.out.col_stride);
    }

    const Problem<T>& p_;
    View transposed_;
    T* partial_ = nullptr;
};

template <class T>
void run(const Problem<T>& problem, int threads) {
    SpectralFactors<T> factors(problem);
    Product<T> product(problem.kernel, problem.out.cols, factors);
    product.add(problem.out.rows, Left::rows);
    std::optional<Workspace> partial;
    if (product.plan(threads) > 1) {
        partial.emplace(sizeof(T) * problem.out.rows * problem.out.cols);
        factors.set_partial(static_cast<T*>(partial->data()));
    }
    product.run();
}

void check_shape(const View& view, const char* name, const View& out) {
    BMM_CHECK(view.rows == out.rows && view.cols == out.cols, name, " is ", view.rows, " x ", view.cols, ", out is ",
              out.rows, " x ", out.cols);
}

}  // namespace

void spectral(const View& projected, const void* shrinkage, const View& eigenvectors, const View& anchor,
              const View& base, double scale, const View& out, int threads, const std::string& isa) {
    check_shape(projected, "B", out);
    check_shape(anchor, "the anchor", out);
    if (base.data) check_shape(base, "the base", out);
    BMM_CHECK(base.data || scale == 1.0, "the scale is ", scale, ", which needs the base");
    BMM_CHECK(eigenvectors.rows == out.cols && eigenvectors.cols == out.cols, "Q is ", eigenvectors.rows, " x ",
              eigenvectors.cols, ", out has ", out.cols, " columns");
    BMM_CHECK(projected.dtype == eigenvectors.dtype, "dtype code of B is ", static_cast<int>(projected.dtype),
              ", of Q ", static_cast<int>(eigenvectors.dtype));
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (out.rows == 0 || out.cols == 0) return;
    const Isa& chosen = find_isa(isa);
    if (projected.dtype == DType::f64) {
        run<double>(
            {chosen.f64, projected, static_cast<const double*>(shrinkage), eigenvectors, anchor, base, scale, out},
            threads);
    } else {
        BMM_CHECK(projected.dtype == DType::f32, "dtype code of B is ", static_cast<int>(projected.dtype));
        run<float>(
            {chosen.f32, projected, static_cast<const float*>(shrinkage), eigenvectors, anchor, base, scale, out},
            threads);
    }
}

}  // namespace bmm
