#include "cpu/blend.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "common/check.h"
#include "cpu/blend_isa.h"
#include "cpu/by_type.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace bmm {
namespace {

constexpr std::int64_t kSpanBytes = 2048;          // of each array of a span: ten of them stay in the first-level cache
constexpr std::int64_t kItemElements = 32 * 1024;  // elements that one work item covers
constexpr std::int64_t kSerialElements = 64 * 1024;  // below, waking a thread costs more than it saves
constexpr std::int64_t kAllFinite = std::numeric_limits<std::int64_t>::max();

template <class T>
constexpr std::int64_t kSpan = kSpanBytes / static_cast<std::int64_t>(sizeof(T));

const void* at(const void* data, DType dtype, std::int64_t index) {
    return static_cast<const char*>(data) + index * size_of(dtype);
}

// Asks for the elements after [begin, begin + count), as many: a span is too short for the processor to foresee the
// next of a dozen inputs read in turns.
void prefetch(const void* data, DType dtype, std::int64_t begin, std::int64_t count) {
    const char* next = static_cast<const char*>(at(data, dtype, begin + count));
    for (std::int64_t byte = 0; byte < count * size_of(dtype); byte += 64) __builtin_prefetch(next + byte, 0, 2);
}

template <class T>
struct Arrays {
    alignas(64) T base[kSpan<T>];
    alignas(64) T d[kSpan<T>];
    alignas(64) T total[kSpan<T>];
    alignas(64) T positive[kSpan<T>];
    alignas(64) T negative[kSpan<T>];
    alignas(64) T positive_weight[kSpan<T>];
    alignas(64) T negative_weight[kSpan<T>];
    alignas(64) T kept[kSpan<T>];
    alignas(64) float uniform[kSpan<T>];
};

template <class T>
struct Pass {
    const BlendSteps<T>& steps;
    const void* base;
    DType base_dtype;
    const std::vector<BlendExpert>& experts;
    const BlendRule& rule;
    std::atomic<std::int64_t>& not_finite;

    // The sum of the magnitudes of expert t's differences, which are left in a.d.
    double difference(std::size_t t, std::int64_t begin, std::int64_t count, Arrays<T>& a) const {
        const BlendExpert& expert = experts[t];
        note(steps.subtract(at(expert.data, expert.dtype, begin), expert.dtype, a.base, count, a.d), t + 1);
        return steps.magnitudes(a.d, count);
    }

    void note(bool finite, std::int64_t input) const {
        if (finite) return;
        std::int64_t lowest = not_finite.load(std::memory_order_relaxed);
        while (input < lowest && !not_finite.compare_exchange_weak(lowest, input, std::memory_order_relaxed)) {
        }
    }

    static bool is_masked(const BlendExpert& expert) {
        return expert.random || expert.lower > 0 || expert.upper < std::numeric_limits<float>::infinity();
    }

    // a.d = 0 where the expert is not kept; `kept` counts where it is, unless null.
    void mask(const BlendExpert& expert, std::int64_t begin, std::int64_t count, Arrays<T>& a, T* kept) const {
        if (expert.random) steps.uniform(expert.seed, rule.first + begin, count, a.uniform);
        if (is_masked(expert) || kept) {
            const Keep keep = {expert.lower, expert.upper,      expert.random ? a.uniform : nullptr,
                               expert.keep,  expert.keep_width, expert.ranks ? expert.ranks + begin : nullptr,
                               rule.inverse};
            steps.mask(keep, count, a.d, kept);
        }
    }

