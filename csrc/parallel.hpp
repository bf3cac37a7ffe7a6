// Parallel loops over threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace megatron_tf {

constexpr std::size_t kMostThreads = 16;

inline std::size_t num_threads() {
    return std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, kMostThreads);
}

// Calls act(part, begin, end) for equal parts of [0, count), one in each of `parts` threads; parts start at multiples
// of `granule`. Rethrows the exception of the first part that failed.
template <typename Act>
void in_parts(std::size_t parts, std::size_t count, std::size_t granule, const Act &act) {
    const std::size_t size = ((count + parts - 1) / parts + granule - 1) / granule * granule;
    std::vector<std::exception_ptr> errors(parts);
    std::vector<std::thread> threads;
    const auto run = [&](std::size_t part) {
        try {
            act(part, std::min(count, part * size), std::min(count, (part + 1) * size));
        } catch (...) {
            // an uncaught exception in a thread would terminate the process
            errors[part] = std::current_exception();
        }
    };
    threads.reserve(parts);
    for (std::size_t part = 1; part < parts; ++part) {
        try {
            threads.emplace_back(run, part);
        } catch (const std::system_error &) {
            run(part);  // the system allows no more threads
        }
    }
    run(0);
    for (auto &thread : threads) thread.join();
    for (const auto &error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace megatron_tf
