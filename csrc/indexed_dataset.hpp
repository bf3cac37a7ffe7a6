// Validation of the .idx file of an indexed dataset, whose content is untrusted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megatron_tf {

constexpr std::size_t kIndexHeaderBytes = 34;

struct IndexHeader {
    std::uint8_t type_code;
    std::uint64_t sequences;
    std::uint64_t bounds;  // documents + 1
    std::uint64_t bytes;   // size of the .bin
    bool one_sequence_each;  // every document is a single sequence
};

// Checks a whole index in memory. `type_sizes` holds the bytes of an element by type code, 0 for unknown codes.
// Throws std::invalid_argument, which names the error; reads nothing beyond `size`.
IndexHeader check_index(const std::uint8_t *data, std::size_t size, const std::uint8_t *type_sizes,
                        std::size_t num_types);

}  // namespace megatron_tf
