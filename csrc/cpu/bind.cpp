#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/assemble.h"
#include "cpu/gram.h"
#include "cpu/probe.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;

void gram(Address x, Index rows, Index cols, Index row_stride, Index col_stride, int dtype, Address weights, Address g,
          Index g_row_stride, int g_dtype, int threads, const std::string& isa) {
    const bmm::View x_view = bmm::make_view(x, rows, cols, row_stride, col_stride, dtype);
    const bmm::View g_view = bmm::make_view(g, cols, cols, g_row_stride, 1, g_dtype);
    const py::gil_scoped_release release;
    bmm::gram(x_view, reinterpret_cast<const void*>(weights), g_view, threads, isa);
}

void assemble(const std::vector<std::pair<Address, int>>& inputs, const std::vector<double>& weights, double ridge,
              Address out, Index rows, Index cols, int dtype, int threads) {
    std::vector<bmm::Input> checked;
    for (const auto& [data, code] : inputs) {
        checked.push_back({bmm::make_view(data, rows, cols, cols, 1, code).data, bmm::dtype_from_code(code)});
    }
    const bmm::View out_view = bmm::make_view(out, rows, cols, cols, 1, dtype);
    const py::gil_scoped_release release;
    bmm::assemble(checked, weights, ridge, out_view, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Kernels for the CPU. Callers pass addresses and own the memory; see csrc/cpu/*.h.";
    py::register_local_exception<bmm::Error>(module, "Error", PyExc_RuntimeError);
    module.def("gram", &gram);
    module.def("gram_isas", &bmm::gram_isas);
    module.def("assemble", &assemble);
    module.def("probe_fma_gflops", &bmm::probe_fma_gflops, py::call_guard<py::gil_scoped_release>());
    module.def("probe_copy_gbytes_per_s", &bmm::probe_copy_gbytes_per_s, py::call_guard<py::gil_scoped_release>());
}
