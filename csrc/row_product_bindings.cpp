#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "row_product.hpp"

namespace py = pybind11;

namespace {

// Products of the same shape, one after another: out [products, rows, outputs], and an x [rows, columns] of its own for
// each, or one for all. Addresses, because numpy has no bfloat16, and a view of every weight for every token would cost
// more than small products do; megatron_tf.kernels.row_product, the only caller, has checked what is behind them.
template <typename T>
void multiply_rows(std::uintptr_t x, bool one_x, const std::vector<std::uintptr_t> &weights, std::uintptr_t out,
                   std::size_t rows, std::size_t outputs, std::size_t columns, std::size_t threads) {
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < weights.size(); ++i)
        megatron_tf::multiply_rows(reinterpret_cast<const T *>(x) + (one_x ? 0 : i * rows * columns),
                                   reinterpret_cast<const T *>(weights[i]),
                                   reinterpret_cast<T *>(out) + i * rows * outputs, rows, outputs, columns, threads);
}

}  // namespace

PYBIND11_MODULE(_row_product, module) {
    module.doc() = "Products of a few rows with a large matrix; megatron_tf.kernels.row_product is its user.";
    module.def("multiply_rows_fp32", &multiply_rows<float>);
    module.def("multiply_rows_bf16", &multiply_rows<megatron_tf::BFloat16>);
}
