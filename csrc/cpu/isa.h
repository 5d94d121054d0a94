#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/view.h"

namespace bmm {

// What one instruction set brings to a matrix product with sums of type T.
//
// A *panel* holds `nr` columns of a factor, step after step along the summed dimension. One step is one row of the
// source, or `rows_per_step` of them side by side (pairs of bf16, kept in the bits of one T). The same panels serve as
// left and right factor, since mr divides nr.
template <class T>
struct Kernel {
    int mr;
    int nr;
    int lanes;  // of T in one register: mr and nr are multiples of what a tile may leave out
    int rows_per_step;

    // panel[k][j] = (weights ? weights[k] : 1) * x[rows ? rows[k] : first + k][col + j] for k < depth (rows of x),
    // j < nr; 0 where col + j >= x.cols and in the unused half of a last step.
    void (*pack)(const View& x, const std::int64_t* rows, std::int64_t first, const T* weights, std::int64_t depth,
                 std::int64_t col, T* panel);

    // c[i][j] += sum_k left[k * nr + i] * right[k * nr + j] for i < mr and nr - used * lanes <= j < nr. `next` is
    // memory wanted soon: 16 bytes of it are asked for in each step.
    using Tile = void(std::int64_t steps, const T* left, const T* right, T* c, std::int64_t ldc, const char* next);
    Tile* tile[5];  // by `used`, from 1 to nr / lanes

    // The same with a left factor that is stored by rows, left[i * ldl + k], and all columns.
    void (*tile_rows)(std::int64_t steps, const T* left, std::int64_t ldl, const T* right, T* c, std::int64_t ldc,
                      const char* next);

    // values[k] = source[k * stride] for k < count.
    void (*load)(const void* source, DType dtype, std::int64_t stride, std::int64_t count, T* values);
    // sum[k] += weight * source[k * stride] for k < count.
    void (*add)(const void* source, DType dtype, std::int64_t stride, T weight, std::int64_t count, T* sum);
    // target[k * stride] = values[k], rounded to nearest even, for k < count.
    void (*store)(const T* values, std::int64_t count, void* target, DType dtype, std::int64_t stride);
};

struct BlendIsa;  // cpu/blend_isa.h

struct Isa {
    const char* name;
    Kernel<float> f32;
    Kernel<double> f64;
    const Kernel<float>* bf16;  // bf16 pairs, exact products, float sums; null where there is no such instruction
    // Arithmetic on registers alone, for the machine's peak; each returns how many operations it did.
    double (*multiply_add_f32)(std::int64_t steps, float* sink);
    double (*multiply_add_f64)(std::int64_t steps, double* sink);
    double (*multiply_add_bf16)(std::int64_t steps, float* sink);  // null like bf16
    const BlendIsa* blend;
};

extern const Isa isa_portable;
extern const Isa isa_avx2;
extern const Isa isa_avx512;
extern const Isa isa_avx512_bf16;

// The one called `name`, or the best that this machine runs for an empty name.
const Isa& find_isa(const std::string& name);

// Instruction sets that were compiled in and that this machine runs, best first.
std::vector<std::string> isa_names();

}  // namespace bmm
