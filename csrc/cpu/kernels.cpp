#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace igpt::cpu {
namespace {

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
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
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
