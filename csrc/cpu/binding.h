// What the operators of the CPU kernels share. They are on the LibTorch stable ABI.
//
// Checks there guard memory only; arguments of users are checked, with better words, in igpt_kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../share.h"
#include "kernels.h"

namespace igpt::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kHalf;
    default: STD_TORCH_CHECK(false, "inputs must be float32, bfloat16 or float16");
  }
}

// Whether x is a contiguous CPU tensor [size] of that dtype.
inline bool holds(const Tensor& x, ScalarType type, int64_t size) {
  return x.is_cpu() && x.scalar_type() == type && x.is_contiguous() && x.dim() == 1 && x.size(0) == size;
}

}  // namespace igpt::cpu
