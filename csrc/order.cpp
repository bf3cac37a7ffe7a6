#include "order.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "philox.hpp"

namespace megatron_tf {

std::vector<std::int64_t> permutation(std::int64_t n, std::uint64_t key0, std::uint64_t key1) {
    if (n < 0) throw std::invalid_argument("permutation of " + std::to_string(n) + " elements");
    std::vector<std::int64_t> result(static_cast<std::size_t>(n));
    std::iota(result.begin(), result.end(), 0);
    Philox generator(key0, key1);
    for (std::int64_t i = n - 1; i > 0; --i)
        std::swap(result[i], result[generator.at_most(static_cast<std::uint64_t>(i))]);
    return result;
}

static std::int64_t total_tokens(const std::int64_t *order, std::size_t num_documents, const std::int64_t *lengths,
                                 std::size_t num_lengths) {
    std::int64_t total = 0;
    for (std::size_t i = 0; i < num_documents; ++i) {
        const std::int64_t document = order[i];
        if (document < 0 || static_cast<std::size_t>(document) >= num_lengths)
            throw std::out_of_range("document " + std::to_string(document) + " of " + std::to_string(num_lengths));
        const std::int64_t length = lengths[document];
        if (length < 0)
            throw std::invalid_argument("document " + std::to_string(document) + " has a negative length");
        if (length > std::numeric_limits<std::int64_t>::max() - total)
            throw std::overflow_error("more tokens than 64 bits count");
        total += length;
    }
    return total;
}

std::vector<std::int64_t> sample_index(const std::int64_t *order, std::size_t num_documents,
                                       const std::int64_t *lengths, std::size_t num_lengths,
                                       std::int64_t seq_length) {
    if (seq_length <= 0) throw std::invalid_argument("seq_length must be positive");
    const std::int64_t total = total_tokens(order, num_documents, lengths, num_lengths);
    const std::int64_t samples = total > 0 ? (total - 1) / seq_length : 0;
    std::vector<std::int64_t> index;
    index.reserve(2 * (static_cast<std::size_t>(samples) + 1));
    std::size_t position = 0;
    std::int64_t start = 0;  // of the document at `position`, in the stream of all
    for (std::int64_t boundary = 0; boundary <= samples && total > 0; ++boundary) {
        const std::int64_t token = boundary * seq_length;
        while (start + lengths[order[position]] <= token) start += lengths[order[position++]];
        index.push_back(static_cast<std::int64_t>(position));
        index.push_back(token - start);
    }
    return index;
}

Blend blend(const double *weights, std::size_t num_datasets, std::int64_t size) {
    if (size < 0) throw std::invalid_argument("blend of " + std::to_string(size) + " samples");
    if (num_datasets == 0) throw std::invalid_argument("blend of no data sets");
    double total = 0;
    for (std::size_t d = 0; d < num_datasets; ++d) {
        if (!(weights[d] > 0) || !std::isfinite(weights[d]))
            throw std::invalid_argument("weight " + std::to_string(d) + " of the blend must be positive and finite");
        total += weights[d];
    }
    std::vector<std::int64_t> taken(num_datasets, 0);
    Blend result;
    result.dataset.reserve(static_cast<std::size_t>(size));
    result.sample.reserve(static_cast<std::size_t>(size));
    for (std::int64_t i = 0; i < size; ++i) {
        const double step = static_cast<double>(std::max<std::int64_t>(i, 1));
        std::size_t chosen = 0;
        double furthest = -std::numeric_limits<double>::infinity();
        for (std::size_t d = 0; d < num_datasets; ++d) {
            const double behind = weights[d] / total * step - static_cast<double>(taken[d]);
            if (behind > furthest) {
                furthest = behind;
                chosen = d;
            }
        }
        result.dataset.push_back(static_cast<std::int32_t>(chosen));
        result.sample.push_back(taken[chosen]++);
    }
    return result;
}

}  // namespace megatron_tf
