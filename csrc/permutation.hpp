// Uniformly random permutations as a function of two keys, independent of the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.hpp"
#include "philox.hpp"

namespace megatron_tf {

constexpr std::size_t kBucketElements = std::size_t{1} << 15;  // 128 KiB of 32-bit ids: a bucket stays in the L2 cache

// Number of bits that choose an element's bucket: 0 if everything fits into one.
inline int bucket_bits(std::size_t n) {
    int bits = 0;
    while (bits < 16 && (n >> bits) > kBucketElements) ++bits;
    return bits;
}

// Calls act(i, bucket of element i) for i in [begin, end), where begin is a multiple of Philox::kWords * 4.
template <typename Act>
void for_each_bucket_choice(const std::uint64_t (&keys)[2], int bits, std::size_t begin, std::size_t end,
                            const Act &act) {
    Philox generator(keys[0], keys[1]);
    generator.skip_words(begin / 4);
    for (std::size_t i = begin; i < end;) {
        std::uint64_t word = generator.next();
        for (int part = 0; part < 4 && i < end; ++part, ++i, word >>= 16) act(i, (word & 0xFFFF) >> (16 - bits));
    }
}

// Fills `result` with a permutation of [0, n) by the algorithm of Rao and Sandelius: a digit of 16 random bits chooses
// a bucket for each element; then a descending Fisher-Yates shuffle permutes each bucket, with its own random stream.
// Random access stays within a bucket, and buckets are independent.
template <typename Id>
void permutation(Id *result, std::size_t n, std::uint64_t key0, std::uint64_t key1) {
    const int bits = bucket_bits(n);
    if ((n >> bits) >> 31) throw std::length_error("a permutation of more than 2^46 elements");
    const std::uint64_t keys[2] = {key0, key1};
    const std::size_t buckets = std::size_t{1} << bits, parts = n > kBucketElements ? num_threads() : 1;
    std::vector<std::vector<std::size_t>> ends(parts, std::vector<std::size_t>(buckets));
    const auto for_each_part = [&](const auto &act) { in_parts(parts, n, 4 * Philox::kWords, act); };
    // First count, then place: the buckets are drawn a second time instead of being stored.
    for_each_part([&](std::size_t part, std::size_t begin, std::size_t end) {
        auto &counts = ends[part];
        for_each_bucket_choice(keys, bits, begin, end, [&](std::size_t, std::uint64_t bucket) { ++counts[bucket]; });
    });
    // Counts become positions: where a part's first element of a bucket goes, in the order of a single thread.
    std::size_t start = 0;
    for (std::size_t bucket = 0; bucket < buckets; ++bucket)
        for (auto &part : ends) start += std::exchange(part[bucket], start);
    for_each_part([&](std::size_t part, std::size_t begin, std::size_t end) {
        auto &next = ends[part];
        for_each_bucket_choice(keys, bits, begin, end, [&](std::size_t i, std::uint64_t bucket) {
            result[next[bucket]++] = static_cast<Id>(i);
        });
    });
    // Every position has moved to its end by now: those of the last part are the ends of the buckets.
    const auto &last = ends.back();
    in_parts(parts, buckets, 1, [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t bucket = begin; bucket < end; ++bucket) {
            Id *values = result + (bucket == 0 ? 0 : last[bucket - 1]);
            // stream 0 has drawn the buckets
            Philox generator(key0, key1, bucket + 1);
            for (std::size_t i = result + last[bucket] - values; i-- > 1;)
                std::swap(values[i], values[generator.at_most(static_cast<std::uint32_t>(i))]);
        }
    });
}

}  // namespace megatron_tf
