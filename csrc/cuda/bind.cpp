#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/assemble.cuh"
#include "cuda/cholesky.cuh"
#include "cuda/residual.cuh"
#include "cuda/select.cuh"
#include "cuda/spectral.cuh"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

// (data, member stride, row stride, dtype)
using BatchTuple = std::tuple<Address, Index, Index, int>;
// (data, rows, cols, row stride, col stride, dtype)
using MatrixTuple = std::tuple<Address, Index, Index, Index, Index, int>;
// (data, member stride, row stride)
using SquaresTuple = std::tuple<Address, Index, Index>;

bmm::cuda::Batch batch_from(const BatchTuple& batch) {
    const auto& [data, member_stride, row_stride, code] = batch;
    return {reinterpret_cast<void*>(data), member_stride, row_stride, bmm::dtype_from_code(code)};
}

bmm::View view_from(const MatrixTuple& matrix) {
    const auto& [data, rows, cols, row_stride, col_stride, code] = matrix;
    return bmm::make_view(data, rows, cols, row_stride, col_stride, code);
}

bmm::cuda::Squares squares_from(const SquaresTuple& squares) {
    const auto& [data, member_stride, row_stride] = squares;
    return {reinterpret_cast<void*>(data), member_stride, row_stride};
}

void assemble(const std::vector<std::pair<Address, int>>& inputs, const std::vector<double>& weights,
              const std::vector<double>& ridges, double shrink, Address out, Index rows, Index cols, int dtype,
              int device, Address stream) {
    std::vector<bmm::cuda::Input> checked;
    for (const auto& [data, code] : inputs) {
        checked.push_back({bmm::make_view(data, rows, cols, cols, 1, code).data, bmm::dtype_from_code(code)});
    }
    const bmm::View out_view = bmm::make_view(out, rows, cols, cols, 1, dtype);
    const py::gil_scoped_release release;
    bmm::cuda::assemble(checked, weights, ridges, shrink, out_view, device, stream);
}

void residual(const BatchTuple& anchor, const std::vector<BatchTuple>& experts, const std::vector<BatchTuple>& grams,
              const std::vector<double>& weights, const BatchTuple& out, Index members, Index rows, Index cols,
              int device, Address stream) {
    std::vector<bmm::cuda::Batch> expert_batches, gram_batches;
    for (const BatchTuple& expert : experts) expert_batches.push_back(batch_from(expert));
    for (const BatchTuple& gram : grams) gram_batches.push_back(batch_from(gram));
    const bmm::cuda::Batch anchor_batch = batch_from(anchor), out_batch = batch_from(out);
    const py::gil_scoped_release release;
    bmm::cuda::residual(anchor_batch, expert_batches, gram_batches, weights, out_batch, members, rows, cols, device,
                        stream);
}

void apply_spectral(const MatrixTuple& out, const MatrixTuple& anchor, const MatrixTuple& base,
                    const MatrixTuple& projected, Address shrinkage, const MatrixTuple& eigenvectors, double scale,
                    int device, Address stream) {
    const bmm::View out_view = view_from(out), anchor_view = view_from(anchor), base_view = view_from(base),
                    projected_view = view_from(projected), eigenvectors_view = view_from(eigenvectors);
    const py::gil_scoped_release release;
    bmm::cuda::apply_spectral(out_view, anchor_view, base_view, projected_view,
                              reinterpret_cast<const void*>(shrinkage), eigenvectors_view, scale, device, stream);
}

void cholesky_factor(const SquaresTuple& source, const SquaresTuple& target, const SquaresTuple& inverse, Address info,
                     int offset, Index members, int width, int dtype, int device, Address stream) {
    const bmm::DType checked = bmm::dtype_from_code(dtype);
    const py::gil_scoped_release release;
    bmm::cuda::cholesky_factor(squares_from(source), squares_from(target), squares_from(inverse),
                               reinterpret_cast<std::int32_t*>(info), offset, members, width, checked, device, stream);
}

void cholesky_invert(const SquaresTuple& lower, const SquaresTuple& inverse, Index members, int width, int dtype,
                     int device, Address stream) {
    const bmm::DType checked = bmm::dtype_from_code(dtype);
    const py::gil_scoped_release release;
    bmm::cuda::cholesky_invert(squares_from(lower), squares_from(inverse), members, width, checked, device, stream);
}

void add_magnitude_histogram(Address x, Index elements, int dtype, Address counts, int upper, int device,
                             Address stream) {
    const bmm::DType checked = bmm::dtype_from_code(dtype);
    const py::gil_scoped_release release;
    bmm::cuda::add_magnitude_histogram(reinterpret_cast<const void*>(x), elements, checked,
                                       reinterpret_cast<std::int64_t*>(counts), upper, device, stream);
}

// "" when a kernel could run here; else what the driver says. Importing this module needs no driver.
std::string unavailable() {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess) return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
    return devices > 0 ? "" : "no CUDA device";
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Kernels for CUDA devices. Callers pass addresses and own the memory; see csrc/cuda/*.cuh.";
    py::register_local_exception<bmm::Error>(module, "Error", PyExc_RuntimeError);
    module.def("assemble", &assemble);
    module.def("residual", &residual);
    module.def("apply_spectral", &apply_spectral);
    module.def("cholesky_factor", &cholesky_factor);
    module.def("cholesky_invert", &cholesky_invert);
    module.def("add_magnitude_histogram", &add_magnitude_histogram);
    module.def("unavailable", &unavailable, py::call_guard<py::gil_scoped_release>());
    module.attr("cholesky_block") = bmm::cuda::kCholeskyBlock;
    module.attr("toolkit") = CUDART_VERSION;
}
