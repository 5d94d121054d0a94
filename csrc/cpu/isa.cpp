#include "cpu/isa.h"

#ifdef BMM_X86
#include <cpuid.h>
#endif

#include <algorithm>

#include "common/check.h"

namespace bmm {
namespace {

#ifdef BMM_X86
// On Intel's cores with AMX the bf16 dot product of AVX-512 runs at half the speed of plain multiply-adds on widened
// values (measured on Emerald Rapids: 80 against 170 Gflop/s a core); on Cooper Lake and AMD's Zen it is twice as fast.
bool fast_bf16_dot() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool advertised = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return advertised && !amx;
}
#endif

std::vector<const Isa*> usable() {
    std::vector<const Isa*> found;
#ifdef BMM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (fast_bf16_dot()) found.push_back(&isa_avx512_bf16);
        found.push_back(&isa_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&isa_avx2);
#endif
    found.push_back(&isa_portable);
    return found;
}

}  // namespace

const Isa& find_isa(const std::string& name) {
    static const std::vector<const Isa*> isas = usable();
    for (const Isa* isa : isas) {
        if (name.empty() || name == isa->name) return *isa;
    }
#ifdef BMM_X86
    // By name also where it is slow, or present although the machine does not say so; the caller knows.
    const bool avx512 = std::find(isas.begin(), isas.end(), &isa_avx512) != isas.end();
    if (name == isa_avx512_bf16.name && avx512) return isa_avx512_bf16;
#endif
    fail(__FILE__, __LINE__, "instruction set '", name,
         "' is not among those that this build has and this machine runs");
}

std::vector<std::string> isa_names() {
    std::vector<std::string> names;
    for (const Isa* isa : usable()) names.emplace_back(isa->name);
    return names;
}

}  // namespace bmm
