#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/assemble.h"
#include "cpu/blend.h"
#include "cpu/gram.h"
#include "cpu/isa.h"
#include "cpu/probe.h"
#include "cpu/ranks.h"
#include "cpu/residual.h"
#include "cpu/select.h"
#include "cpu/spectral.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Index = std::int64_t;
// (address, rows, columns, row stride, column stride, dtype code); address 0 with no rows for an absent matrix.
using Matrix = std::tuple<Address, Index, Index, Index, Index, int>;

bmm::View view(const Matrix& matrix) { return std::apply(bmm::make_view, matrix); }

std::vector<bmm::View> views(const std::vector<Matrix>& matrices) {
    std::vector<bmm::View> result;
    for (const Matrix& matrix : matrices) result.push_back(view(matrix));
    return result;
}

void gram(const Matrix& x, Address weights, const Matrix& g, int threads, const std::string& isa) {
    const bmm::View x_view = view(x);
    const bmm::View g_view = view(g);
    const py::gil_scoped_release release;
    bmm::gram(x_view, reinterpret_cast<const void*>(weights), g_view, threads, isa);
}

void cross_gram(const Matrix& x, const Matrix& y, Address weights, const Matrix& c, const Matrix& g, int threads,
                const std::string& isa) {
    const bmm::View x_view = view(x);
    const bmm::View y_view = view(y);
    const bmm::View c_view = view(c);
    const bmm::View g_view = view(g);
    const py::gil_scoped_release release;
    bmm::cross_gram(x_view, y_view, reinterpret_cast<const void*>(weights), c_view, g_view, threads, isa);
}

void assemble(const std::vector<std::pair<Address, int>>& inputs, const std::vector<double>& weights,
              const std::vector<double>& ridges, double shrink, const Matrix& out, int threads) {
    const bmm::View out_view = view(out);
    std::vector<bmm::Input> checked;
    for (const auto& [data, code] : inputs) {
        checked.push_back({bmm::make_view(data, out_view.rows, out_view.cols, out_view.cols, 1, code).data,
                           bmm::dtype_from_code(code)});
    }
    const py::gil_scoped_release release;
    bmm::assemble(checked, weights, ridges, shrink, out_view, threads);
}

// (address, dtype code) of contiguous elements; address 0 where there are none.
using Elements = std::pair<Address, int>;
// The members of bmm::BlendExpert in their order.
using BlendExpert =
    std::tuple<Elements, double, double, float, float, bool, std::uint64_t, float, float, Address, double, double>;

const void* data_of(const Elements& elements) { return reinterpret_cast<const void*>(elements.first); }

std::vector<bmm::BlendExpert> blend_experts(const std::vector<BlendExpert>& experts) {
    std::vector<bmm::BlendExpert> result;
    for (const auto& [elements, factor, weight, lower, upper, random, seed, keep, width, ranks, unique, dominance] :
         experts) {
        result.push_back({data_of(elements), bmm::dtype_from_code(elements.second), factor, weight, lower, upper,
                          random, seed, keep, width, reinterpret_cast<const float*>(ranks), unique, dominance});
    }
    return result;
}

Index blend(const Elements& base, const std::vector<BlendExpert>& experts, int combine, bool inverse, bool normalize,
            bool tie, Index votes, double scaling, std::uint64_t first, Index count, const Elements& out, int threads,
            const std::string& isa) {
    const std::vector<bmm::BlendExpert> checked = blend_experts(experts);
    const bmm::DType base_dtype = bmm::dtype_from_code(base.second);
    const bmm::DType out_dtype = bmm::dtype_from_code(out.second);
    BMM_CHECK(combine >= 0 && combine <= 5, "combine is ", combine);
    const bmm::BlendRule rule = {static_cast<bmm::Combine>(combine), inverse, normalize, tie, votes, scaling, first};
    const py::gil_scoped_release release;
    return bmm::blend(data_of(base), base_dtype, checked, rule, count, reinterpret_cast<void*>(out.first), out_dtype,
                      threads, isa);
}

