#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// All standard headers stand above: what they define must run on every CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12 in its own header: bugs 105593, 105562
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define IGPT_INTRINSICS "avx512.inc"

namespace igpt::cpu {
namespace avx512 {
namespace {

constexpr int kLanes = 16;

#include "vector.inc"
//
#include "decode.inc"
#include "loss.inc"

}  // namespace
}  // namespace avx512

const Kernels kAvx512{"avx512", avx512::loss_rows, avx512::decode_part, avx512::decode_finish};

}  // namespace igpt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
