// CPU kernels on raw pointers: what they are given, and which machine code does it. binding.cpp alone knows torch.
//
// The same sources are compiled once for each instruction set (portable.cpp, avx2.cpp, avx512.cpp), all of them into one
// library. `kernels()` gives those that this CPU has. A kernel does one piece of work in one thread; the caller cuts the work
// into pieces whose sizes depend on the shapes alone. So the bits of a result do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace igpt::cpu {

enum class Type { kFloat, kBFloat16, kHalf };

// Rows of logits of a cross-entropy: row r begins at logits + r * stride. float32 or bfloat16.
struct Loss {
  void* logits;
  Type type;
  int64_t vocab, stride;  // elements
  const int64_t* target;
  int64_t ignore_index;
  float z_loss;
  const float* factor;  // of each row's gradient, at factor + r * factor_stride; null: no gradients
  int64_t factor_stride;
  float *loss, *lse;
};

// One query of each sequence and head against a cache: q [B,H,D], k and v [B,H,T,D], the last stride 1. All strides in elements.
struct Decode {
  const void *q, *k, *v;
  void* out;
  float* lse;
  Type type;
  int64_t head_dim;
  int64_t q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, lse_batch, lse_head;
  const int64_t* keys;  // which tokens are visible, in order; null: all of them
  float scale;
};

// Keys that one piece of decoding takes: 10 us of work for head dim 64 in float32 from memory.
constexpr int64_t kDecodeKeys = 256;

// Floats of what one piece leaves: a sum of values, padded to a vector; behind it the largest score and the sum of weights.
constexpr int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int64_t part_size(int64_t head_dim) { return padded(head_dim) + 16; }

struct Kernels {
  const char* name;
  // Loss and log-sum-exp of rows begin to end. Where there is a factor, the gradient takes the logits' place:
  //   loss = lse - logit[target] + z lse^2      dlogit = factor ((1 + 2 z lse) softmax(logits) - onehot(target))
  // Rows of ignore_index: loss 0, gradient 0. Rows whose target is no class: NaN. Scratch: vocab floats.
  void (*loss_rows)(const Loss&, int64_t begin, int64_t end, float* scratch);
  // Values begin to end times a factor, in float32. What is 0 stays 0, also where the factor is infinite or NaN.
  void (*scale)(void* values, Type, int64_t begin, int64_t end, float factor);
  // Attention to at most kDecodeKeys keys (begin to end of `keys`, or the tokens begin to end), not divided by its sum:
  // part = sum of exp(score - largest) value, and behind it the largest score and the sum of exponentials.
  void (*decode_part)(const Decode&, int64_t batch, int64_t head, int64_t begin, int64_t end, float* part);
  // Output and log-sum-exp of a sequence and head, of `count` parts, which it changes. No part: 0 and -inf.
  void (*decode_finish)(const Decode&, int64_t batch, int64_t head, float* parts, int64_t count);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

// The kernels of the best instruction set that this CPU has, or of the one that is named: null where it has not.
const Kernels* kernels(const char* name);
// Those of the environment variable IGPT_CPU_ISA (portable, avx2 or avx512; for tests), else the best. Chosen once.
const Kernels& kernels();

}  // namespace igpt::cpu
