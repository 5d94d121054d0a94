#include "cpu/gram.h"

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "cpu/by_type.h"
#include "cpu/product.h"

namespace bmm {
namespace {

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

// Copies what is above the diagonal of a finished block below it while it is in cache, a square of cache lines at a
// time.
template <class T>
void mirror(T* g, std::int64_t ldg, const Block& block) {
    constexpr std::int64_t square = 64 / sizeof(T);
    const auto [i_begin, i_end, j_begin, j_end, diagonal] = block;
    for (std::int64_t j0 = j_begin; j0 < j_end; j0 += square) {
        for (std::int64_t i0 = i_begin; i0 < std::min(i_end, j0 + square); i0 += square) {
            for (std::int64_t j = j0; j < std::min(j0 + square, j_end); ++j) {
                for (std::int64_t i = i0; i < std::min({i0 + square, i_end, j}); ++i) g[j * ldg + i] = g[i * ldg + j];
            }
        }
    }
}

// Result 0 is C where there is a left factor of its own; G comes last.
template <class T>
class GramFactors final : public Factors<T> {
   public:
    GramFactors(const Kernel<T>& kernel, const View* left, const View& right, const RowChoice<T>& rows, const View* c,
                const View& g)
        : kernel_(kernel), left_(left), right_(right), rows_(rows), c_(c), g_(g) {}

    std::int64_t chunks() const override { return ceil_div(rows_.count, kDepth); }
    std::int64_t depth(std::int64_t chunk) const override { return std::min(kDepth, rows_.count - chunk * kDepth); }
    void pack_panel(int result, std::int64_t chunk, std::int64_t row, std::int64_t rows, std::int64_t col,
                    T* panel) const override {
        const std::int64_t first = chunk * kDepth + row;
        const std::int64_t* index = rows_.index.empty() ? nullptr : rows_.index.data() + first;
        const bool weighted = result != Factors<T>::kRight && !rows_.values.empty();
        kernel_.pack(is_c(result) ? *left_ : right_, index, first, weighted ? rows_.values.data() + first : nullptr,
                     rows, col, panel);
    }
    void take(int result, const Block& block, const T* sums, std::int64_t ld, bool, bool last) const override {
        const View& out = is_c(result) ? *c_ : g_;
        T* data = static_cast<T*>(out.data);
        for (std::int64_t i = block.i_begin; i < block.i_end; ++i, sums += ld) {
            T* row = data + i * out.row_stride;
            const std::int64_t begin = block.diagonal ? i : block.j_begin;
            kernel_.add(sums + begin - block.j_begin, kType, 1, T(1), block.j_end - begin, row + begin);
        }
        if (last && !is_c(result)) mirror(data, out.row_stride, block);
    }

   private:
    static constexpr DType kType = sizeof(T) == 8 ? DType::f64 : DType::f32;
    static constexpr std::int64_t kDepth = Product<T>::kDepth;
    bool is_c(int result) const { return left_ && result == 0; }

    const Kernel<T>& kernel_;
    const View* left_;
    const View& right_;
    const RowChoice<T>& rows_;
    const View* c_;
    const View& g_;
};

// Pairs of bf16 cannot carry a weight exactly; a choice of rows they can.
template <class T>
const Kernel<T>& choose_kernel(const Isa& isa, DType, const RowChoice<T>&) {
    return by_type<T>(isa);
}
template <>
const Kernel<float>& choose_kernel(const Isa& isa, DType dtype, const RowChoice<float>& rows) {
    return isa.bf16 && dtype == DType::bf16 && rows.values.empty() ? *isa.bf16 : isa.f32;
}

template <class T>
void run(const View* x, const View& y, const void* weights, const View* c, const View& g, int threads, const Isa& isa) {
    const RowChoice<T> rows(static_cast<const T*>(weights), y.rows);
    const Kernel<T>& kernel = choose_kernel<T>(isa, y.dtype, rows);
    const GramFactors<T> factors(kernel, x, y, rows, c, g);
    Product<T> product(kernel, y.cols, factors);
    if (x) product.add(x->cols, Left::panels);
    if (g.data) product.add(y.cols, rows.values.empty() ? Left::same_as_right : Left::panels, true);
    product.plan(threads);
    product.run();
}

void run(const View* x, const View& y, const void* weights, const View* c, const View& g, int threads,
         const std::string& isa) {
    if (y.rows == 0 || y.cols == 0) return;
    if (y.dtype == DType::f64) {
        run<double>(x, y, weights, c, g, threads, find_isa(isa));
    } else {
        run<float>(x, y, weights, c, g, threads, find_isa(isa));
    }
}

void check_sums(const View& sums, const char* name, std::int64_t rows, const View& y) {
    const DType wanted = y.dtype == DType::f64 ? DType::f64 : DType::f32;
    BMM_CHECK(sums.rows == rows && sums.cols == y.cols, name, " is ", sums.rows, " x ", sums.cols, ", not ", rows,
              " x ", y.cols);
    BMM_CHECK(sums.dtype == wanted, "dtype code of ", name, " is ", static_cast<int>(sums.dtype), ", of the rows ",
              static_cast<int>(y.dtype));
    BMM_CHECK(sums.col_stride == 1 && sums.row_stride >= sums.cols, "strides of ", name, " are ", sums.row_stride, ", ",
              sums.col_stride);
}

}  // namespace

void gram(const View& x, const void* weights, const View& g, int threads, const std::string& isa) {
    check_sums(g, "G", x.cols, x);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    run(nullptr, x, weights, nullptr, g, threads, isa);
}

void cross_gram(const View& x, const View& y, const void* weights, const View& c, const View& g, int threads,
                const std::string& isa) {
    BMM_CHECK(x.rows == y.rows && x.dtype == y.dtype, "X has ", x.rows, " rows of dtype code ",
              static_cast<int>(x.dtype), ", Y ", y.rows, " of ", static_cast<int>(y.dtype));
    check_sums(c, "C", x.cols, y);
    if (g.data) check_sums(g, "G", y.cols, y);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (x.cols == 0) {
        if (g.data) run(nullptr, y, weights, nullptr, g, threads, isa);
        return;
    }
    run(&x, y, weights, &c, g, threads, isa);
}

}  // namespace bmm
