// Philox4x64-10 (Salmon et al., SC 2011): a counter-based generator, the stream of numpy.random.Philox(key=...).
#pragma once

#include <array>
#include <cstdint>

namespace megatron_tf {

class Philox {
public:
    Philox(std::uint64_t key0, std::uint64_t key1) : key_{key0, key1} {}

    std::uint64_t next() {
        if (used_ == 4) {
            advance_counter();
            output_ = block();
            used_ = 0;
        }
        return output_[used_++];
    }

    // Uniform in [0, bound], without bias: draws under the smallest mask that covers bound until one fits.
    std::uint64_t at_most(std::uint64_t bound) {
        std::uint64_t mask = bound;
        for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
        for (;;) {
            const std::uint64_t draw = next() & mask;
            if (draw <= bound) return draw;
        }
    }

private:
    using Block = std::array<std::uint64_t, 4>;

    void advance_counter() {
        for (auto &word : counter_)
            if (++word != 0) break;
    }

    Block block() const {
        Block c = counter_;
        std::uint64_t k0 = key_[0], k1 = key_[1];
        for (int round = 0; round < 10; ++round) {
            const auto p0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ULL) * c[0];
            const auto p1 = static_cast<unsigned __int128>(0xCA5A826395121157ULL) * c[2];
            c = {static_cast<std::uint64_t>(p1 >> 64) ^ c[1] ^ k0, static_cast<std::uint64_t>(p1),
                 static_cast<std::uint64_t>(p0 >> 64) ^ c[3] ^ k1, static_cast<std::uint64_t>(p0)};
            k0 += 0x9E3779B97F4A7C15ULL;
            k1 += 0xBB67AE8584CAA73BULL;
        }
        return c;
    }

    std::array<std::uint64_t, 2> key_;
    Block counter_{};
    Block output_{};
    int used_ = 4;
};

}  // namespace megatron_tf
