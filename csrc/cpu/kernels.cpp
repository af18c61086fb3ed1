#include "kernels.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace igpt::cpu {
namespace {

#if defined(__x86_64__)
// Conversions of float16. Not by __builtin_cpu_supports, which knows the name from GCC 11 on.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Choice {
  const Kernels* kernels;
  bool available;
};

}  // namespace

const Kernels* kernels(const char* name) {
  const Choice choices[] = {
#if defined(__x86_64__)
      // The builtins also ask whether the operating system saves the registers.
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_f16c()},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()},
#endif
      {&kPortable, true},
  };
  for (const Choice& choice : choices)
    if (choice.available && (name == nullptr || std::strcmp(name, choice.kernels->name) == 0)) return choice.kernels;
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const Kernels* named = kernels(std::getenv("IGPT_CPU_ISA"));
    return named != nullptr ? named : kernels(nullptr);
  }();
  return *chosen;
}

}  // namespace igpt::cpu
