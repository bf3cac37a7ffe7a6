// A Pattention of a few rows: scores, their normalization and the weighted sum of values, all in cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "row_product.hpp"

namespace megatron_tf {

enum class Norm { l2_norm_gelu, gelu_l2_norm, softmax };

namespace row_product {

constexpr float kEpsilon = 1e-12f;  // as in megatron_tf/tokenformer/normalization.py

// Eigen's rational approximation (Numext/MathFunctionsImpl), within 2e-7 of the function.
MEGATRON_TF_INLINE float erf(float x) {
    x = x < -4.0f ? -4.0f : x > 4.0f ? 4.0f : x;
    const float y = x * x;
    float p = -2.72614225801306e-10f;
    p = p * y + 2.77068142495902e-08f;
    p = p * y + -2.10102402082508e-06f;
    p = p * y + -5.69250639462346e-05f;
    p = p * y + -7.34990630326855e-04f;
    p = p * y + -2.95459980854025e-03f;
    p = p * y + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * y + -2.13374055278905e-04f;
    q = q * y + -1.68282697438203e-03f;
    q = q * y + -7.37332916720468e-03f;
    q = q * y + -1.42647390514189e-02f;
    return x * p / q;
}

MEGATRON_TF_INLINE float gelu(float x) { return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f)); }

// Sixteen partial sums, which the compiler keeps in vector registers.
MEGATRON_TF_INLINE float sum_of_squares(const float *x, std::size_t count) {
    float sums[16] = {};
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (std::size_t lane = 0; lane < 16; ++lane) sums[lane] += x[i + lane] * x[i + lane];
    float sum = 0;
    for (const float lane : sums) sum += lane;
    for (; i < count; ++i) sum += x[i] * x[i];
    return sum;
}

// Turns scores [rows, tokens] into weights in place.
struct Normalize {
    float *scores;
    std::size_t tokens;
    float tau;
    Norm norm;

    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        // Padded with zeros to whole vectors: the compiler's remainder loop rounds differently, so that tokens appended
        // by growth would change the bits of those before them.
        std::vector<float> completed(tokens % kBlock ? tokens + kBlock - tokens % kBlock : 0);
        for (std::size_t row = begin; row < end; ++row) {
            float *a = scores + row * tokens;
            if (norm == Norm::softmax) {
                softmax(a);
            } else if (completed.empty()) {
                l2(a, tokens);
            } else {
                std::copy_n(a, tokens, completed.begin());
                l2(completed.data(), completed.size());
                std::copy_n(completed.begin(), tokens, a);
            }
        }
    }

    MEGATRON_TF_INLINE void l2(float *a, std::size_t count) const {
        if (norm == Norm::gelu_l2_norm)
            for (std::size_t i = 0; i < count; ++i) a[i] = gelu(a[i]);
        const float factor = tau / std::sqrt(sum_of_squares(a, count) + kEpsilon);
        if (norm == Norm::gelu_l2_norm)
            for (std::size_t i = 0; i < count; ++i) a[i] *= factor;
        else
            for (std::size_t i = 0; i < count; ++i) a[i] = gelu(a[i] * factor);
    }

    void softmax(float *a) const {
        const float highest = *std::max_element(a, a + tokens);
        double sum = 0;
        for (std::size_t i = 0; i < tokens; ++i) sum += a[i] = std::exp(a[i] - highest);
        const auto factor = static_cast<float>(tau / sum);
        for (std::size_t i = 0; i < tokens; ++i) a[i] *= factor;
    }
};

}  // namespace row_product

// out [rows, width_out] of x [rows, width_in], keys [tokens, width_in] and transposed values [width_out, tokens].
template <typename T>
void pattend_rows(const T *x, const T *keys, const T *values, T *out, Norm norm, float tau, std::size_t rows,
                  std::size_t tokens, std::size_t width_in, std::size_t width_out, std::size_t threads) {
    std::vector<float> scores(rows * tokens);
    const auto arranged = row_product::arrange_rows<T>(x, rows, width_in);
    row_product::multiply(arranged.data(), keys, scores.data(), rows, tokens, width_in, threads);
    row_product::run_best(row_product::Normalize{scores.data(), tokens, tau, norm}, 0, rows);
    // in the order that T needs, but not rounded to T: weights stay fp32 between the products
    const auto weights = row_product::arrange_rows<T>(scores.data(), rows, tokens);
    row_product::multiply(weights.data(), values, out, rows, width_out, tokens, threads);
}

}  // namespace megatron_tf
