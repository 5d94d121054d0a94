#include "cpu/assemble.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/parallel.h"

namespace bmm {
namespace {

constexpr std::int64_t kSpan = 1024;                  // elements summed at a time: they stay in the first-level cache
constexpr std::int64_t kItemElements = 64 * 1024;     // elements that one work item covers, in whole rows
constexpr std::int64_t kSerialElements = 128 * 1024;  // below, starting a thread costs more than it saves

template <class T, class Source>
void add(const Source* source, T weight, T* sum, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) sum[i] += weight * static_cast<T>(source[i]);
}

template <class T>
void assemble_rows(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, T* out,
                   std::int64_t n, std::int64_t row_begin, std::int64_t row_end) {
    alignas(64) T sum[kSpan];
    const std::int64_t end = row_end * n;
    for (std::int64_t begin = row_begin * n; begin < end; begin += kSpan) {
        const std::int64_t count = std::min(kSpan, end - begin);
        std::fill_n(sum, count, T(0));
        for (std::size_t t = 0; t < inputs.size(); ++t) {
            const T weight = static_cast<T>(weights[t]);
            if (inputs[t].dtype == DType::f64) {
                add(static_cast<const double*>(inputs[t].data) + begin, weight, sum, count);
            } else {
                add(static_cast<const float*>(inputs[t].data) + begin, weight, sum, count);
            }
        }
        std::copy_n(sum, count, out + begin);
    }
    for (std::int64_t row = row_begin; row < row_end; ++row) out[row * n + row % n] += static_cast<T>(ridge);
}

template <class T>
void run(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, const View& out,
         int threads) {
    const std::int64_t n = out.cols;
    const std::int64_t item_rows = std::max<std::int64_t>(1, kItemElements / n);
    if (out.rows * n < kSerialElements) threads = 1;
    parallel(threads, [&](Team& team, int) {
        team.share((out.rows + item_rows - 1) / item_rows, [&](std::int64_t item) {
            const std::int64_t begin = item * item_rows;
            const std::int64_t end = std::min(out.rows, begin + item_rows);
            assemble_rows(inputs, weights, ridge, static_cast<T*>(out.data), n, begin, end);
        });
    });
}

}  // namespace

void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, double ridge, const View& out,
              int threads) {
    BMM_CHECK(inputs.size() == weights.size(), inputs.size(), " inputs, ", weights.size(), " weights");
    BMM_CHECK(out.col_stride == 1 && out.row_stride == out.cols, "strides of out are ", out.row_stride, ", ",
              out.col_stride);
    BMM_CHECK(out.cols == 0 || out.rows % out.cols == 0, "out is ", out.rows, " x ", out.cols);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    for (const Input& input : inputs) {
        BMM_CHECK(input.dtype == DType::f32 || input.dtype == DType::f64, "dtype code of an input is ",
                  static_cast<int>(input.dtype));
    }
    if (out.rows == 0) return;
    if (out.dtype == DType::f64) {
        run<double>(inputs, weights, ridge, out, threads);
    } else {
        BMM_CHECK(out.dtype == DType::f32, "dtype code of out is ", static_cast<int>(out.dtype));
        run<float>(inputs, weights, ridge, out, threads);
    }
}

}  // namespace bmm
