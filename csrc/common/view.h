#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bmm {

// A matrix that someone else owns. Strides count elements, not bytes, and may be any integer.
struct View {
    void* data;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t row_stride;
    std::int64_t col_stride;
    DType dtype;

    void* at(std::int64_t row, std::int64_t col) const {
        return static_cast<char*>(data) + (row * row_stride + col * col_stride) * size_of(dtype);
    }
};

inline View make_view(std::uintptr_t data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                      std::int64_t col_stride, int dtype_code) {
    BMM_CHECK(rows >= 0 && cols >= 0, "rows is ", rows, ", cols is ", cols);
    BMM_CHECK(data != 0 || rows * cols == 0, "null pointer for a matrix of ", rows, " x ", cols);
    return {reinterpret_cast<void*>(data), rows, cols, row_stride, col_stride, dtype_from_code(dtype_code)};
}

}  // namespace bmm
