// The order of training samples: which documents, cut where, blended how. All counts are 64-bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_tf {

// A uniformly random permutation of [0, n): Fisher-Yates, descending, drawn from Philox(key0, key1).
std::vector<std::int64_t> permutation(std::int64_t n, std::uint64_t key0, std::uint64_t key1);

// Boundaries of samples of `seq_length` tokens over documents laid end to end in `order`: pairs (position in the order,
// offset in that document) of every seq_length-th token, one more than there are samples; none for no tokens.
std::vector<std::int64_t> sample_index(const std::int64_t *order, std::size_t num_documents,
                                       const std::int64_t *lengths, std::size_t num_lengths,
                                       std::int64_t seq_length);

struct Blend {
    std::vector<std::int32_t> dataset;
    std::vector<std::int64_t> sample;
};

// Steps [0, size) of a blend: each takes the data set furthest behind its weight, ties to the lowest.
Blend blend(const double *weights, std::size_t num_datasets, std::int64_t size);

}  // namespace megatron_tf
