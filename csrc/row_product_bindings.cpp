#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "row_pattention.hpp"
#include "row_product.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Raw pointers, because numpy has no bfloat16, and a view of every weight for every token would cost more than small
// products do; megatron_tf.kernels.row_product, the only caller, has checked shapes and types.
using Address = std::uintptr_t;

template <typename T>
void multiply_rows(Address x, Address weight, Address out, std::size_t rows, std::size_t outputs, std::size_t columns,
                   std::size_t threads) {
    py::gil_scoped_release release;
    megatron_tf::multiply_rows(reinterpret_cast<const T *>(x), reinterpret_cast<const T *>(weight),
                               reinterpret_cast<T *>(out), rows, outputs, columns, threads);
}

megatron_tf::Norm norm_of(const std::string &name) {
    if (name == "l2_norm_gelu") return megatron_tf::Norm::l2_norm_gelu;
    if (name == "gelu_l2_norm") return megatron_tf::Norm::gelu_l2_norm;
    if (name == "softmax") return megatron_tf::Norm::softmax;
    throw py::value_error("no normalization " + name);
}

// Projections of the same x and of the same shape, one after another: out [projections, rows, width_out].
template <typename T>
void pattend_rows(Address x, Address out, const std::vector<Address> &keys, const std::vector<Address> &values,
                  const std::vector<double> &taus, const std::string &norm_name, std::size_t rows,
                  std::size_t tokens, std::size_t width_in, std::size_t width_out, std::size_t threads) {
    const auto norm = norm_of(norm_name);
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < keys.size(); ++i)
        megatron_tf::pattend_rows(reinterpret_cast<const T *>(x), reinterpret_cast<const T *>(keys[i]),
                                  reinterpret_cast<const T *>(values[i]),
                                  reinterpret_cast<T *>(out) + i * rows * width_out, norm, static_cast<float>(taus[i]),
                                  rows, tokens, width_in, width_out, threads);
}

template <typename T>
void define(py::module_ &module, const std::string &type) {
    module.def(("multiply_rows_" + type).c_str(), &multiply_rows<T>, "x"_a, "weight"_a, "out"_a, py::pos_only(),
               "rows"_a, "outputs"_a, "columns"_a, "threads"_a);
    module.def(("pattend_rows_" + type).c_str(), &pattend_rows<T>, "x"_a, "out"_a, py::pos_only(), "keys"_a,
               "values"_a, "taus"_a, "norm"_a, "rows"_a, "tokens"_a, "width_in"_a, "width_out"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_row_product, module) {
    module.doc() = "Products and Pattentions of a few rows; megatron_tf.kernels.row_product is its user.";
    define<float>(module, "fp32");
    define<megatron_tf::BFloat16>(module, "bf16");
}
