#include "blend.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron_tf {

namespace {

// Shares are used bit for bit: a different rounding would break ties between datasets differently.
std::vector<double> normalized(const double *weights, std::size_t num_datasets, bool are_shares) {
    if (num_datasets == 0 || num_datasets > std::numeric_limits<std::uint16_t>::max())
        throw std::invalid_argument("blend of " + std::to_string(num_datasets) + " datasets");
    double total = 0;
    for (std::size_t d = 0; d < num_datasets; ++d) {
        if (!(weights[d] > 0) || !std::isfinite(weights[d]))
            throw std::invalid_argument("weight " + std::to_string(d) + " of the blend must be positive and finite");
        total += weights[d];
    }
    std::vector<double> shares(weights, weights + num_datasets);
    if (!are_shares)
        for (auto &share : shares) share /= total;
    return shares;
}

}  // namespace

void greedy_blend(const double *weights, std::size_t num_datasets, bool are_shares, std::int64_t size,
                  std::uint16_t *dataset, std::int64_t *taken) {
    if (size < 0) throw std::invalid_argument("blend of " + std::to_string(size) + " samples");
    const std::vector<double> shares = normalized(weights, num_datasets, are_shares);
    std::vector<double> counts(num_datasets);
    for (std::int64_t i = 0; i < size; ++i) {
        // counts are doubles for the subtraction below: whole numbers below 2^53 are exact
        if (i % kBlendBlock == 0)
            taken = std::transform(counts.begin(), counts.end(), taken, [](double n) { return std::int64_t(n); });
        // as in Megatron-LM: without the 1, every dataset would be equally far behind at step 0
        const auto step = static_cast<double>(std::max<std::int64_t>(i, 1));
        std::size_t chosen = 0;
        double most = -std::numeric_limits<double>::infinity();
        for (std::size_t d = 0; d < num_datasets; ++d) {
            const double behind = shares[d] * step - counts[d];
            // not >=: ties go to the first; compiled without fused operations (-ffp-contract), which round differently
            if (behind > most) {
                most = behind;
                chosen = d;
            }
        }
        dataset[i] = static_cast<std::uint16_t>(chosen);
        ++counts[chosen];
    }
}

}  // namespace megatron_tf
