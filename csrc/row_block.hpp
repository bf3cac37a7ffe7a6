// A block of a TokenFormer for a few new tokens, for decoding: what megatron_tf/model/block.py does, in one call.
// Between two steps, values are rounded to T, as they are there.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "row_attention.hpp"
#include "row_pattention.hpp"

namespace megatron_tf {

// Layer norm without weights.
template <typename T>
struct RowNorm {
    const T *in;  // [rows, width]
    T *out;  // as in
    std::size_t width;
    float epsilon;

    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        std::vector<float> row(whole_blocks(width));  // the rest stays zero
        for (std::size_t i = begin; i < end; ++i) {
            for (std::size_t j = 0; j < width; ++j) row[j] = to_float(in[i * width + j]);
            const float mean = mean_of(row, [](Lanes x) MEGATRON_TF_INLINED { return x; });
            for (std::size_t j = 0; j < width; ++j) row[j] -= mean;
            const float variance = mean_of(row, [](Lanes x) MEGATRON_TF_INLINED { return x * x; });
            const float scale = 1.0f / std::sqrt(variance + epsilon);
            for (std::size_t j = 0; j < width; ++j) out[i * width + j] = round_to<T>(row[j] * scale);
        }
    }

   private:
    template <typename Term>
    MEGATRON_TF_INLINE float mean_of(const std::vector<float> &row, const Term &term) const {
        return normalization::sum_over(row.data(), row.size(), term) / static_cast<float>(width);
    }
};

template <typename T>
struct Projection {
    const T *keys;    // [tokens, width]
    const T *values;  // [width, tokens]
    float tau;
    std::size_t tokens;
};

// Rotary tables [positions, rotated], whose halves are equal: one position for each sample, or for all of them.
template <typename T>
struct Tables {
    const T *cos, *sin;
    std::size_t rotated, tokens_of_position;
};

// Keys and values [samples, heads, capacity, dim], which hold `past` tokens of each sample.
template <typename T>
struct Cache {
    T *keys, *values;
    const std::vector<std::size_t> &past;
    std::size_t capacity;
};

template <typename T>
struct RowBlock {
    std::vector<Projection<T>> projections;  // query, key, value, output of attention, ffn
    std::size_t heads, dim;
    float epsilon;
    std::size_t threads;

    // x and out [tokens, samples, heads * dim].
    template <typename Norm>
    void run(const T *x, T *out, std::size_t tokens, const Tables<T> &tables, const Cache<T> &cache) const {
        const std::size_t samples = cache.past.size(), rows = tokens * samples, size = rows * heads * dim;
        std::vector<T> normalized(size), projected(3 * size), rotated(2 * size);
        normalize(x, normalized.data(), rows);
        for (std::size_t i = 0; i < 3; ++i) pattend<Norm>(i, normalized.data(), projected.data() + i * size, rows);
        rotate(projected.data(), rotated.data(), rows, tables);
        attend(rotated.data(), projected.data() + 2 * size, projected.data(), tokens, cache);
        pattend<Norm>(3, projected.data(), normalized.data(), rows);
        add(x, normalized.data(), out, size);
        normalize(out, normalized.data(), rows);
        pattend<Norm>(4, normalized.data(), projected.data(), rows);
        add(out, projected.data(), out, size);
    }

   private:
    std::size_t width() const { return heads * dim; }

    void normalize(const T *x, T *out, std::size_t rows) const {
        run_best(RowNorm<T>{x, out, width(), epsilon}, 0, rows);
    }

    template <typename Norm>
    void pattend(std::size_t i, const T *x, T *out, std::size_t rows) const {
        const Projection<T> &p = projections[i];
        pattend_rows<Norm>(x, p.keys, p.values, out, p.tau, rows, p.tokens, width(), width(), threads);
    }

    void rotate(const T *query_and_key, T *out, std::size_t rows, const Tables<T> &tables) const {
        const auto [cos, sin, rotated, tokens_of_position] = tables;
        run_best(RowRotation<T>{query_and_key, cos, sin, out, rows, heads, dim, rotated, tokens_of_position}, 0,
                 2 * rows * heads);
    }

    void attend(const T *query_and_key, const T *value, T *out, std::size_t tokens, const Cache<T> &cache) const {
        const T *const key = query_and_key + tokens * cache.past.size() * width();
        attend_rows(RowAttention<T>{query_and_key, key, value, cache.keys, cache.values, out, cache.past, tokens,
                                    heads, dim, cache.capacity},
                    threads);
    }

    static void add(const T *a, const T *b, T *out, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i) out[i] = round_to<T>(to_float(a[i]) + to_float(b[i]));
    }
};

}  // namespace megatron_tf
