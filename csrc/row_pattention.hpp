// A Pattention of a few rows: scores, their normalization and the weighted sum of values, all in cache.
#pragma once

#include <cstddef>
#include <vector>

#include "normalization.hpp"
#include "row_product.hpp"

namespace megatron_tf {

// out [rows, width_out] of x [rows, width_in], keys [tokens, width_in] and transposed values [width_out, tokens].
template <typename Norm, typename T>
void pattend_rows(const T *x, const T *keys, const T *values, T *out, float tau, std::size_t rows,
                  std::size_t tokens, std::size_t width_in, std::size_t width_out, std::size_t threads) {
    std::vector<float> scores(rows * tokens);
    const auto arranged = row_product::arrange_rows<T>(x, rows, width_in);
    row_product::multiply(arranged.data(), keys, scores.data(), rows, tokens, width_in, threads);
    const std::vector<float> taus(rows, tau);
    std::vector<float> factor(rows);
    Normalizer<Norm, float>{{scores.data(), rows, tokens, 1}}.forward(taus.data(), factor.data(), scores.data());
    // in the order that T needs, but not rounded to T: weights stay fp32 between the products
    const auto weights = row_product::arrange_rows<T>(scores.data(), rows, tokens);
    row_product::multiply(weights.data(), values, out, rows, width_out, tokens, threads);
}

}  // namespace megatron_tf