    // a.total = the combination of the experts on [begin, begin + count); `own` holds a span for each expert, where
    // there is a consensus to be found.
    void combine(std::int64_t begin, std::int64_t count, Arrays<T>& a, T* own) const {
        const bool elects = rule.combine == Combine::elect_sum || rule.combine == Combine::elect_count;
        const bool weighs = elects && rule.normalize;
        const bool averages = rule.combine == Combine::mean_kept;
        const bool votes = rule.combine == Combine::consensus;
        const Sums<T> sums = {a.total,
                              a.positive,
                              a.negative,
                              weighs ? a.positive_weight : nullptr,
                              weighs ? a.negative_weight : nullptr,
                              averages || votes ? a.kept : nullptr};
        for (T* array :
             {sums.total, sums.positive, sums.negative, sums.positive_weight, sums.negative_weight, sums.kept}) {
            if (array) std::fill_n(array, count, T(0));
        }
        prefetch(base, base_dtype, begin, count);
        note(steps.load(at(base, base_dtype, begin), base_dtype, count, a.base), 0);
        for (std::size_t t = 0; t < experts.size(); ++t) {
            const BlendExpert& expert = experts[t];
            const void* source = at(expert.data, expert.dtype, begin);
            prefetch(expert.data, expert.dtype, begin, count);
            const T factor = static_cast<T>(expert.factor);
            const bool masked = is_masked(expert);
            if (rule.combine == Combine::sum && !masked) {
                note(steps.add(source, expert.dtype, a.base, factor, count, a.total), t + 1);
                continue;
            }
            note(steps.subtract(source, expert.dtype, a.base, count, a.d), t + 1);
            mask(expert, begin, count, a, averages ? a.kept : nullptr);
            switch (rule.combine) {
                case Combine::sum: steps.sum(a.d, factor, count, a.total); break;
                case Combine::elect_sum:
                case Combine::elect_count:
                    steps.elect(a.d, factor, rule.combine == Combine::elect_count, static_cast<T>(expert.weight), count,
                                sums);
                    break;
                case Combine::largest: steps.largest(a.d, factor, count, a.total); break;
                case Combine::mean_kept:
                    steps.sum_unique(a.d, factor, static_cast<T>(expert.unique), count, a.total, a.positive);
                    break;
                case Combine::consensus: {
                    T* v = own + t * kSpan<T>;
                    std::fill_n(v, count, T(0));
                    steps.sum(a.d, factor, count, v);
                    steps.sum(v, T(1), count, a.total);
                    break;
                }
            }
        }
        if (elects) steps.elected(rule.tie, count, sums);
        if (averages) steps.mean(count, sums);
        if (votes) {
            for (std::size_t t = 0; t < experts.size(); ++t) {
                steps.vote(own + t * kSpan<T>, a.total, static_cast<T>(experts[t].dominance), count, a.kept);
            }
            steps.veto(a.kept, static_cast<T>(rule.votes), count, a.total);
        }
    }
};

// Calls finish(begin, count, arrays) on every span after the experts were combined.
template <class T, class Finish>
void for_each_span(const Pass<T>& pass, std::int64_t count, int threads, const Finish& finish) {
    const std::int64_t items = (count + kItemElements - 1) / kItemElements;
    if (count < kSerialElements) threads = 1;
    threads = static_cast<int>(std::min<std::int64_t>(threads, items));
    const std::size_t own = pass.rule.combine == Combine::consensus ? pass.experts.size() * kSpan<T> : std::size_t{0};
    const Workspace workspace(std::max<std::size_t>(1, threads * own) * sizeof(T));
    parallel(threads, [&](Team& team, int worker) {
        Arrays<T> arrays;
        T* spans = static_cast<T*>(workspace.data()) + worker * own;
        team.share(items, [&](std::int64_t item) {
            const std::int64_t end = std::min(count, (item + 1) * kItemElements);
            for (std::int64_t begin = item * kItemElements; begin < end; begin += kSpan<T>) {
                const std::int64_t some = std::min(kSpan<T>, end - begin);
                pass.combine(begin, some, arrays, spans);
                finish(begin, some, arrays);
            }
        });
    });
}

bool in_double(DType base_dtype, const std::vector<BlendExpert>& experts) {
    return base_dtype == DType::f64 || std::any_of(experts.begin(), experts.end(), [](const BlendExpert& expert) {
               return expert.dtype == DType::f64;
           });
}

void check(const void* base, const std::vector<BlendExpert>& experts, std::int64_t count, int threads) {
    BMM_CHECK(count >= 0 && (base || count == 0), "count is ", count);
    BMM_CHECK(threads >= 1, "threads is ", threads);
    for (const BlendExpert& expert : experts) BMM_CHECK(expert.data || count == 0, "null pointer for an expert");
}

std::int64_t found(const std::atomic<std::int64_t>& not_finite) {
    return not_finite == kAllFinite ? -1 : not_finite.load();
}

template <class T>
std::int64_t run(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts, const BlendRule& rule,
                 std::int64_t count, void* out, DType out_dtype, int threads, const Isa& isa) {
    const BlendSteps<T>& steps = by_type<T>(*isa.blend);
    std::atomic<std::int64_t> not_finite{kAllFinite};
    const Pass<T> pass{steps, base, base_dtype, experts, rule, not_finite};
    for_each_span(pass, count, threads, [&](std::int64_t begin, std::int64_t some, const Arrays<T>& a) {
        steps.store(a.base, a.total, static_cast<T>(rule.scaling), some,
                    static_cast<char*>(out) + begin * size_of(out_dtype), out_dtype);
    });
    return found(not_finite);
}

template <class T>
SignBalance run_balance(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts, std::int64_t count,
                        int threads, const Isa& isa) {
    const BlendSteps<T>& steps = by_type<T>(*isa.blend);
    const BlendRule rule = {Combine::sum, false, false, true, 0, 1, 0};
    std::atomic<std::int64_t> not_finite{kAllFinite};
    std::atomic<std::int64_t> balance{0};
    const Pass<T> pass{steps, base, base_dtype, experts, rule, not_finite};
    for_each_span(pass, count, threads, [&](std::int64_t, std::int64_t some, const Arrays<T>& a) {
        balance.fetch_add(steps.balance(a.total, some), std::memory_order_relaxed);
    });
    return {found(not_finite), balance};
}

template <class T>
MagnitudeSums run_magnitudes(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts,
                             std::uint64_t first, std::int64_t count, int threads, const Isa& isa) {
    const BlendSteps<T>& steps = by_type<T>(*isa.blend);
    const BlendRule rule = {Combine::sum, false, false, true, 0, 1, first};
    std::atomic<std::int64_t> not_finite{kAllFinite};
    const Pass<T> pass{steps, base, base_dtype, experts, rule, not_finite};
    const std::int64_t items = (count + kItemElements - 1) / kItemElements;
    // Each item's sums have places of their own, and are added up in the items' order.
    std::vector<std::pair<double, double>> parts(items * experts.size());
    if (count < kSerialElements) threads = 1;
    parallel(static_cast<int>(std::min<std::int64_t>(threads, items)), [&](Team& team, int) {
        Arrays<T> a;
        team.share(items, [&](std::int64_t item) {
            const std::int64_t end = std::min(count, (item + 1) * kItemElements);
            for (std::int64_t begin = item * kItemElements; begin < end; begin += kSpan<T>) {
                const std::int64_t some = std::min(kSpan<T>, end - begin);
                pass.note(steps.load(at(base, base_dtype, begin), base_dtype, some, a.base), 0);
                for (std::size_t t = 0; t < experts.size(); ++t) {
                    auto& [whole, kept] = parts[item * experts.size() + t];
                    whole += pass.difference(t, begin, some, a);
                    pass.mask(experts[t], begin, some, a, nullptr);
                    kept += steps.magnitudes(a.d, some);
                }
            }
        });
    });
    MagnitudeSums result = {found(not_finite), std::vector<std::pair<double, double>>(experts.size())};
    for (std::size_t i = 0; i < parts.size(); ++i) {
        auto& [whole, kept] = result.sums[i % experts.size()];
        whole += parts[i].first;
        kept += parts[i].second;
    }
    return result;
}

}  // namespace

