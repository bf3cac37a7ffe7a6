// Sixteen floats at a time in the compiler's vector types, compiled for several instruction sets.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
        if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};  // NaN
        // to the nearest, ties to even
        return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
    }
}

// Always inlined, so that a function is compiled for the instruction set of its caller; the second one is for lambdas.
#define MEGATRON_TF_INLINED __attribute__((always_inline))
#define MEGATRON_TF_INLINE inline MEGATRON_TF_INLINED

using Lanes = float __attribute__((vector_size(64)));
using Words = std::uint32_t __attribute__((vector_size(64)));
constexpr std::size_t kLanes = 16;
constexpr std::size_t kBlock = 2 * kLanes;  // columns at a time
static_assert(std::endian::native == std::endian::little);

struct Block {
    Lanes first, second;
};

// Copied, because a row starts anywhere: the compilers make one unaligned instruction of it.
template <typename Vector>
MEGATRON_TF_INLINE Vector read(const void *p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

MEGATRON_TF_INLINE Block load(const float *p) { return {read<Lanes>(p), read<Lanes>(p + kLanes)}; }

// Even columns, then odd ones: each is the upper half of a float and needs only a shift or a mask.
MEGATRON_TF_INLINE Block load(const BFloat16 *p) {
    const auto words = read<Words>(p);
    const Words even = words << 16, odd = words & 0xffff0000u;
    return {reinterpret_cast<Lanes>(even), reinterpret_cast<Lanes>(odd)};
}

MEGATRON_TF_INLINE void store(Block x, float *p) {
    std::memcpy(p, &x.first, sizeof x.first);
    std::memcpy(p + kLanes, &x.second, sizeof x.second);
}

// As `round_to<BFloat16>`, which stays in the upper half of each word.
MEGATRON_TF_INLINE Words rounded(Lanes x) {
    const auto bits = reinterpret_cast<Words>(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

MEGATRON_TF_INLINE void store(Block x, BFloat16 *p) {
    const Words words = (rounded(x.first) >> 16) | (rounded(x.second) & 0xffff0000u);
    std::memcpy(p, &words, sizeof words);
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

constexpr std::size_t whole_blocks(std::size_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

// A row as floats, in each block as `load` orders its columns, padded to whole blocks: appended columns, such as those
// of tokens added by growth, then change neither the place nor the order of those before them.
template <typename T>
MEGATRON_TF_INLINE void read_row(const T *row, std::size_t columns, T padding, float *out) {
    std::size_t i = 0;
    for (; i + kBlock <= columns; i += kBlock) store(load(row + i), out + i);
    if (i == columns) return;
    T rest[kBlock];
    std::fill_n(rest, kBlock, padding);
    std::copy(row + i, row + columns, rest);
    store(load(rest), out + i);
}

// The reverse, rounded to T.
template <typename T>
MEGATRON_TF_INLINE void write_row(const float *row, std::size_t columns, T *out) {
    std::size_t i = 0;
    for (; i + kBlock <= columns; i += kBlock) store(load(row + i), out + i);
    if (i == columns) return;
    T rest[kBlock];
    store(load(row + i), rest);
    std::copy_n(rest, columns - i, out + i);
}

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

// Calls work.run for parts of [0, count), in as many threads as there are parts of at least `least` units of work.
template <typename Work>
void run_parallel(const Work &work, std::size_t count, std::size_t work_of_one, std::size_t least,
                  std::size_t threads) {
    threads = std::clamp<std::size_t>(count * work_of_one / least, 1, std::max<std::size_t>(threads, 1));
    const std::size_t part = (count + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < threads; ++i)
        run_best(work, std::min(count, i * part), std::min(count, (i + 1) * part));
}

}  // namespace megatron_tf
