// The three normalizations of a Pattention's scores, forward and backward: the functions of
// megatron_tf/tokenformer/normalization.py, of one row of floats in whole blocks.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "lanes.hpp"

namespace megatron_tf {

namespace normalization {

constexpr float kEpsilon = 1e-12f;  // as in megatron_tf/tokenformer/normalization.py

// e^x: a power of two times a polynomial, whose coefficients are those of Cephes' expf; within 2e-7 of the function.
MEGATRON_TF_INLINE Lanes exp(Lanes x) {
    constexpr float kLowest = -87.0f, kHighest = 88.0f;  // beyond these, the power of two is no float
    constexpr float kRound = 12582912.0f;                // 1.5 * 2^23: adding it rounds to an integer
    const Lanes within = x < kLowest ? Lanes{} + kLowest : x > kHighest ? Lanes{} + kHighest : x;
    const Lanes shifted = within * 1.44269504088896341f + kRound;
    const Lanes n = shifted - kRound;
    const Lanes r = within - n * 0.693359375f - n * -2.12194440e-4f;
    Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const auto power = reinterpret_cast<Lanes>((reinterpret_cast<Words>(shifted) + 127u) << 23);
    // a product, not a sum of exponents, so that a NaN stays one
    return x < kLowest ? Lanes{} : p * power;
}

struct Gelu {
    Lanes value, slope;
};

// The lower tail of the normal distribution is its density times a function that a polynomial in 1 / (1 + 0.3 z)
// approximates within 1.2e-7 of its value (a least-squares fit to erfcx): small values are as accurate as large ones.
MEGATRON_TF_INLINE Gelu gelu_and_slope(Lanes x) {
    const Lanes z = x < 0.0f ? -x : x;
    const Lanes density = exp(x * x * -0.5f);
    const Lanes t = 1.0f / (1.0f + 0.3f * z);
    Lanes p = 3.608888055e-02f * t + -1.589338893e-01f;
    p = p * t + 2.093466405e-01f;
    p = p * t + -5.645030635e-02f;
    p = p * t + 1.300327204e-01f;
    p = p * t + 9.946503526e-02f;
    p = p * t + 1.208263189e-01f;
    p = p * t + 1.196245407e-01f;
    const Lanes tail = p * t * density;
    const Lanes below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, below + x * density * 0.398942280401432678f};
}

MEGATRON_TF_INLINE Lanes gelu(Lanes x) { return gelu_and_slope(x).value; }

// What backward computes of each score before the sum over its row: the weight, the gradient before the norm, and the
// term of the sum.
struct BeforeNorm {
    Lanes weight, gradient, inner;
};

template <typename Term>
MEGATRON_TF_INLINE float sum_over(const float *a, std::size_t count, const Term &term) {
    Lanes first{}, second{};
    for (std::size_t i = 0; i < count; i += kBlock) {
        const Block x = load(a + i);
        first += term(x.first);
        second += term(x.second);
    }
    return sum_of_lanes(first + second);
}

struct L2Norm {
    static constexpr float kPadding = 0.0f;

