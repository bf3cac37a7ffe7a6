// Products of a few rows with a large matrix, at the speed of reading the matrix, for decoding.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "lanes.hpp"

namespace megatron_tf {

namespace row_product {

// x [columns] as floats, in each block as `load` orders the columns of a T. `out` has whole blocks, of zeros.
template <typename T, typename X>
void arrange(const X *x, std::size_t columns, float *out) {
    for (std::size_t i = 0; i < columns; ++i) {
        const std::size_t in_block = i % kBlock;
        const std::size_t place = std::is_same_v<T, float> ? in_block : in_block / 2 + in_block % 2 * kLanes;
        out[i - in_block + place] = to_float(x[i]);
    }
}

// The remainder of a row, padded with zeros, so that appended zeros, such as those of tokens added by growth, do not
// change a single bit.
template <typename T>
MEGATRON_TF_INLINE Block load_rest(const T *p, std::size_t count) {
    T rest[kBlock] = {};
    std::copy_n(p, count, rest);
    return load(rest);
}

MEGATRON_TF_INLINE void add_product(Block &sum, Block a, Block b) {
    sum.first += a.first * b.first;
    sum.second += a.second * b.second;
}

MEGATRON_TF_INLINE float sum_of(Block x) { return sum_of_lanes(x.first + x.second); }

// A matrix is read in several streams, far apart: memory answers more of them at once, and they share x. Within a stream,
// rows are fetched ahead, because so much work between two of them leaves the processor too few in sight.
constexpr std::size_t kStreams = 4;
constexpr std::size_t kBytesAhead = 1024;
constexpr std::size_t kCacheLine = 64;

template <typename T>
MEGATRON_TF_INLINE void fetch_ahead(const T *p) {
    const char *ahead = reinterpret_cast<const char *>(p) + kBytesAhead;
    for (std::size_t line = 0; line < kBlock * sizeof(T); line += kCacheLine) __builtin_prefetch(ahead + line);
}

// The products of an arranged row with `count` rows of a matrix, `stride` elements apart.
template <std::size_t count, typename T>
MEGATRON_TF_INLINE void dots(const float *x, const T *weight, std::size_t stride, std::size_t columns, float *out) {
    Block sums[count] = {};
    std::size_t i = 0;
    for (; i + kBlock <= columns; i += kBlock) {
        const Block of_x = load(x + i);
        for (std::size_t stream = 0; stream < count; ++stream) {
            const T *row = weight + stream * stride + i;
            fetch_ahead(row);
            add_product(sums[stream], of_x, load(row));
        }
    }
    for (std::size_t stream = 0; stream < count; ++stream) {
        const T *rest = weight + stream * stride + i;
        if (i < columns) add_product(sums[stream], load(x + i), load_rest(rest, columns - i));
        out[stream] = sum_of(sums[stream]);
    }
}

template <typename T, typename Out>
struct Product {
    const float *x;  // [rows, whole blocks of columns], arranged
    const T *weight;  // [outputs, columns]
    Out *out;  // [rows, outputs]
    std::size_t rows, outputs, columns;

    // Outputs [begin, end) of every row; each weight is read from memory once.
    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        const std::size_t stream = (end - begin) / kStreams;
        for (std::size_t i = begin; i < begin + stream; ++i) run_streams<kStreams>(i, stream);
        for (std::size_t i = begin + kStreams * stream; i < end; ++i) run_streams<1>(i, 0);
    }

    // Outputs i, i + stream and so on.
    template <std::size_t count>
    MEGATRON_TF_INLINE void run_streams(std::size_t i, std::size_t stream) const {
        for (std::size_t row = 0; row < rows; ++row) {
            float sums[count];
            dots<count>(x + row * whole_blocks(columns), weight + i * columns, stream * columns, columns, sums);
            for (std::size_t k = 0; k < count; ++k) out[row * outputs + i + k * stream] = round_to<Out>(sums[k]);
        }
    }
};

template <typename T, typename Out>
void multiply(const float *arranged, const T *weight, Out *out, std::size_t rows, std::size_t outputs,
              std::size_t columns, std::size_t threads) {
    constexpr std::size_t kBytesOfThread = 1 << 18;  // less does not justify waking a thread
    const Product<T, Out> product{arranged, weight, out, rows, outputs, columns};
    run_parallel(product, outputs, columns * sizeof(T), kBytesOfThread, threads);
}

template <typename T, typename X>
std::vector<float> arrange_rows(const X *x, std::size_t rows, std::size_t columns) {
    const std::size_t padded = whole_blocks(columns);
    std::vector<float> arranged(rows * padded);
    for (std::size_t row = 0; row < rows; ++row) arrange<T>(x + row * columns, columns, arranged.data() + row * padded);
    return arranged;
}

}  // namespace row_product

// out [rows, outputs] = x [rows, columns] weight^T, with weight [outputs, columns], all contiguous. Sums are accumulated
// in fp32, in an order that depends on neither rows nor threads.
template <typename T>
void multiply_rows(const T *x, const T *weight, T *out, std::size_t rows, std::size_t outputs, std::size_t columns,
                   std::size_t threads) {
    const auto arranged = row_product::arrange_rows<T>(x, rows, columns);
    row_product::multiply(arranged.data(), weight, out, rows, outputs, columns, threads);
}

}  // namespace megatron_tf
