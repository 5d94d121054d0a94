#pragma once

#include <cstdint>
#include <string>

#include "common/view.h"

namespace bmm {

// What one instruction set brings to the Gram: how to pack a panel and how to multiply two of them.
// A panel holds `nr` columns of some rows of X, row after row, in the accumulation type T. The same panels serve as
// left and right factor, since mr divides nr.
template <class T>
struct GramKernel {
    int mr;
    int nr;
    // panel[k][j] = (weights ? weights[k] : 1) * x[rows ? rows[k] : first + k][col + j]; 0 where col + j >= x.cols
    void (*pack)(const View& x, const std::int64_t* rows, std::int64_t first, const T* weights, std::int64_t depth,
                 std::int64_t col, T* panel);
    // c[i][j] += sum_k left[k * nr + i] * right[k * nr + j] for i < mr, j < nr. On the way it asks for 8 bytes per k
    // from each of the two next addresses, so that what comes after is near when its turn comes.
    void (*tile)(std::int64_t depth, const T* left, const T* right, T* c, std::int64_t ldc, const T* next_left,
                 const T* next_right);
};

struct GramIsa {
    const char* name;
    GramKernel<float> f32;
    GramKernel<double> f64;
    double (*multiply_add)(std::int64_t steps, float* sink);
};

extern const GramIsa gram_portable;
extern const GramIsa gram_avx2;
extern const GramIsa gram_avx512;

// The one called `name`, or the best that this machine runs for an empty name.
const GramIsa& gram_isa(const std::string& name);

}  // namespace bmm
