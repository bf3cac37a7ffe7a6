#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "normalization.hpp"
#include "row_attention.hpp"
#include "row_block.hpp"
#include "row_pattention.hpp"
#include "row_product.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using megatron_tf::normalization::with_norm;

namespace {

// Raw pointers, because numpy has no bfloat16, and a view of every weight for every token would cost more than small
// products do; the callers, modules of megatron_tf.kernels, have checked shapes and types.
using Address = std::uintptr_t;

template <typename T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

template <typename T>
void multiply_rows(Address x, Address weight, Address out, std::size_t rows, std::size_t outputs, std::size_t columns,
                   std::size_t threads) {
    py::gil_scoped_release release;
    megatron_tf::multiply_rows(at<const T>(x), at<const T>(weight), at<T>(out), rows, outputs, columns, threads);
}

// Projections of the same x and of the same shape, one after another: out [projections, rows, width_out].
template <typename T>
void pattend_rows(Address x, Address out, const std::vector<Address> &keys, const std::vector<Address> &values,
                  const std::vector<double> &taus, const std::string &norm, std::size_t rows, std::size_t tokens,
                  std::size_t width_in, std::size_t width_out, std::size_t threads) {
    py::gil_scoped_release release;
    with_norm(norm, [&]<typename Norm>(Norm) {
        for (std::size_t i = 0; i < keys.size(); ++i)
            megatron_tf::pattend_rows<Norm>(at<const T>(x), at<const T>(keys[i]), at<const T>(values[i]),
                                            at<T>(out) + i * rows * width_out, static_cast<float>(taus[i]), rows,
                                            tokens, width_in, width_out, threads);
    });
}

template <typename T>
void attend_rows(Address q, Address k, Address v, Address out, Address keys, Address values,
                 const std::vector<std::size_t> &past, std::size_t tokens, std::size_t heads, std::size_t dim,
                 std::size_t capacity, std::size_t threads) {
    py::gil_scoped_release release;
    megatron_tf::attend_rows<T>({at<const T>(q), at<const T>(k), at<const T>(v), at<T>(keys), at<T>(values), at<T>(out),
                                 past, tokens, heads, dim, capacity},
                                threads);
}

// A block of a model for a few tokens: see megatron_tf/kernels/row_block.py.
template <typename T>
class RowBlock {
   public:
    RowBlock(const std::vector<Address> &keys, const std::vector<Address> &values, const std::vector<double> &taus,
             const std::vector<std::size_t> &tokens, std::string norm, std::size_t heads, std::size_t dim,
             float epsilon, std::size_t threads)
        : norm_(std::move(norm)), block_{{}, heads, dim, epsilon, threads} {
        for (std::size_t i = 0; i < keys.size(); ++i)
            block_.projections.push_back(
                {at<const T>(keys[i]), at<const T>(values[i]), static_cast<float>(taus[i]), tokens[i]});
    }

    void run(Address x, Address out, std::size_t tokens, Address cos, Address sin, std::size_t rotated,
             std::size_t tokens_of_position, Address keys, Address values, const std::vector<std::size_t> &past,
             std::size_t capacity) const {
        py::gil_scoped_release release;
        with_norm(norm_, [&]<typename Norm>(Norm) {
            block_.template run<Norm>(at<const T>(x), at<T>(out), tokens,
                                      {at<const T>(cos), at<const T>(sin), rotated, tokens_of_position},
                                      {at<T>(keys), at<T>(values), past, capacity});
        });
    }

   private:
    std::string norm_;
    megatron_tf::RowBlock<T> block_;
};

// Scores [rows, tokens], for which the normalizing functions are methods: see megatron_tf/kernels/native.py.
template <typename T>
class ScoreRows {
   public:
    ScoreRows(Address scores, const std::string &norm, std::size_t rows, std::size_t tokens, std::size_t threads)
        : norm_(norm), in_{at<const T>(scores), rows, tokens, threads} {}

