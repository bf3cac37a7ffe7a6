#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "normalization.hpp"
#include "row_pattention.hpp"
#include "row_product.hpp"

namespace py = pybind11;
using namespace pybind11::literals;
using megatron_tf::normalization::with_norm;

namespace {

// Raw pointers, because numpy has no bfloat16, and a view of every weight for every token would cost more than small
// products do; megatron_tf.kernels.row_product and native, the only callers, have checked shapes and types.
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
void define(py::module_ &module, const std::string &type, const char *rows) {
    module.def(("multiply_rows_" + type).c_str(), &multiply_rows<T>, "x"_a, "weight"_a, "out"_a, py::pos_only(),
               "rows"_a, "outputs"_a, "columns"_a, "threads"_a);
    module.def(("pattend_rows_" + type).c_str(), &pattend_rows<T>, "x"_a, "out"_a, py::pos_only(), "keys"_a,
               "values"_a, "taus"_a, "norm"_a, "rows"_a, "tokens"_a, "width_in"_a, "width_out"_a, "threads"_a);
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
    module.doc() = "Pattentions on a CPU; megatron_tf.kernels.native and row_product are its users.";
    define<float>(module, "fp32", "Fp32Rows");
    define<megatron_tf::BFloat16>(module, "bf16", "Bf16Rows");
}