    static MEGATRON_TF_INLINE float factor(float statistic, float tau) { return tau / std::sqrt(statistic + kEpsilon); }
    static MEGATRON_TF_INLINE float share(float inner, float tau) { return inner / (tau * tau); }
};

struct L2NormGelu : L2Norm {
    static MEGATRON_TF_INLINE float statistic(const float *a, std::size_t count) {
        return sum_over(a, count, [](Lanes x) MEGATRON_TF_INLINED { return x * x; });
    }
    static MEGATRON_TF_INLINE Lanes weight(Lanes a, float f) { return gelu(a * f); }
    static MEGATRON_TF_INLINE BeforeNorm backward_activation(Lanes a, float f, Lanes dp) {
        const Lanes u = a * f;
        const Gelu g = gelu_and_slope(u);
        const Lanes du = dp * g.slope;
        return {g.value, du, du * u};
    }
    static MEGATRON_TF_INLINE Lanes backward_norm(Lanes a, float f, Lanes du, float share) {
        return du * f - a * (f * f * share);
    }
};

struct GeluL2Norm : L2Norm {
    static MEGATRON_TF_INLINE float statistic(const float *a, std::size_t count) {
        return sum_over(a, count, [](Lanes x) MEGATRON_TF_INLINED {
            const Lanes g = gelu(x);
            return g * g;
        });
    }
    static MEGATRON_TF_INLINE Lanes weight(Lanes a, float f) { return gelu(a) * f; }
    static MEGATRON_TF_INLINE BeforeNorm backward_activation(Lanes a, float f, Lanes dp) {
        const Lanes p = weight(a, f);
        return {p, dp, dp * p};
    }
    static MEGATRON_TF_INLINE Lanes backward_norm(Lanes a, float f, Lanes dp, float share) {
        const Gelu g = gelu_and_slope(a);
        return (dp - g.value * (f * share)) * f * g.slope;
    }
};

struct Softmax {
    static constexpr float kPadding = -std::numeric_limits<float>::infinity();

    static MEGATRON_TF_INLINE float statistic(const float *a, std::size_t count) {
        const float most = highest(a, count);
        const float sum = sum_over(a, count, [most](Lanes x) MEGATRON_TF_INLINED { return exp(x - most); });
        return most + std::log(sum);
    }
    static MEGATRON_TF_INLINE float factor(float statistic, float tau) { return std::log(tau) - statistic; }
    static MEGATRON_TF_INLINE float share(float inner, float tau) { return inner / tau; }
    static MEGATRON_TF_INLINE Lanes weight(Lanes a, float f) { return exp(a + f); }
    static MEGATRON_TF_INLINE BeforeNorm backward_activation(Lanes a, float f, Lanes dp) {
        const Lanes p = weight(a, f);
        return {p, dp, dp * p};
    }
    static MEGATRON_TF_INLINE Lanes backward_norm(Lanes a, float f, Lanes dp, float share) {
        return (dp - share) * weight(a, f);
    }

   private:
    static MEGATRON_TF_INLINE float highest(const float *a, std::size_t count) {
        Lanes lanes = Lanes{} + kPadding;
        for (std::size_t i = 0; i < count; i += kBlock) {
            const Block x = load(a + i);
            lanes = x.first > lanes ? x.first : lanes;
            lanes = x.second > lanes ? x.second : lanes;
        }
        float most = lanes[0];
        for (std::size_t lane = 1; lane < kLanes; ++lane) most = std::max<float>(most, lanes[lane]);
        return most;
    }
};

// Calls `use` with the normalization of that name.
template <typename Use>
void with_norm(const std::string &name, const Use &use) {
    if (name == "l2_norm_gelu") return use(L2NormGelu{});
    if (name == "gelu_l2_norm") return use(GeluL2Norm{});
    if (name == "softmax") return use(Softmax{});
    throw std::invalid_argument("no normalization " + name);
}

// Turns scores into weights in place.
template <typename Norm>
MEGATRON_TF_INLINE void weigh(float *a, std::size_t count, float f) {
    for (std::size_t i = 0; i < count; i += kBlock) {
        const Block x = load(a + i);
        store({Norm::weight(x.first, f), Norm::weight(x.second, f)}, a + i);
    }
}

// Turns dP into the gradient before the norm in place, writes the weights, and returns the row's inner product.
template <typename Norm>
MEGATRON_TF_INLINE float backward_activation(const float *a, float *gradient, float *weights, std::size_t count,
                                             float f) {
    Lanes first{}, second{};
    for (std::size_t i = 0; i < count; i += kBlock) {
        const Block x = load(a + i), dp = load(gradient + i);
        const BeforeNorm left = Norm::backward_activation(x.first, f, dp.first);
        const BeforeNorm right = Norm::backward_activation(x.second, f, dp.second);
        store({left.weight, right.weight}, weights + i);
        store({left.gradient, right.gradient}, gradient + i);
        first += left.inner;
        second += right.inner;
    }
    return sum_of_lanes(first + second);
}

// Turns the gradient before the norm into dA in place.
template <typename Norm>
MEGATRON_TF_INLINE void backward_norm(const float *a, float *gradient, std::size_t count, float f, float share) {
    for (std::size_t i = 0; i < count; i += kBlock) {
        const Block x = load(a + i), g = load(gradient + i);
        store({Norm::backward_norm(x.first, f, g.first, share), Norm::backward_norm(x.second, f, g.second, share)},
              gradient + i);
    }
}

}  // namespace normalization

