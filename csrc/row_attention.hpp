// Rotary embedding and attention over cached keys and values for a few new tokens, for decoding. A row is one token's
// vector of one head; everything is computed in fp32 and rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "normalization.hpp"
#include "row_product.hpp"

namespace megatron_tf {

// Rotates the first `rotated` columns of each head, half-split NeoX style, and copies the others.
template <typename T>
struct RowRotation {
    const T *in;  // [query and key, tokens, heads, dim]
    const T *cos, *sin;  // [tokens / tokens_of_position, rotated], whose halves are equal
    T *out;  // as in
    std::size_t tokens, heads, dim, rotated, tokens_of_position;

    // Rows [begin, end) of 2 * tokens * heads.
    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        for (std::size_t row = begin; row < end; ++row) {
            const std::size_t table = row / heads % tokens / tokens_of_position * rotated;
            rotate(in + row * dim, cos + table, sin + table, out + row * dim);
        }
    }

   private:
    MEGATRON_TF_INLINE void rotate(const T *x, const T *c, const T *s, T *y) const {
        const std::size_t half = rotated / 2;
        for (std::size_t i = 0; i < half; ++i) {
            const float a = to_float(x[i]), b = to_float(x[half + i]), c_i = to_float(c[i]), s_i = to_float(s[i]);
            y[i] = round_to<T>(a * c_i - b * s_i);
            y[half + i] = round_to<T>(b * c_i + a * s_i);
        }
        std::copy(x + rotated, x + dim, y + rotated);
    }
};

// The sum of the rows of a matrix [count, columns], each times its weight, read in streams as in `row_product`.
template <typename T>
MEGATRON_TF_INLINE void sum_rows(const float *weights, const T *matrix, std::size_t count, std::size_t columns,
                                 T *out) {
    using row_product::kStreams;
    for (std::size_t column = 0; column < columns; column += kBlock) {
        const std::size_t width = std::min(kBlock, columns - column);
        const auto add = [&](Block &sum, std::size_t row) MEGATRON_TF_INLINED {
            const T *p = matrix + row * columns + column;
            row_product::fetch_ahead(p);
            const Block x = width == kBlock ? load(p) : row_product::load_rest(p, width);
            sum.first += x.first * weights[row];
            sum.second += x.second * weights[row];
        };
        Block sums[kStreams] = {};
        const std::size_t stream = count / kStreams;
        for (std::size_t row = 0; row < stream; ++row)
            for (std::size_t k = 0; k < kStreams; ++k) add(sums[k], row + k * stream);
        for (std::size_t row = kStreams * stream; row < count; ++row) add(sums[0], row);
        for (std::size_t k = 1; k < kStreams; ++k) {
            sums[0].first += sums[k].first;
            sums[0].second += sums[k].second;
        }
        T whole[kBlock];
        store(sums[0], whole);
        std::copy_n(whole, width, out + column);
    }
}

// Stores k and v of new tokens in the cache, and lets each token attend over all tokens of its sample up to itself.
template <typename T>
struct RowAttention {
    const T *q, *k, *v;  // [tokens, samples, heads, dim]
    T *keys, *values;  // [samples, heads, capacity, dim]
    T *out;  // [tokens, samples, heads, dim]
    const std::vector<std::size_t> &past;  // of each sample, the tokens before the new ones
    std::size_t tokens, heads, dim, capacity;

    // Heads [begin, end) of all samples.
    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        std::vector<float> query(whole_blocks(dim)), scores(whole_blocks(capacity));
        for (std::size_t head = begin; head < end; ++head) {
            T *const head_keys = keys + head * capacity * dim, *const head_values = values + head * capacity * dim;
            for (std::size_t token = 0; token < tokens; ++token) {
                const std::size_t row = (token * past.size() * heads + head) * dim;
                const std::size_t position = past[head / heads] + token;
                std::copy_n(k + row, dim, head_keys + position * dim);
                std::copy_n(v + row, dim, head_values + position * dim);
                row_product::arrange<T>(q + row, dim, query.data());
                weigh(query.data(), head_keys, position + 1, scores.data());
                sum_rows(scores.data(), head_values, position + 1, dim, out + row);
            }
        }
    }

   private:
    // The softmax of the scaled products of an arranged query and `count` keys.
    MEGATRON_TF_INLINE void weigh(const float *query, const T *head_keys, std::size_t count, float *scores) const {
        using normalization::Softmax;
        row_product::Product<T, float>{query, head_keys, scores, 1, count, dim}.run(0, count);
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        for (std::size_t i = 0; i < count; ++i) scores[i] *= scale;
        const std::size_t padded = whole_blocks(count);
        std::fill(scores + count, scores + padded, Softmax::kPadding);
        normalization::weigh<Softmax>(scores, padded, -Softmax::statistic(scores, padded));
    }
};

template <typename T>
void attend_rows(const RowAttention<T> &attention, std::size_t threads) {
    constexpr std::size_t kElementsOfThread = 1 << 16;  // fewer do not justify waking a thread
    const auto &past = attention.past;
    const std::size_t longest = *std::max_element(past.begin(), past.end()) + attention.tokens;
    const std::size_t of_one_head = longest * attention.dim * attention.tokens;
    run_parallel(attention, past.size() * attention.heads, of_one_head, kElementsOfThread, threads);
}

}  // namespace megatron_tf
