// The start of each sample: every seq_length-th token of the concatenated documents.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.hpp"

namespace megatron_tf {

constexpr std::size_t kPrefetchDocuments = 64;  // lengths are read in random order, so prefetch them
constexpr std::size_t kWindowDocuments = std::size_t{1} << 18;  // per thread, so that their lengths stay in the cache

// Makes `resize` leave new elements uninitialized, so that the threads that fill them touch their pages first.
template <typename T>
struct Unfilled : std::allocator<T> {
    template <typename U>
    struct rebind {
        using other = Unfilled<U>;
    };
    template <typename U>
    void construct(U *place) {
        ::new (static_cast<void *>(place)) U;
    }
};

template <typename T>
using Column = std::vector<T, Unfilled<T>>;

template <typename Id, typename Length>
struct SampleIndex {
    Column<Id> position;    // in the order of documents
    Column<Length> offset;  // within that document
};

// Throws if any of the documents [begin, end) of the order is invalid.
template <typename Id, typename Length>
[[noreturn]] void refuse(const Id *order, std::size_t begin, std::size_t end, const Length *lengths,
                         std::size_t num_lengths) {
    for (std::size_t place = begin; place < end; ++place) {
        const auto document = static_cast<std::uint64_t>(order[place]);
        if (document >= num_lengths)
            throw std::out_of_range("document " + std::to_string(order[place]) + " of " + std::to_string(num_lengths));
        if (lengths[document] < 0)
            throw std::invalid_argument("document " + std::to_string(document) + " has a negative length");
    }
    throw std::overflow_error("more tokens than 63 bits count");
}

// Copies the lengths of documents [begin, end) of the order into `ordered`, and returns their sum.
template <typename Id, typename Length>
std::int64_t gather_lengths(const Id *order, std::size_t begin, std::size_t end, const Length *lengths,
                            std::size_t num_lengths, Length *ordered) {
    if (num_lengths == 0) refuse(order, begin, end, lengths, num_lengths);
    const auto address = reinterpret_cast<std::uintptr_t>(lengths);
    std::int64_t sum = 0;
    bool is_bad = false;
    const auto gather = [&](std::size_t place) {
        const auto document = static_cast<std::uint64_t>(order[place]);
        const bool is_known = document < num_lengths;
        const Length length = lengths[is_known ? document : 0];
        *ordered++ = length;
        // branch-free; details are checked only if something was bad
        is_bad |= !is_known | (length < 0);
        if constexpr (sizeof(Length) < sizeof sum)
            sum += length;  // the lengths of one window cannot overflow
        else
            is_bad |= __builtin_add_overflow(sum, std::int64_t{length}, &sum);
    };
    std::size_t place = begin;
    for (; place + kPrefetchDocuments < end; ++place) {
        // as an integer, since a bad id may point anywhere: prefetching an invalid address is harmless
        const auto ahead = static_cast<std::uint64_t>(order[place + kPrefetchDocuments]);
        __builtin_prefetch(reinterpret_cast<const void *>(address + ahead * sizeof(Length)));
        gather(place);
    }
    for (; place < end; ++place) gather(place);
    if (is_bad) refuse(order, begin, end, lengths, num_lengths);
    return sum;
}

// Boundaries of samples of `seq_length` tokens over documents concatenated in `order`: one more than there are samples,
// or none without tokens. Throws for ids outside `lengths`, negative lengths, and a number of tokens beyond 63 bits.
template <typename Id, typename Length>
SampleIndex<Id, Length> sample_index(const Id *order, std::size_t num_documents, const Length *lengths,
                                     std::size_t num_lengths, std::int64_t seq_length) {
    if (seq_length <= 0) throw std::invalid_argument("seq_length must be positive");
    const std::size_t parts = num_documents > kWindowDocuments ? num_threads() : 1;
    const std::size_t window = parts * kWindowDocuments;
    SampleIndex<Id, Length> index;
    std::vector<Length> ordered(std::min(window, num_documents));
    std::vector<std::int64_t> starts(parts + 1);  // of parts, in the concatenated documents
    const auto boundaries_before = [&](std::int64_t token) { return token / seq_length + (token % seq_length != 0); };
    // A window is read twice, for its sums and for its boundaries: the second time from `ordered`, in the cache.
    for (std::size_t first = 0; first < num_documents; first += window) {
        const std::size_t count = std::min(window, num_documents - first);
        in_parts(parts, count, 1, [&](std::size_t part, std::size_t begin, std::size_t end) {
            starts[part + 1] =
                gather_lengths(order, first + begin, first + end, lengths, num_lengths, ordered.data() + begin);
        });
        // sums become starts: only now can each part write its boundaries
        for (std::size_t part = 0; part < parts; ++part)
            if (__builtin_add_overflow(starts[part], starts[part + 1], &starts[part + 1]) ||
                starts[part + 1] > std::numeric_limits<std::int64_t>::max() - seq_length)
                throw std::overflow_error("more tokens than 63 bits count");
        const auto boundaries = static_cast<std::size_t>(boundaries_before(starts[parts]));
        if (first == 0 && count < num_documents) {  // the first window predicts the total
            index.position.reserve(static_cast<std::size_t>(
                1.05 * static_cast<double>(boundaries) / static_cast<double>(count) * static_cast<double>(num_documents)));
            index.offset.reserve(index.position.capacity());
        }
        index.position.resize(boundaries);
        index.offset.resize(boundaries);
        in_parts(parts, count, 1, [&](std::size_t part, std::size_t begin, std::size_t end) {
            std::int64_t start = starts[part], token = boundaries_before(start) * seq_length;
            auto position = index.position.begin() + token / seq_length;
            auto offset = index.offset.begin() + token / seq_length;
            for (std::size_t i = begin; i < end; ++i) {
                const std::int64_t next = start + ordered[i];
                for (; token < next; token += seq_length) {
                    *position++ = static_cast<Id>(first + i);
                    *offset++ = static_cast<Length>(token - start);
                }
                start = next;
            }
        });
        starts[0] = starts[parts];
    }
    return index;
}

}  // namespace megatron_tf
