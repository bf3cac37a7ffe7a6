// Philox4x64-10 (Salmon et al., SC 2011), a counter-based generator with the same output as numpy.random.Philox.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace megatron_tf {

class Philox {
public:
    static constexpr std::size_t kWords = 16;  // generated at a time: the multiplications of four blocks overlap

    // Streams of one key are far apart; in numpy, a stream is counter=[0, stream, 0, 0].
    Philox(std::uint64_t key0, std::uint64_t key1, std::uint64_t stream = 0) : key_{key0, key1}, stream_(stream) {}

    // Skips words, a multiple of 4, before any has been drawn.
    void skip_words(std::uint64_t words) { counter_ = words / 4; }

    std::uint64_t next() {
        if (used_ == kWords) refill();
        return words_[used_++];
    }

    // Uniform in [0, bound], unbiased, by Lemire's multiplication (ACM TOMACS 29, 2019) of 32 random bits, the low half
    // of a word before its high half.
    std::uint32_t at_most(std::uint32_t bound) {
        const std::uint64_t range = std::uint64_t{bound} + 1;
        for (;;) {
            const std::uint64_t product = next_half() * range;
            const auto low = static_cast<std::uint32_t>(product);
            if (low >= range || low >= (std::uint64_t{1} << 32) % range) return product >> 32;
        }
    }

private:
    using Block = std::array<std::uint64_t, 4>;

    std::uint64_t next_half() {
        has_half_ = !has_half_;
        if (!has_half_) return half_;
        const std::uint64_t word = next();
        half_ = word >> 32;
        return word & 0xFFFFFFFF;
    }

    void refill() {
        std::array<Block, kWords / 4> blocks;
        // numpy increments before it draws: its first block has counter 1
        for (auto &block : blocks) block = {++counter_, stream_, 0, 0};
        std::uint64_t k0 = key_[0], k1 = key_[1];
        for (int round = 0; round < 10; ++round) {
            for (auto &block : blocks) {
                const auto p0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ULL) * block[0];
                const auto p1 = static_cast<unsigned __int128>(0xCA5A826395121157ULL) * block[2];
                block = {static_cast<std::uint64_t>(p1 >> 64) ^ block[1] ^ k0, static_cast<std::uint64_t>(p1),
                         static_cast<std::uint64_t>(p0 >> 64) ^ block[3] ^ k1, static_cast<std::uint64_t>(p0)};
            }
            // Weyl sequences of the golden ratio and of sqrt(3) - 1; like the multipliers above, from the paper
            k0 += 0x9E3779B97F4A7C15ULL;
            k1 += 0xBB67AE8584CAA73BULL;
        }
        for (std::size_t i = 0; i < kWords; ++i) words_[i] = blocks[i / 4][i % 4];
        used_ = 0;
    }

    std::array<std::uint64_t, 2> key_;
    std::uint64_t stream_;
    std::uint64_t counter_ = 0;
    std::array<std::uint64_t, kWords> words_{};
    std::size_t used_ = kWords;
    std::uint64_t half_ = 0;
    bool has_half_ = false;
};

}  // namespace megatron_tf
