// A coverage-guided run over check_index under sanitizers: fuzz_index RUNS SEED FILE...
// Files are indices to start from. What reaches new edges of the code joins them. An index that is accepted must hold
// what it says, by a second, slower reading; a wrong read or an error of memory ends the program with a report.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "indexed_dataset.hpp"

using Bytes = std::vector<std::uint8_t>;

static bool seen[1 << 20];  // code of the reader, by address; plain memory, as this is called before constructors run
static std::size_t edges;

extern "C" void __sanitizer_cov_trace_pc() {
    bool &place = seen[reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) % std::size(seen)];
    edges += !place;
    place = true;
}

namespace {

constexpr std::uint8_t kTypeSizes[] = {0, 1, 1, 2, 4, 8, 8, 4, 2};

template <typename T>
T field(const Bytes &data, std::size_t at) {
    if (at + sizeof(T) > data.size()) std::abort();
    T value;
    std::memcpy(&value, data.data() + at, sizeof(T));
    return value;
}

void require(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "accepted although %s\n", what);
    std::abort();
}

// An accepted index, read again as the format page describes it.
void read_again(const Bytes &data, const megatron_tf::IndexHeader &header) {
    const auto sequences = field<std::uint64_t>(data, 18), bounds = field<std::uint64_t>(data, 26);
    require(sequences == header.sequences && bounds == header.bounds, "counts differ");
    __int128 end = 0;
    for (std::uint64_t i = 0; i < sequences; ++i) {
        const auto length = field<std::int32_t>(data, 34 + 4 * i);
        require(length >= 0, "a length is negative");
        require(field<std::int64_t>(data, 34 + 4 * sequences + 8 * i) == end, "an offset is wrong");
        end += __int128{length} * kTypeSizes[header.type_code];
    }
    require(end == header.bytes, "the size is wrong");
    std::int64_t before = 0;
    for (std::uint64_t i = 0; i < bounds; ++i) {
        const auto bound = field<std::int64_t>(data, 34 + 12 * sequences + 8 * i);
        require(bound >= before && (i > 0 || bound == 0), "documents do not climb");
        before = bound;
    }
    require(before == static_cast<std::int64_t>(sequences), "the last document is wrong");
}

bool is_accepted(const Bytes &data) {
    const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[data.size()]);  // a byte more is an error
    std::copy(data.begin(), data.end(), exact.get());
    try {
        read_again(data, megatron_tf::check_index(exact.get(), data.size(), kTypeSizes, sizeof kTypeSizes));
        return true;
    } catch (const std::invalid_argument &) {
        return false;
    }
}

Bytes mutated(Bytes data, const Bytes &other, std::mt19937_64 &random) {
    static constexpr std::uint64_t kOdd[] = {0,          1,          2,          3,          0x7FFFFFFF,
                                             0x80000000, 0xFFFFFFFF, 1ULL << 32, 1ULL << 63, ~0ULL,
                                             ~0ULL / 12, ~0ULL / 8,  ~0ULL / 20};
    for (auto count = random() % 3 + 1; count > 0; --count) {
        const std::size_t at = data.empty() ? 0 : random() % data.size();
        switch (random() % 8) {
            case 0: if (!data.empty()) data[at] ^= 1 << random() % 8; break;
            case 1: if (!data.empty()) data[at] = static_cast<std::uint8_t>(random()); break;
            case 2: data.resize(at); break;
            case 3: data.resize(data.size() + random() % 24, static_cast<std::uint8_t>(random())); break;
            case 4: data.insert(data.begin() + at, other.begin(), other.begin() + random() % (other.size() + 1)); break;
            default: {  // a number where numbers are
                static constexpr std::size_t kFields[] = {9, 17, 18, 26};
                const std::size_t place = random() % 2 ? kFields[random() % 4] : at;
                const std::uint64_t value = random() % 2 ? kOdd[random() % std::size(kOdd)] : random() % 8;
                const std::size_t size = random() % 2 ? 8 : 4;
                if (place + size <= data.size()) std::memcpy(data.data() + place, &value, size);
            }
        }
    }
    if (data.size() > 4096) data.resize(4096);
    return data;
}

}  // namespace

int main(int argc, char **argv) {
    const long runs = std::atol(argv[1]);
    std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
    std::vector<Bytes> corpus;
    for (int i = 3; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        if (!is_accepted(corpus.back())) throw std::runtime_error("a start is refused");
    }
    const std::size_t first_edges = edges, starts = corpus.size();
    long accepted = 0;
    for (long run = 0; run < runs; ++run) {
        const std::size_t known = edges;
        Bytes data = mutated(corpus[random() % corpus.size()], corpus[random() % corpus.size()], random);
        accepted += is_accepted(data);
        if (edges > known) corpus.push_back(std::move(data));
    }
    std::printf("%ld runs, %ld accepted, edges %zu to %zu, starts %zu to %zu\n", runs, accepted, first_edges, edges,
                starts, corpus.size());
}
