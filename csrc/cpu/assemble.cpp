#include "cpu/assemble.h"

#include <algorithm>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace bmm {
namespace {

constexpr std::int64_t kSpan = 1024;                 // elements summed at a time: they stay in the first-level cache
constexpr std::int64_t kItemElements = 32 * 1024;    // elements that one work item covers, in whole rows
constexpr std::int64_t kSerialElements = 64 * 1024;  // below, waking a thread costs more than it saves

template <class T>
struct Sum {
    const Kernel<T>& kernel;
    const std::vector<Input>& inputs;
    const std::vector<double>& weights;
    const std::vector<double>& ridges;
    T shrink;
    T* out;
    std::int64_t n;

    void elements(std::int64_t begin, std::int64_t count) const {
        alignas(64) T sum[kSpan];
        std::fill_n(sum, count, T(0));
        for (std::size_t t = 0; t < inputs.size(); ++t) {
            const char* source = static_cast<const char*>(inputs[t].data) + begin * size_of(inputs[t].dtype);
            kernel.add(source, inputs[t].dtype, 1, static_cast<T>(weights[t]), count, sum);
        }
        if (shrink == T(1)) {
            std::copy_n(sum, count, out + begin);
            return;
        }
        for (std::int64_t i = 0; i < count; ++i) out[begin + i] = shrink * sum[i];
        for (std::int64_t row = begin / n; row * n < begin + count; ++row) {
            const std::int64_t diagonal = row * n + row % n - begin;
            if (diagonal >= 0 && diagonal < count) out[begin + diagonal] = sum[diagonal];
        }
    }

    void rows(std::int64_t row_begin, std::int64_t row_end) const {
        for (std::int64_t begin = row_begin * n; begin < row_end * n; begin += kSpan) {
            elements(begin, std::min(kSpan, row_end * n - begin));
        }
        for (std::int64_t row = row_begin; row < row_end; ++row) {
            out[row * n + row % n] += static_cast<T>(ridges[ridges.size() == 1 ? 0 : row / n]);
        }
    }
};

template <class T>
void run(const Sum<T>& sum, std::int64_t rows, int threads) {
    const std::int64_t item_rows = std::max<std::int64_t>(1, kItemElements / sum.n);
    if (rows * sum.n < kSerialElements) threads = 1;
    parallel(threads, [&](Team& team, int) {
        team.share((rows + item_rows - 1) / item_rows,
                   [&](std::int64_t item) { sum.rows(item * item_rows, std::min(rows, (item + 1) * item_rows)); });
    });
}

}  // namespace

void assemble(const std::vector<Input>& inputs, const std::vector<double>& weights, const std::vector<double>& ridges,
              double shrink, const View& out, int threads) {
    BMM_CHECK(inputs.size() == weights.size(), inputs.size(), " inputs, ", weights.size(), " weights");
    BMM_CHECK(out.col_stride == 1 && out.row_stride == out.cols, "strides of out are ", out.row_stride, ", ",
              out.col_stride);
    BMM_CHECK(out.cols == 0 || out.rows % out.cols == 0, "out is ", out.rows, " x ", out.cols);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    for (const Input& input : inputs) {
        BMM_CHECK(input.dtype == DType::f32 || input.dtype == DType::f64, "dtype code of an input is ",
                  static_cast<int>(input.dtype));
    }
    if (out.rows == 0 || out.cols == 0) return;
    BMM_CHECK(ridges.size() == 1 || static_cast<std::int64_t>(ridges.size()) == out.rows / out.cols, ridges.size(),
              " ridges for ", out.rows / out.cols, " matrices");
    const Isa& isa = find_isa("");
    if (out.dtype == DType::f64) {
        run(Sum<double>{isa.f64, inputs, weights, ridges, shrink, static_cast<double*>(out.data), out.cols}, out.rows,
            threads);
    } else {
        BMM_CHECK(out.dtype == DType::f32, "dtype code of out is ", static_cast<int>(out.dtype));
        run(Sum<float>{isa.f32, inputs, weights, ridges, static_cast<float>(shrink), static_cast<float*>(out.data),
                       out.cols},
            out.rows, threads);
    }
}

}  // namespace bmm
