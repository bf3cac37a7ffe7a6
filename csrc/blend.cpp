#include "blend.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEGATRON_TF_HAS_AVX512_CODE 1
#include <immintrin.h>
#endif

namespace megatron_tf {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Shares are taken to the bit: another rounding decides ties between data sets otherwise.
std::vector<double> normalised(const double *weights, std::size_t num_datasets, bool are_shares) {
    if (num_datasets == 0 || num_datasets > std::numeric_limits<std::uint16_t>::max())
        throw std::invalid_argument("blend of " + std::to_string(num_datasets) + " data sets");
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

inline double counted(std::int64_t step) { return static_cast<double>(std::max<std::int64_t>(step, 1)); }

// Where steps are written down.
class Record {
public:
    Record(std::size_t num_datasets, std::uint16_t *dataset, std::int64_t *taken)
        : dataset_(dataset), before_block_(taken), taken_(num_datasets) {}

    void take(std::int64_t step, std::size_t chosen) {
        if (step % kBlendBlock == 0) before_block_ = std::copy(taken_.begin(), taken_.end(), before_block_);
        dataset_[step] = static_cast<std::uint16_t>(chosen);
        ++taken_[chosen];
    }

private:
    std::uint16_t *dataset_;
    std::int64_t *before_block_;
    std::vector<std::int64_t> taken_;
};

// Data sets of one weight come in turns: the lowest of those taken least is furthest behind.
struct Group {
    double share;
    std::vector<std::size_t> members{};
    std::size_t turn = 0;
    double least_taken = 0;

    std::size_t next() const { return members[turn]; }
    double behind(double step) const { return share * step - least_taken; }

    void take() {
        if (++turn < members.size()) return;
        turn = 0;
        ++least_taken;
    }
};

std::vector<Group> group_by_share(const std::vector<double> &shares) {
    std::map<double, std::size_t> places;
    std::vector<Group> groups;
    for (std::size_t d = 0; d < shares.size(); ++d) {
        const auto [place, is_new] = places.try_emplace(shares[d], groups.size());
        if (is_new) groups.push_back({shares[d]});
        groups[place->second].members.push_back(d);
    }
    return groups;
}

// Looks only at those of many groups that are behind by `threshold_` or more. All others wait in a calendar for the step
// before they get there, so that what a step costs depends on how many are near the front.
class FrontRunners {
public:
    explicit FrontRunners(const std::vector<double> &shares)
        : groups_(group_by_share(shares)), next_(groups_.size()), due_(groups_.size()) {}

    void run(std::int64_t size, Record record) {
        sort_out(0);
        for (std::int64_t i = 0; i < size; ++i) {
            admit(i);
            std::size_t place = furthest(counted(i));
            if (place == front_.size() || groups_[front_[place]].behind(counted(i)) < threshold_ || is_crowded(i)) {
                sort_out(i);
                place = furthest(counted(i));
            }
            const std::size_t chosen = front_[place];
            record.take(i, groups_[chosen].next());
            groups_[chosen].take();
            if (groups_[chosen].behind(counted(i + 1)) < threshold_ - kSlack) {
                front_[place] = front_.back();
                front_.pop_back();
                wait(chosen, i);
            }
        }
    }

private:
    static constexpr std::int64_t kDays = 1024;   // of the calendar; what is due later is met before, and left
    static constexpr double kSlack = 1e-6;        // far above rounding: who may have arrived is looked at

    // A threshold that few groups are above, and everybody in the right place for it.
    void sort_out(std::int64_t i) {
        const double step = counted(i);
        std::vector<double> behind;
        for (const auto &group : groups_) behind.push_back(group.behind(step));
        wanted_ = std::min(groups_.size() - 1, 3 + static_cast<std::size_t>(std::sqrt(groups_.size()) / 3));
        std::vector<double> sorted = behind;
        std::nth_element(sorted.begin(), sorted.begin() + wanted_, sorted.end(), std::greater<>());
        threshold_ = sorted[wanted_];
        sorted_out_ = i;
        front_.clear();
        calendar_.assign(kDays, kNobody);
        for (std::size_t g = 0; g < groups_.size(); ++g)
            if (behind[g] >= threshold_)
                front_.push_back(g);
            else
                wait(g, i);
    }

    bool is_crowded(std::int64_t i) const {
        return front_.size() > 4 * wanted_ + 8 && i - sorted_out_ > static_cast<std::int64_t>(groups_.size());
    }

    void wait(std::size_t g, std::int64_t i) {
        const double day = (groups_[g].least_taken + threshold_) / groups_[g].share - 1;
        due_[g] = std::max(i + 1, static_cast<std::int64_t>(std::min(day, 9e18)));
        std::size_t &first = calendar_[due_[g] % kDays];
        next_[g] = first;
        first = g;
    }

    void admit(std::int64_t i) {
        for (std::size_t *link = &calendar_[i % kDays]; *link != kNobody;) {
            const std::size_t g = *link;
            if (due_[g] > i) {
                link = &next_[g];
                continue;
            }
            *link = next_[g];
            front_.push_back(g);
        }
    }

    // Place of the group furthest behind in `front_`; ties go to the lowest data set.
    std::size_t furthest(double step) const {
        std::size_t best = front_.size();
        double most = -kInfinity;
        for (std::size_t place = 0; place < front_.size(); ++place) {
            const Group &group = groups_[front_[place]];
            const double behind = group.behind(step);
            if (behind > most || (behind == most && group.next() < groups_[front_[best]].next())) {
                most = behind;
                best = place;
            }
        }
        return best;
    }

    static constexpr std::size_t kNobody = std::numeric_limits<std::size_t>::max();

    std::vector<Group> groups_;
    std::vector<std::size_t> front_, calendar_, next_;
    std::vector<std::int64_t> due_;
    double threshold_ = 0;
    std::size_t wanted_ = 0;
    std::int64_t sorted_out_ = 0;
};

constexpr std::size_t kFew = 64;  // up to here a look at all costs less than a calendar

void run_over_few(const std::vector<double> &shares, std::int64_t size, Record record) {
    std::vector<double> taken(shares.size());
    for (std::int64_t i = 0; i < size; ++i) {
        const double step = counted(i);
        std::size_t chosen = 0;
        double most = -kInfinity;
        for (std::size_t d = 0; d < shares.size(); ++d) {
            const double behind = shares[d] * step - taken[d];
            if (behind > most) {
                most = behind;
                chosen = d;
            }
        }
        record.take(i, chosen);
        ++taken[chosen];
    }
}

#ifdef MEGATRON_TF_HAS_AVX512_CODE
constexpr std::size_t kLanes = 8;

// Looks at all data sets at once, up to kLanes * kBlocks of them; what a step depends on stays in registers.
template <std::size_t kBlocks>
__attribute__((target("avx512f,avx512dq"))) void run_in_registers(const std::vector<double> &shares, std::int64_t size,
                                                                  Record record) {
    double padded[kLanes * kBlocks] = {}, nothing_taken[kLanes * kBlocks];
    std::copy(shares.begin(), shares.end(), padded);
    std::fill(nothing_taken, nothing_taken + kLanes * kBlocks, kInfinity);  // what fills up is never behind
    std::fill(nothing_taken, nothing_taken + shares.size(), 0.0);
    __m512d share[kBlocks], taken[kBlocks];
    for (std::size_t b = 0; b < kBlocks; ++b) {
        share[b] = _mm512_loadu_pd(padded + kLanes * b);
        taken[b] = _mm512_loadu_pd(nothing_taken + kLanes * b);
    }
    const __m512d one = _mm512_set1_pd(1);
    __m512d behind[kBlocks];
    for (std::size_t b = 0; b < kBlocks; ++b) behind[b] = _mm512_sub_pd(share[b], taken[b]);
    for (std::int64_t i = 0; i < size; ++i) {
        __m512d most = behind[0];
        for (std::size_t b = 1; b < kBlocks; ++b) most = _mm512_max_pd(most, behind[b]);
        most = _mm512_max_pd(most, _mm512_shuffle_f64x2(most, most, 0x4E));
        most = _mm512_max_pd(most, _mm512_shuffle_f64x2(most, most, 0xB1));
        most = _mm512_max_pd(most, _mm512_permute_pd(most, 0x55));
        __mmask8 hit[kBlocks];
        std::uint64_t hits = 0;
        for (std::size_t b = 0; b < kBlocks; ++b) {
            hit[b] = _mm512_cmp_pd_mask(behind[b], most, _CMP_EQ_OQ);
            hits |= std::uint64_t{hit[b]} << (kLanes * b);
        }
        const std::uint64_t lowest = hits & -hits;
        if (hits != lowest)  // a tie, which is rare: only then does the next step wait for `hits`
            for (std::size_t b = 0; b < kBlocks; ++b) hit[b] = static_cast<__mmask8>(lowest >> (kLanes * b));
        const __m512d next_step = _mm512_set1_pd(counted(i + 1));
        for (std::size_t b = 0; b < kBlocks; ++b) {  // either way is ready before it is known which one it is
            const __m512d due = _mm512_mul_pd(share[b], next_step), one_more = _mm512_add_pd(taken[b], one);
            behind[b] = _mm512_mask_blend_pd(hit[b], _mm512_sub_pd(due, taken[b]), _mm512_sub_pd(due, one_more));
            taken[b] = _mm512_mask_blend_pd(hit[b], taken[b], one_more);
        }
        record.take(i, static_cast<std::size_t>(__builtin_ctzll(hits)));
    }
}

using Run = void (*)(const std::vector<double> &, std::int64_t, Record);
constexpr Run kRunInRegisters[] = {run_in_registers<1>, run_in_registers<2>, run_in_registers<3>, run_in_registers<4>};
#endif

}  // namespace

void blend(const double *weights, std::size_t num_datasets, bool are_shares, std::int64_t size,
           std::uint16_t *dataset, std::int64_t *taken) {
    if (size < 0) throw std::invalid_argument("blend of " + std::to_string(size) + " samples");
    const std::vector<double> shares = normalised(weights, num_datasets, are_shares);
    const Record record(num_datasets, dataset, taken);
#ifdef MEGATRON_TF_HAS_AVX512_CODE
    const std::size_t blocks = (num_datasets + kLanes - 1) / kLanes;
    if (blocks <= std::size(kRunInRegisters) && __builtin_cpu_supports("avx512dq")) {
        kRunInRegisters[blocks - 1](shares, size, record);
        return;
    }
#endif
    if (num_datasets <= kFew)
        run_over_few(shares, size, record);
    else
        FrontRunners(shares).run(size, record);
}

}  // namespace megatron_tf
