#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// All standard headers stand above: what they define must run on every CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define IGPT_INTRINSICS "avx2.inc"

namespace igpt::cpu {
namespace avx2 {
namespace {

constexpr int kLanes = 8;

#include "vector.inc"
//
#include "decode.inc"
#include "loss.inc"

}  // namespace
}  // namespace avx2

const Kernels kAvx2{"avx2", avx2::loss_rows, avx2::decode_part, avx2::decode_finish};

}  // namespace igpt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