std::pair<Index, Index> sign_balance(const Elements& base, const std::vector<BlendExpert>& experts, Index count,
                                     int threads, const std::string& isa) {
    const std::vector<bmm::BlendExpert> checked = blend_experts(experts);
    const bmm::DType base_dtype = bmm::dtype_from_code(base.second);
    const py::gil_scoped_release release;
    const bmm::SignBalance result = bmm::sign_balance(data_of(base), base_dtype, checked, count, threads, isa);
    return {result.not_finite, result.balance};
}

std::pair<Index, std::vector<std::pair<double, double>>> magnitude_sums(const Elements& base,
                                                                        const std::vector<BlendExpert>& experts,
                                                                        std::uint64_t first, Index count, int threads,
                                                                        const std::string& isa) {
    const std::vector<bmm::BlendExpert> checked = blend_experts(experts);
    const bmm::DType base_dtype = bmm::dtype_from_code(base.second);
    const py::gil_scoped_release release;
    bmm::MagnitudeSums result = bmm::magnitude_sums(data_of(base), base_dtype, checked, first, count, threads, isa);
    return {result.not_finite, std::move(result.sums)};
}

void residual(const Matrix& anchor, const std::vector<Matrix>& experts, const std::vector<Matrix>& grams,
              const std::vector<double>& weights, const Matrix& r, int threads, const std::string& isa) {
    const bmm::View anchor_view = view(anchor);
    const bmm::View r_view = view(r);
    const std::vector<bmm::View> expert_views = views(experts);
    const std::vector<bmm::View> gram_views = views(grams);
    const py::gil_scoped_release release;
    bmm::residual(anchor_view, expert_views, gram_views, weights, r_view, threads, isa);
}

void spectral(const Matrix& projected, Address shrinkage, const Matrix& eigenvectors, const Matrix& anchor,
              const Matrix& base, double scale, const Matrix& out, int threads, const std::string& isa) {
    const bmm::View projected_view = view(projected);
    const bmm::View eigenvectors_view = view(eigenvectors);
    const bmm::View anchor_view = view(anchor);
    const bmm::View base_view = view(base);
    const bmm::View out_view = view(out);
    const py::gil_scoped_release release;
    bmm::spectral(projected_view, reinterpret_cast<const void*>(shrinkage), eigenvectors_view, anchor_view, base_view,
                  scale, out_view, threads, isa);
}

bmm::Magnitudes magnitudes(const Elements& x, const Elements& minus) {
    return {data_of(x), bmm::dtype_from_code(x.second), data_of(minus), bmm::dtype_from_code(minus.second)};
}

void magnitude_histogram(Address values, Index count, int dtype, int upper, Address counts, int threads,
                         const Elements& minus) {
    const bmm::Magnitudes checked = magnitudes({values, dtype}, minus);
    const py::gil_scoped_release release;
    bmm::magnitude_histogram(checked, count, upper, reinterpret_cast<Index*>(counts), threads);
}

bool magnitude_ranks(const Elements& x, const Elements& minus, Index rows, Index cols, Address out, int threads) {
    const bmm::Magnitudes checked = magnitudes(x, minus);
    const py::gil_scoped_release release;
    return bmm::magnitude_ranks(checked, rows, cols, reinterpret_cast<float*>(out), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    module.doc() = "Kernels for the CPU. Callers pass addresses and own the memory; see csrc/cpu/*.h.";
    py::register_local_exception<bmm::Error>(module, "Error", PyExc_RuntimeError);
    module.def("gram", &gram);
    module.def("cross_gram", &cross_gram);
    module.def("assemble", &assemble);
    module.def("blend", &blend);
    module.def("sign_balance", &sign_balance);
    module.def("magnitude_sums", &magnitude_sums);
    module.def("residual", &residual);
    module.def("spectral", &spectral);
    module.def("magnitude_histogram", &magnitude_histogram, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
               py::arg(), py::arg("minus") = Elements{});
    module.def("magnitude_ranks", &magnitude_ranks);
    module.def("isa_names", &bmm::isa_names);
    module.def("probe_f32_gflops", &bmm::probe_f32_gflops, release());
    module.def("probe_f64_gflops", &bmm::probe_f64_gflops, release());
    module.def("probe_bf16_gflops", &bmm::probe_bf16_gflops, release());
    module.def("probe_copy_gbytes_per_s", &bmm::probe_copy_gbytes_per_s, release());
}