// Rows of scores [rows, tokens], contiguous, with one number for each row in fp32. Every function reads a row into the
// cache, computes in fp32 there, and writes it once; rows are divided among the threads.
template <typename T>
struct ScoreRows {
    const T *scores;
    std::size_t rows, tokens, threads;
};

namespace normalization {

template <typename Row>
struct EachRow {
    const Row &row;
    std::size_t padded;

    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        std::vector<float> cache(3 * padded);
        float *const first = cache.data();
        for (std::size_t i = begin; i < end; ++i) row(i, first, first + padded, first + 2 * padded);
    }
};

// Calls row(i, a, b, c) for each row, with three rows of floats to work in.
template <typename T, typename Row>
void for_rows(const ScoreRows<T> &in, const Row &row) {
    constexpr std::size_t kElementsOfThread = 1 << 14;  // fewer do not justify waking a thread
    run_parallel(EachRow<Row>{row, whole_blocks(in.tokens)}, in.rows, in.tokens, kElementsOfThread, in.threads);
}

}  // namespace normalization

// What megatron_tf/kernels/native.py does with scores. The gradient of the weights becomes that of the scores in place.
template <typename Norm, typename T>
struct Normalizer {
    const ScoreRows<T> in;

    MEGATRON_TF_INLINE void read(const T *rows, std::size_t row, float padding, float *out) const {
        read_row(rows + row * in.tokens, in.tokens, round_to<T>(padding), out);
    }
    MEGATRON_TF_INLINE void write(const float *from, std::size_t row, T *rows) const {
        write_row(from, in.tokens, rows + row * in.tokens);
    }
    std::size_t padded() const { return whole_blocks(in.tokens); }

    void statistics(float *statistic) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *, float *) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            statistic[row] = Norm::statistic(a, padded());
        });
    }

    void weights(const float *factor, T *out) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *, float *) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            normalization::weigh<Norm>(a, padded(), factor[row]);
            write(a, row, out);
        });
    }

    void forward(const float *tau, float *factor, T *out) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *, float *) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            factor[row] = Norm::factor(Norm::statistic(a, padded()), tau[row]);
            normalization::weigh<Norm>(a, padded(), factor[row]);
            write(a, row, out);
        });
    }

    void backward_activation(const float *factor, T *grad, T *out, float *inner) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *g, float *p) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            read(grad, row, 0.0f, g);
            inner[row] = normalization::backward_activation<Norm>(a, g, p, padded(), factor[row]);
            write(p, row, out);
            write(g, row, grad);
        });
    }

    void backward_norm(const float *factor, const float *share, T *grad) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *g, float *) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            read(grad, row, 0.0f, g);
            normalization::backward_norm<Norm>(a, g, padded(), factor[row], share[row]);
            write(g, row, grad);
        });
    }

    void backward(const float *tau, const float *factor, T *grad, T *out) const {
        normalization::for_rows(in, [&](std::size_t row, float *a, float *g, float *p) MEGATRON_TF_INLINED {
            read(in.scores, row, Norm::kPadding, a);
            read(grad, row, 0.0f, g);
            const float f = factor[row];
            const float inner = normalization::backward_activation<Norm>(a, g, p, padded(), f);
            normalization::backward_norm<Norm>(a, g, padded(), f, Norm::share(inner, tau[row]));
            write(p, row, out);
            write(g, row, grad);
        });
    }
};

}  // namespace megatron_tf
