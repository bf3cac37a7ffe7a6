// Products of a few rows with a large matrix, at the speed of reading the matrix, for decoding.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace megatron_tf {

struct BFloat16 {
    std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

template <typename T>
T round_to(float x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
        const auto bits = std::bit_cast<std::uint32_t>(x);
        if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};                                // NaN
        return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to the nearest, ties to even
    }
}

namespace row_product {

#define MEGATRON_TF_INLINE inline __attribute__((always_inline))

using Lanes = float __attribute__((vector_size(64), aligned(4), may_alias));
using Words = std::uint32_t __attribute__((vector_size(64), aligned(2), may_alias));
constexpr std::size_t kBlock = 32;  // columns at a time: two vectors of floats
static_assert(std::endian::native == std::endian::little);

struct Block {
    Lanes first, second;
};

MEGATRON_TF_INLINE Block load(const float *p) {
    return {*reinterpret_cast<const Lanes *>(p), *reinterpret_cast<const Lanes *>(p + kBlock / 2)};
}

// Even columns, then odd ones: each is the upper half of a float and needs only a shift or a mask.
MEGATRON_TF_INLINE Block load(const BFloat16 *p) {
    const Words words = *reinterpret_cast<const Words *>(p);
    const Words even = words << 16, odd = words & 0xffff0000u;
    return {reinterpret_cast<Lanes>(even), reinterpret_cast<Lanes>(odd)};
}

// x [columns] as floats, in each whole block as `load` orders the columns of a T.
template <typename T, typename X>
void arrange(const X *x, std::size_t columns, float *out) {
    const std::size_t whole = columns / kBlock * kBlock;
    for (std::size_t i = 0; i < columns; ++i) {
        const std::size_t in_block = i % kBlock;
        const bool in_order = std::is_same_v<T, float> || i >= whole;
        out[in_order ? i : i - in_block + in_block / 2 + in_block % 2 * (kBlock / 2)] = to_float(x[i]);
    }
}

// Pairwise: a chain of sixteen additions would take as long as a row of bfloat16.
MEGATRON_TF_INLINE float sum_of_lanes(Lanes x) {
    using Half = float __attribute__((vector_size(32)));
    using Quarter = float __attribute__((vector_size(16)));
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    halves[0] += halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, halves, sizeof quarters);
    const Quarter sum = quarters[0] + quarters[1];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <typename T>
MEGATRON_TF_INLINE float dot(const float *x, const T *weight, std::size_t columns) {
    Lanes first{}, second{};
    std::size_t i = 0;
    for (; i + kBlock <= columns; i += kBlock) {
        const Block a = load(x + i), b = load(weight + i);
        first += a.first * b.first;
        second += a.second * b.second;
    }
    // The remainder is a block padded with zeros, so that appended zeros, such as those of tokens added by growth, do
    // not change a single bit.
    if (i < columns) {
        float a[kBlock] = {}, b[kBlock] = {};
        for (std::size_t j = 0; i + j < columns; ++j) a[j] = x[i + j], b[j] = to_float(weight[i + j]);
        const Block left = load(a), right = load(b);
        first += left.first * right.first;
        second += left.second * right.second;
    }
    first += second;
    return sum_of_lanes(first);
}

template <typename T, typename Out>
struct Product {
    const float *x;  // [rows, columns], arranged
    const T *weight;  // [outputs, columns]
    Out *out;  // [rows, outputs]
    std::size_t rows, outputs, columns;

    // Outputs [begin, end) of every row; each weight is read from memory once.
    MEGATRON_TF_INLINE void run(std::size_t begin, std::size_t end) const {
        for (std::size_t i = begin; i < end; ++i)
            for (std::size_t row = 0; row < rows; ++row)
                out[row * outputs + i] = round_to<Out>(dot(x + row * columns, weight + i * columns, columns));
    }
};

// Compiled for several instruction sets; the best one for this processor is chosen.
template <typename Work>
void run_anywhere(const Work &work, std::size_t begin, std::size_t end) {
    work.run(begin, end);
}

#if defined(__x86_64__)
template <typename Work>
__attribute__((target("avx512f"))) void run_avx512(const Work &work, std::size_t begin, std::size_t end) {
    work.run(begin, end);
}

template <typename Work>
__attribute__((target("avx2,fma"))) void run_avx2(const Work &work, std::size_t begin, std::size_t end) {
    work.run(begin, end);
}

template <typename Work>
auto best_run() {
    if (__builtin_cpu_supports("avx512f")) return run_avx512<Work>;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? run_avx2<Work> : run_anywhere<Work>;
}
#else
template <typename Work>
auto best_run() {
    return run_anywhere<Work>;
}
#endif

template <typename Work>
void run_best(const Work &work, std::size_t begin, std::size_t end) {
    // the processor is queried once
    static const auto run = best_run<Work>();
    run(work, begin, end);
}

template <typename T, typename Out>
void multiply(const float *arranged, const T *weight, Out *out, std::size_t rows, std::size_t outputs,
              std::size_t columns, std::size_t threads) {
    constexpr std::size_t kBytesOfThread = 1 << 18;  // less does not justify waking a thread
    const Product<T, Out> product{arranged, weight, out, rows, outputs, columns};
    threads = std::clamp<std::size_t>(outputs * columns * sizeof(T) / kBytesOfThread, 1, std::max<std::size_t>(threads, 1));
    const std::size_t part = (outputs + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < threads; ++i)
        run_best(product, std::min(outputs, i * part), std::min(outputs, (i + 1) * part));
}

template <typename T, typename X>
std::vector<float> arrange_rows(const X *x, std::size_t rows, std::size_t columns) {
    std::vector<float> arranged(rows * columns);
    for (std::size_t row = 0; row < rows; ++row) arrange<T>(x + row * columns, columns, arranged.data() + row * columns);
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
