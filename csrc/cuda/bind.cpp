#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/assemble.cuh"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

void assemble(const std::vector<std::pair<Address, int>>& inputs, const std::vector<double>& weights, double ridge,
              Address out, Index rows, Index cols, int dtype, int device, Address stream) {
    std::vector<bmm::cuda::Input> checked;
    for (const auto& [data, code] : inputs) {
        checked.push_back({bmm::make_view(data, rows, cols, cols, 1, code).data, bmm::dtype_from_code(code)});
    }
    const bmm::View out_view = bmm::make_view(out, rows, cols, cols, 1, dtype);
    const py::gil_scoped_release release;
    bmm::cuda::assemble(checked, weights, ridge, out_view, device, stream);
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
    module.def("unavailable", &unavailable, py::call_guard<py::gil_scoped_release>());
    module.attr("toolkit") = CUDART_VERSION;
}
