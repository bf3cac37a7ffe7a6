#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "order.hpp"

namespace py = pybind11;

template <typename T>
using Input = py::array_t<T, py::array::c_style>;

// Hands a vector's memory to numpy without copying it.
template <typename T>
static py::array_t<T> to_numpy(std::vector<T> &&values, std::vector<py::ssize_t> shape) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    T *data = owner->data();
    py::capsule release(owner.release(), [](void *vector) { delete static_cast<std::vector<T> *>(vector); });
    return py::array_t<T>(shape, data, release);
}

static void require_one_dimension(const py::array &array, const char *name) {
    if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
}

PYBIND11_MODULE(_index, module) {
    module.doc() = "Order of training samples, in C++; megatron_tf.data.order is its user.";

    module.def(
        "permutation",
        [](std::int64_t n, std::uint64_t key0, std::uint64_t key1) {
            std::vector<std::int64_t> result;
            {
                py::gil_scoped_release release;
                result = megatron_tf::permutation(n, key0, key1);
            }
            return to_numpy(std::move(result), {n});
        },
        py::arg("n"), py::arg("key0"), py::arg("key1"));

    module.def(
        "sample_index",
        [](const Input<std::int64_t> &order, const Input<std::int64_t> &lengths, std::int64_t seq_length) {
            require_one_dimension(order, "order");
            require_one_dimension(lengths, "lengths");
            std::vector<std::int64_t> result;
            {
                py::gil_scoped_release release;
                result = megatron_tf::sample_index(order.data(), order.size(), lengths.data(), lengths.size(),
                                                   seq_length);
            }
            const auto rows = static_cast<py::ssize_t>(result.size() / 2);
            return to_numpy(std::move(result), {rows, 2});
        },
        py::arg("order"), py::arg("lengths"), py::arg("seq_length"));

    module.def(
        "blend",
        [](const Input<double> &weights, std::int64_t size) {
            require_one_dimension(weights, "weights");
            megatron_tf::Blend result;
            {
                py::gil_scoped_release release;
                result = megatron_tf::blend(weights.data(), weights.size(), size);
            }
            return py::make_tuple(to_numpy(std::move(result.dataset), {size}),
                                  to_numpy(std::move(result.sample), {size}));
        },
        py::arg("weights"), py::arg("size"));
}
