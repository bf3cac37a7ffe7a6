#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "blend.hpp"
#include "indexed_dataset.hpp"
#include "permutation.hpp"
#include "sample_index.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Input = py::array_t<T, py::array::c_style>;

// Transfers a vector's memory to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(megatron_tf::Column<T> &&values) {
    auto owner = std::make_unique<megatron_tf::Column<T>>(std::move(values));
    T *data = owner->data();
    const auto size = static_cast<py::ssize_t>(owner->size());
    py::capsule release(owner.release(), [](void *vector) { delete static_cast<megatron_tf::Column<T> *>(vector); });
    return py::array_t<T>(size, data, release);
}

void require_one_dimension(const py::array &array, const char *name) {
    if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
}

template <typename Id>
py::array permutation_of(std::int64_t n, std::uint64_t key0, std::uint64_t key1) {
    py::array_t<Id> result(n);
    Id *data = result.mutable_data();
    py::gil_scoped_release release;
    megatron_tf::permutation(data, static_cast<std::size_t>(n), key0, key1);
    return result;
}

py::array permutation(std::int64_t n, std::uint64_t key0, std::uint64_t key1) {
    if (n < 0) throw py::value_error("permutation of " + std::to_string(n) + " elements");
    return n <= std::int64_t{std::numeric_limits<std::uint32_t>::max()} ? permutation_of<std::uint32_t>(n, key0, key1)
                                                                        : permutation_of<std::int64_t>(n, key0, key1);
}

template <typename Id, typename Length>
py::tuple sample_index(const Input<Id> &order, const Input<Length> &lengths, std::int64_t seq_length) {
    require_one_dimension(order, "order");
    require_one_dimension(lengths, "lengths");
    megatron_tf::SampleIndex<Id, Length> index;
    {
        py::gil_scoped_release release;
        index = megatron_tf::sample_index(order.data(), order.size(), lengths.data(), lengths.size(), seq_length);
    }
    return py::make_tuple(to_numpy(std::move(index.position)), to_numpy(std::move(index.offset)));
}

py::tuple greedy_blend(const Input<double> &weights, std::int64_t size, bool are_shares) {
    require_one_dimension(weights, "weights");
    if (size < 0) throw py::value_error("blend of " + std::to_string(size) + " samples");
    const py::ssize_t blocks = (size + megatron_tf::kBlendBlock - 1) / megatron_tf::kBlendBlock;
    py::array_t<std::uint16_t> dataset(size);
    py::array_t<std::int64_t> taken({blocks, weights.size()});
    std::uint16_t *datasets = dataset.mutable_data();
    std::int64_t *taken_before = taken.mutable_data();
    {
        py::gil_scoped_release release;
        megatron_tf::greedy_blend(weights.data(), weights.size(), are_shares, size, datasets, taken_before);
    }
    return py::make_tuple(dataset, taken);
}

py::tuple check_index(const py::buffer &file, const py::bytes &type_sizes) {
    const py::buffer_info bytes = file.request();
    const auto sizes = static_cast<std::string>(type_sizes);
    megatron_tf::IndexHeader header;
    {
        py::gil_scoped_release release;
        header = megatron_tf::check_index(static_cast<const std::uint8_t *>(bytes.ptr),
                                          static_cast<std::size_t>(bytes.size * bytes.itemsize),
                                          reinterpret_cast<const std::uint8_t *>(sizes.data()), sizes.size());
    }
    return py::make_tuple(header.type_code, header.sequences, header.bounds, header.bytes, header.one_sequence_each);
}

}  // namespace

PYBIND11_MODULE(_index, module) {
    module.doc() = "Indexed datasets and the order of training samples, in C++; megatron_tf.data is its user.";
    module.def("permutation", &permutation, py::arg("n"), py::arg("key0"), py::arg("key1"));
    // No implicit conversion: it would silently copy arrays of another type.
    const auto order = py::arg("order").noconvert(), lengths = py::arg("lengths").noconvert();
    module.def("sample_index", &sample_index<std::uint32_t, std::int32_t>, order, lengths, py::arg("seq_length"));
    module.def("sample_index", &sample_index<std::uint32_t, std::int64_t>, order, lengths, py::arg("seq_length"));
    module.def("sample_index", &sample_index<std::int64_t, std::int32_t>, order, lengths, py::arg("seq_length"));
    module.def("sample_index", &sample_index<std::int64_t, std::int64_t>, order, lengths, py::arg("seq_length"));
    module.def("greedy_blend", &greedy_blend, py::arg("weights"), py::arg("size"), py::arg("are_shares") = false);
    module.attr("BLEND_BLOCK") = megatron_tf::kBlendBlock;
    module.def("check_index", &check_index, py::arg("file"), py::arg("type_sizes"));
}