std::int64_t blend(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts, const BlendRule& rule,
                   std::int64_t count, void* out, DType out_dtype, int threads, const std::string& isa) {
    check(base, experts, count, threads);
    BMM_CHECK(out || count == 0, "null pointer for out");
    if (count == 0) return -1;
    return in_double(base_dtype, experts)
               ? run<double>(base, base_dtype, experts, rule, count, out, out_dtype, threads, find_isa(isa))
               : run<float>(base, base_dtype, experts, rule, count, out, out_dtype, threads, find_isa(isa));
}

MagnitudeSums magnitude_sums(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts,
                             std::uint64_t first, std::int64_t count, int threads, const std::string& isa) {
    check(base, experts, count, threads);
    if (count == 0) return {-1, std::vector<std::pair<double, double>>(experts.size())};
    return in_double(base_dtype, experts)
               ? run_magnitudes<double>(base, base_dtype, experts, first, count, threads, find_isa(isa))
               : run_magnitudes<float>(base, base_dtype, experts, first, count, threads, find_isa(isa));
}

SignBalance sign_balance(const void* base, DType base_dtype, const std::vector<BlendExpert>& experts,
                         std::int64_t count, int threads, const std::string& isa) {
    check(base, experts, count, threads);
    if (count == 0) return {-1, 0};
    return in_double(base_dtype, experts)
               ? run_balance<double>(base, base_dtype, experts, count, threads, find_isa(isa))
               : run_balance<float>(base, base_dtype, experts, count, threads, find_isa(isa));
}

}  // namespace bmm
