// The dataset that each step of a greedy blend draws from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megatron_tf {

constexpr std::int64_t kBlendBlock = 4096;  // steps

// Steps [0, size) of a blend: each draws from the dataset with the largest weight * max(step, 1) - taken, ties to the
// lowest index; weights are normalized unless they are shares already. `dataset` [size] is the dataset of each step;
// `taken` [blocks, num_datasets] is the number of samples drawn from each dataset before every block of kBlendBlock
// steps, so that a step's sample is that number plus a count within its block. Throws std::invalid_argument for weights
// that are not positive and finite, and for more than 65,535 datasets.
void greedy_blend(const double *weights, std::size_t num_datasets, bool are_shares, std::int64_t size,
                  std::uint16_t *dataset, std::int64_t *taken);

}  // namespace megatron_tf