    void statistics(Address statistic) const {
        with_normalizer([&](const auto &each) { each.statistics(at<float>(statistic)); });
    }
    void weights(Address factor, Address out) const {
        with_normalizer([&](const auto &each) { each.weights(at<const float>(factor), at<T>(out)); });
    }
    void forward(Address tau, Address factor, Address out) const {
        with_normalizer([&](const auto &each) { each.forward(at<const float>(tau), at<float>(factor), at<T>(out)); });
    }
    void backward_activation(Address factor, Address grad, Address out, Address inner) const {
        with_normalizer([&](const auto &each) {
            each.backward_activation(at<const float>(factor), at<T>(grad), at<T>(out), at<float>(inner));
        });
    }
    void backward_norm(Address factor, Address share, Address grad) const {
        with_normalizer([&](const auto &each) {
            each.backward_norm(at<const float>(factor), at<const float>(share), at<T>(grad));
        });
    }
    void backward(Address tau, Address factor, Address grad, Address out) const {
        with_normalizer([&](const auto &each) {
            each.backward(at<const float>(tau), at<const float>(factor), at<T>(grad), at<T>(out));
        });
    }

   private:
    template <typename Use>
    void with_normalizer(const Use &use) const {
        py::gil_scoped_release release;
        with_norm(norm_, [&]<typename Norm>(Norm) { use(megatron_tf::Normalizer<Norm, T>{in_}); });
    }

    std::string norm_;
    megatron_tf::ScoreRows<T> in_;
};

template <typename T>
void define(py::module_ &module, const std::string &type, const char *rows, const char *block) {
    module.def(("multiply_rows_" + type).c_str(), &multiply_rows<T>, "x"_a, "weight"_a, "out"_a, py::pos_only(),
               "rows"_a, "outputs"_a, "columns"_a, "threads"_a);
    module.def(("pattend_rows_" + type).c_str(), &pattend_rows<T>, "x"_a, "out"_a, py::pos_only(), "keys"_a,
               "values"_a, "taus"_a, "norm"_a, "rows"_a, "tokens"_a, "width_in"_a, "width_out"_a, "threads"_a);
    module.def(("attend_rows_" + type).c_str(), &attend_rows<T>, "q"_a, "k"_a, "v"_a, "out"_a, py::pos_only(),
               "keys"_a, "values"_a, "past"_a, "tokens"_a, "heads"_a, "dim"_a, "capacity"_a, "threads"_a);
    py::class_<RowBlock<T>>(module, block)
        .def(py::init<std::vector<Address>, std::vector<Address>, std::vector<double>, std::vector<std::size_t>,
                      std::string, std::size_t, std::size_t, float, std::size_t>(),
             py::kw_only(), "keys"_a, "values"_a, "taus"_a, "tokens"_a, "norm"_a, "heads"_a, "dim"_a, "epsilon"_a,
             "threads"_a)
        .def("run", &RowBlock<T>::run, "x"_a, "out"_a, py::pos_only(), "tokens"_a, "cos"_a, "sin"_a, "rotated"_a,
             "tokens_of_position"_a, "keys"_a, "values"_a, "past"_a, "capacity"_a);
    py::class_<ScoreRows<T>>(module, rows)
        .def(py::init<Address, std::string, std::size_t, std::size_t, std::size_t>(), "scores"_a, py::pos_only(),
             "norm"_a, "rows"_a, "tokens"_a, "threads"_a)
        .def("statistics", &ScoreRows<T>::statistics, "out"_a)
        .def("weights", &ScoreRows<T>::weights, "factor"_a, "out"_a)
        .def("forward", &ScoreRows<T>::forward, "tau"_a, "factor"_a, "out"_a)
        .def("backward_activation", &ScoreRows<T>::backward_activation, "factor"_a, "grad"_a, "out"_a, "inner"_a)
        .def("backward_norm", &ScoreRows<T>::backward_norm, "factor"_a, "share"_a, "grad"_a)
        .def("backward", &ScoreRows<T>::backward, "tau"_a, "factor"_a, "grad"_a, "out"_a);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Kernels for a CPU; native.py and row_*.py in megatron_tf/kernels are its users.";
    define<float>(module, "fp32", "Fp32Rows", "Fp32Block");
    define<megatron_tf::BFloat16>(module, "bf16", "Bf16Rows", "Bf16Block");
}
