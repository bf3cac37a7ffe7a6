// Where samples begin: every seq_length-th token of documents laid end to end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron_tf {

constexpr std::size_t kPrefetchDocuments = 64;  // lengths are read in random order: ask for them ahead

template <typename Id, typename Length>
struct SampleIndex {
    std::vector<Id> position;    // in the order of documents
    std::vector<Length> offset;  // within that document
};

// Boundaries of samples of `seq_length` tokens over documents laid end to end in `order`: one more than there are samples;
// none for no tokens. Throws for ids outside of `lengths`, negative lengths, and more tokens than 63 bits count.
template <typename Id, typename Length>
SampleIndex<Id, Length> sample_index(const Id *order, std::size_t num_documents, const Length *lengths,
                                     std::size_t num_lengths, std::int64_t seq_length) {
    if (seq_length <= 0) throw std::invalid_argument("seq_length must be positive");
    const auto address = reinterpret_cast<std::uintptr_t>(lengths);
    SampleIndex<Id, Length> index;
    std::int64_t left = 0;  // tokens from the start of a document to the next boundary
    std::int64_t tokens = 0;
    for (std::size_t place = 0; place < num_documents; ++place) {
        if (place + kPrefetchDocuments < num_documents) {
            // as a number, since a bad id may point anywhere: asking for what is not there is harmless
            const auto ahead = static_cast<std::uint64_t>(order[place + kPrefetchDocuments]);
            __builtin_prefetch(reinterpret_cast<const void *>(address + ahead * sizeof(Length)));
        }
        const auto document = static_cast<std::uint64_t>(order[place]);
        if (document >= num_lengths)
            throw std::out_of_range("document " + std::to_string(order[place]) + " of " + std::to_string(num_lengths));
        const std::int64_t length = lengths[document];
        if (length < 0)
            throw std::invalid_argument("document " + std::to_string(document) + " has a negative length");
        // with room for one sample more, so that no boundary overflows either
        if (__builtin_add_overflow(tokens, length, &tokens) ||
            tokens > std::numeric_limits<std::int64_t>::max() - seq_length)
            throw std::overflow_error("more tokens than 63 bits count");
        for (; left < length; left += seq_length) {
            index.position.push_back(static_cast<Id>(place));
            index.offset.push_back(static_cast<Length>(left));
        }
        left -= length;
    }
    return index;
}

}  // namespace megatron_tf
