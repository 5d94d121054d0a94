#include "cpu/residual.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/by_type.h"
#include "cpu/product.h"

namespace bmm {
namespace {

template <class T>
class ResidualFactors final : public Factors<T> {
   public:
    ResidualFactors(const Kernel<T>& kernel, const View& anchor, const std::vector<View>& experts,
                    const std::vector<View>& grams, const std::vector<double>& weights, const View& r)
        : kernel_(kernel), anchor_(anchor), experts_(experts), grams_(grams), weights_(weights), r_(r) {
        for (const double weight : weights)
            weight_of_rows_.insert(weight_of_rows_.end(), kDepth, static_cast<T>(weight));
    }

    std::int64_t chunks() const override { return static_cast<std::int64_t>(experts_.size()) * chunks_per_task(); }
    std::int64_t depth(std::int64_t chunk) const override {
        return std::min(kDepth, anchor_.cols - chunk % chunks_per_task() * kDepth);
    }
    void pack_panel(int, std::int64_t chunk, std::int64_t row, std::int64_t rows, std::int64_t col,
                    T* panel) const override {
        const std::int64_t task = chunk / chunks_per_task();
        kernel_.pack(grams_[task], nullptr, chunk % chunks_per_task() * kDepth + row,
                     weights_[task] == 1.0 ? nullptr : weight_of_rows_.data() + task * kDepth, rows, col, panel);
    }
    void pack_rows(int, std::int64_t chunk, std::int64_t row, std::int64_t count, std::int64_t ld,
                   T* out) const override {
        const View& expert = experts_[chunk / chunks_per_task()];
        const std::int64_t first = chunk % chunks_per_task() * kDepth;
        for (std::int64_t i = row; i < row + count; ++i, out += ld) {
            kernel_.load(expert.at(i, first), expert.dtype, expert.col_stride, depth(chunk), out);
            kernel_.add(anchor_.at(i, first), anchor_.dtype, anchor_.col_stride, T(-1), depth(chunk), out);
        }
    }
    void take(int, const Block& block, const T* sums, std::int64_t ld, bool first, bool) const override {
        for (std::int64_t i = block.i_begin; i < block.i_end; ++i, sums += ld) {
            T* row = static_cast<T*>(r_.data) + i * r_.row_stride + block.j_begin;
            const std::int64_t count = block.j_end - block.j_begin;
            if (first) {
                std::copy_n(sums, count, row);
            } else {
                for (std::int64_t j = 0; j < count; ++j) row[j] += sums[j];
            }
        }
    }

   private:
    static constexpr std::int64_t kDepth = Product<T>::kDepth;
    std::int64_t chunks_per_task() const { return ceil_div(anchor_.cols, kDepth); }

    const Kernel<T>& kernel_;
    const View& anchor_;
    const std::vector<View>& experts_;
    const std::vector<View>& grams_;
    const std::vector<double>& weights_;
    std::vector<T> weight_of_rows_;  // each weight kDepth times, as packing takes them
    const View& r_;
};

template <class T>
void run(const View& anchor, const std::vector<View>& experts, const std::vector<View>& grams,
         const std::vector<double>& weights, const View& r, int threads, const Isa& isa) {
    const Kernel<T>& kernel = by_type<T>(isa);
    const ResidualFactors<T> factors(kernel, anchor, experts, grams, weights, r);
    Product<T> product(kernel, r.cols, factors);
    product.add(r.rows, Left::rows);
    product.plan(threads);
    product.run();
}

}  // namespace

void residual(const View& anchor, const std::vector<View>& experts, const std::vector<View>& grams,
              const std::vector<double>& weights, const View& r, int threads, const std::string& isa) {
    BMM_CHECK(!experts.empty() && experts.size() == grams.size() && experts.size() == weights.size(), experts.size(),
              " experts, ", grams.size(), " Grams, ", weights.size(), " weights");
    for (std::size_t t = 0; t < experts.size(); ++t) {
        BMM_CHECK(experts[t].rows == anchor.rows && experts[t].cols == anchor.cols, "expert ", t, " is ",
                  experts[t].rows, " x ", experts[t].cols, ", the anchor ", anchor.rows, " x ", anchor.cols);
        BMM_CHECK(grams[t].rows == anchor.cols && grams[t].cols == anchor.cols, "Gram ", t, " is ", grams[t].rows,
                  " x ", grams[t].cols, ", the anchor has ", anchor.cols, " columns");
        BMM_CHECK(grams[t].dtype == DType::f32 || grams[t].dtype == DType::f64, "dtype code of Gram ", t, " is ",
                  static_cast<int>(grams[t].dtype));
    }
    BMM_CHECK(r.rows == anchor.rows && r.cols == anchor.cols, "R is ", r.rows, " x ", r.cols, ", the anchor ",
              anchor.rows, " x ", anchor.cols);
    BMM_CHECK(r.col_stride == 1 && r.row_stride >= r.cols, "strides of R are ", r.row_stride, ", ", r.col_stride);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    if (r.rows == 0 || r.cols == 0) return;
    if (r.dtype == DType::f64) {
        run<double>(anchor, experts, grams, weights, r, threads, find_isa(isa));
    } else {
        BMM_CHECK(r.dtype == DType::f32, "dtype code of R is ", static_cast<int>(r.dtype));
        run<float>(anchor, experts, grams, weights, r, threads, find_isa(isa));
    }
}

}  // namespace bmm
