#include "dispatch.h"

#include <stdexcept>
#if defined(MIXLOCAL_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mixlocal {
namespace {

#ifdef MIXLOCAL_NEON
bool has_dot_product() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    return true;  // every Mac with an ARM processor has it
#else
    return false;  // no way to ask
#endif
}
#endif

std::vector<const KernelTable*> probe() {
    std::vector<const KernelTable*> found;
#ifdef MIXLOCAL_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512vnni")) found.push_back(&kAvx512VnniKernels);
        found.push_back(&kAvx512Kernels);
    }
    if (avx2) found.push_back(&kAvx2Kernels);
#endif
#ifdef MIXLOCAL_NEON
    if (has_dot_product()) found.push_back(&kNeonKernels);
#endif
    found.push_back(&kScalarKernels);
    return found;
}

}  // namespace

const std::vector<const KernelTable*>& available_kernels() {
    static const std::vector<const KernelTable*> found = probe();
    return found;
}

const KernelTable& kernels_named(const std::string& name) {
    for (const KernelTable* table : available_kernels())
        if (name == table->name) return *table;
    throw std::invalid_argument("this machine has no " + name + " kernels");
}

}  // namespace mixlocal
