#include "indexed_dataset.hpp"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace megatron_tf {

namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};

// Arrays in the file are unaligned.
template <typename T>
T load(const std::uint8_t *data, std::uint64_t index = 0) {
    T value;
    std::memcpy(&value, data + index * sizeof(T), sizeof(T));
    return value;
}

[[noreturn]] void fail(const std::string &what) { throw std::invalid_argument(what); }

IndexHeader read_header(const std::uint8_t *data, std::size_t size, const std::uint8_t *type_sizes,
                        std::size_t num_types) {
    if (size < kIndexHeaderBytes || std::memcmp(data, kMagic, sizeof kMagic) != 0)
        fail("it is not an index of an indexed dataset: it does not begin with MMIDIDX");
    const auto version = load<std::uint64_t>(data + 9);
    const IndexHeader header{data[17], load<std::uint64_t>(data + 18), load<std::uint64_t>(data + 26), 0, true};
    if (version != 1) fail("it has version " + std::to_string(version) + "; known is 1");
    if (header.type_code >= num_types || type_sizes[header.type_code] == 0)
        fail("it has type code " + std::to_string(header.type_code) + "; known are 1 to 8");
    const std::uint64_t body = size - kIndexHeaderBytes;
    if (header.sequences > body / 12 || header.bounds > body / 8 || header.bounds < 1)
        fail("it is truncated or damaged: " + std::to_string(header.sequences) + " sequences and " +
             std::to_string(header.bounds) + " document bounds do not fit its " + std::to_string(size) + " bytes");
    const std::uint64_t needed = 12 * header.sequences + 8 * header.bounds;
    if (body != needed && body != needed + header.sequences)  // multimodal sets have one more byte per sequence
        fail("it is truncated or damaged: its counts need " + std::to_string(needed) +
             " bytes after the header, there are " + std::to_string(body));
    return header;
}

}  // namespace

IndexHeader check_index(const std::uint8_t *data, std::size_t size, const std::uint8_t *type_sizes,
                        std::size_t num_types) {
    IndexHeader header = read_header(data, size, type_sizes, num_types);
    const std::uint8_t *lengths = data + kIndexHeaderBytes;
    const std::uint8_t *offsets = lengths + 4 * header.sequences;
    const std::uint8_t *bounds = offsets + 8 * header.sequences;
    const std::uint64_t item = type_sizes[header.type_code];
    std::uint64_t end = 0;
    for (std::uint64_t i = 0; i < header.sequences; ++i) {
        const auto length = load<std::int32_t>(lengths, i);
        if (length < 0) fail("sequence " + std::to_string(i) + " has a negative length");
        if (load<std::uint64_t>(offsets, i) != end)
            fail("the offset of sequence " + std::to_string(i) + " is not the running sum of lengths");
        end += item * static_cast<std::uint64_t>(length);  // can't overflow: that many do not fit into memory
    }
    header.bytes = end;
    std::int64_t before = 0;
    for (std::uint64_t i = 0; i < header.bounds; ++i) {
        const auto bound = load<std::int64_t>(bounds, i);
        if (bound < before || (i == 0 && bound != 0))
            fail("the document index does not start at 0 or decreases at document " + std::to_string(i));
        header.one_sequence_each = header.one_sequence_each && bound == static_cast<std::int64_t>(i);
        before = bound;
    }
    if (static_cast<std::uint64_t>(before) != header.sequences)
        fail("the document index ends at " + std::to_string(before) + ", not at the number of sequences, " +
             std::to_string(header.sequences));
    return header;
}

}  // namespace megatron_tf
