#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "row_pattention.hpp"
#include "row_product.hpp"

namespace py = pybind11;

namespace {

// Addresses, because numpy has no bfloat16, and a view of every weight for every token would cost more than small
// products do; megatron_tf.kernels.row_product, the only caller, has checked what is behind them.
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
    throw py::value_error("no normalisation " + name);
}

// Projections of the same x and of the same shape, one after another: out [projections, rows, width_out].
template <typename T>
void attend_rows(Address x, const std::vector<Address> &keys, const std::vector<Address> &values,
                 const std::vector<double> &taus, Address out, const std::string &norm_name, std::size_t rows,
                 std::size_t tokens, std::size_t width_in, std::size_t width_out, std::size_t threads) {
    const auto norm = norm_of(norm_name);
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < keys.size(); ++i)
        megatron_tf::attend_rows(reinterpret_cast<const T *>(x), reinterpret_cast<const T *>(keys[i]),
                                 reinterpret_cast<const T *>(values[i]),
                                 reinterpret_cast<T *>(out) + i * rows * width_out, norm, static_cast<float>(taus[i]),
                                 rows, tokens, width_in, width_out, threads);
}

}  // namespace

PYBIND11_MODULE(_row_product, module) {
    module.doc() = "Products and Pattentions of a few rows; megatron_tf.kernels.row_product is its user.";
    module.def("multiply_rows_fp32", &multiply_rows<float>);
    module.def("multiply_rows_bf16", &multiply_rows<megatron_tf::BFloat16>);
    module.def("attend_rows_fp32", &attend_rows<float>);
    module.def("attend_rows_bf16", &attend_rows<megatron_tf::BFloat16>);
}
