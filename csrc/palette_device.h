// The work of one GPU thread, or of one team of them, on raw pointers: plain C++, so that a machine without a GPU compiles
// the same lines with its own compiler, sanitizers included, and runs them thread by thread (tests/csrc/fuzz.cpp).
//
// palette.cu wraps these functions in kernels. palette.h says what is computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "palette_plan.h"

#ifdef __CUDACC__
#define IGPT_DEVICE __device__ __forceinline__
#else
#define IGPT_DEVICE inline
#endif

namespace igpt {
namespace device {

// 16 bytes of memory, aligned to 16: one load or store of a GPU.
struct alignas(16) Quad {
  uint32_t word[4];
};

IGPT_DEVICE uint32_t misalignment(const void* pointer, uint32_t of) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer)) & (of - 1);
}

// Pixels and tokens pass through once: streaming (.cs) leaves the caches to the table.
IGPT_DEVICE Quad load_quad(const void* pointer) {
  Quad quad;
#ifdef __CUDA_ARCH__
  const uint4 loaded = __ldcs(static_cast<const uint4*>(pointer));
  quad.word[0] = loaded.x, quad.word[1] = loaded.y, quad.word[2] = loaded.z, quad.word[3] = loaded.w;
#else
  if (misalignment(pointer, 16) != 0) std::abort();  // what a GPU would do
  std::memcpy(&quad, pointer, sizeof(quad));
#endif
  return quad;
}

IGPT_DEVICE uint32_t load_word(const void* pointer) {
#ifdef __CUDA_ARCH__
  return __ldcs(static_cast<const unsigned int*>(pointer));
#else
  if (misalignment(pointer, 4) != 0) std::abort();
  uint32_t word;
  std::memcpy(&word, pointer, sizeof(word));
  return word;
#endif
}

IGPT_DEVICE void store_quad(void* pointer, const Quad& quad) {
#ifdef __CUDA_ARCH__
  __stcs(static_cast<uint4*>(pointer), make_uint4(quad.word[0], quad.word[1], quad.word[2], quad.word[3]));
#else
  if (misalignment(pointer, 16) != 0) std::abort();
  std::memcpy(pointer, &quad, sizeof(quad));
#endif
}

// The read-only path: the table and the palette do not change while a kernel runs.
template <class T>
IGPT_DEVICE T read(const T* pointer) {
#ifdef __CUDA_ARCH__
  return __ldg(pointer);
#else
  return *pointer;
#endif
}

// 4 * kWords bytes from `bytes` on, in little-endian words. `inside` says that the byte before them and the four after
// may be read too: then a misaligned address costs one more word; without it, it costs byte loads.
template <int kWords>
IGPT_DEVICE void load_bytes(const uint8_t* bytes, bool inside, uint32_t (&words)[kWords]) {
  const uint32_t ahead = misalignment(bytes, 4);
  if (misalignment(bytes, 16) == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const Quad quad = load_quad(bytes + 16 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * i + j] = quad.word[j];
    }
  } else if (ahead == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_word(bytes + 4 * i);
  } else if (inside) {
    uint32_t low = load_word(bytes - ahead);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t high = load_word(bytes - ahead + 4 * (i + 1));
      words[i] = static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (8 * ahead));  // a funnel shift
      low = high;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[i] = uint32_t{bytes[4 * i]} | uint32_t{bytes[4 * i + 1]} << 8 | uint32_t{bytes[4 * i + 2]} << 16 |
                 uint32_t{bytes[4 * i + 3]} << 24;
  }
}

// Byte `i` of little-endian words.
template <int kWords>
IGPT_DEVICE uint32_t byte_of(const uint32_t (&words)[kWords], int i) {
  return words[i / 4] >> (8 * (i % 4)) & 0xFF;
}

// Writes the elements of `values` from `to` on, 16 bytes at a time where the address allows.
template <class T, int kCount>
IGPT_DEVICE void store_all(T* to, const T (&values)[kCount]) {
  constexpr int per_quad = 16 / sizeof(T);
  static_assert(kCount % per_quad == 0, "whole quads");
  if (misalignment(to, 16) == 0) {
#pragma unroll
    for (int i = 0; i < kCount / per_quad; ++i) {
      Quad quad;
      std::memcpy(&quad, values + per_quad * i, sizeof(quad));
      store_quad(to + per_quad * i, quad);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = values[i];
  }
}

IGPT_DEVICE uint32_t colour_at(const uint8_t* pixel, int64_t channel_stride) {
  return uint32_t{read(pixel)} << 16 | uint32_t{read(pixel + channel_stride)} << 8 | read(pixel + 2 * channel_stride);
}

// Where the run `row` begins.
IGPT_DEVICE const uint8_t* row_of(const View& view, int64_t row) {
  const uint8_t* data = view.data;
  for (int d = view.dims - 1; d >= 0; row /= view.sizes[d], --d) data += row % view.sizes[d] * view.strides[d];
  return data;
}

// One unit of a lookup.
template <Layout kLayout, class Token>
IGPT_DEVICE void lookup_unit(const uint16_t* table, const View& view, int64_t unit, Token* tokens) {
  if (kLayout == kStrided) {
    const int64_t row = view.dims == 0 ? 0 : unit / view.run;
    const uint8_t* pixel = row_of(view, row) + (unit - row * view.run) * view.stride;
    tokens[unit] = static_cast<Token>(read(table + colour_at(pixel, view.channel_stride)));
    return;
  }
  const int64_t per_run = (view.run + kUnit - 1) / kUnit;
  const int64_t row = view.dims == 0 ? 0 : unit / per_run;
  const int64_t begin = (unit - row * per_run) * kUnit;
  const uint8_t* data = row_of(view, row) + begin * view.stride;
  Token* to = tokens + row * view.run + begin;
  if (begin + kUnit > view.run) {
    for (int64_t i = 0; i < view.run - begin; ++i)
      to[i] = static_cast<Token>(read(table + colour_at(data + i * view.stride, view.channel_stride)));
    return;
  }
  const bool inside = begin > 0 && begin + kUnit + 4 <= view.run;
  uint32_t colour[kUnit];
  if (kLayout == kPacked) {
    uint32_t words[3 * kUnit / 4];
    load_bytes(data, inside, words);
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      colour[i] = byte_of(words, 3 * i) << 16 | byte_of(words, 3 * i + 1) << 8 | byte_of(words, 3 * i + 2);
  } else {
    uint32_t words[kUnit / 4];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) colour[i] = 0;
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      load_bytes(data + channel * view.channel_stride, inside, words);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) colour[i] |= byte_of(words, i) << (16 - 8 * channel);
    }
  }
  Token found[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) found[i] = static_cast<Token>(read(table + colour[i]));
  store_all(to, found);
}

// One unit of igpt::decode. `beyond` becomes 1 where a token is not in 0..size-1.
template <class Token>
IGPT_DEVICE void decode_unit(const uint32_t* colours, int64_t size, const Token* tokens, int64_t count, int64_t run,
                             int64_t unit, uint8_t* pixels, int32_t* beyond) {
  const bool packed = run == 1;
  const int64_t length = packed ? count : run;  // with channels last all pixels are one run
  const int64_t per_run = (length + kUnit - 1) / kUnit;
  const int64_t row = packed ? 0 : unit / per_run;
  const int64_t begin = (unit - row * per_run) * kUnit;
  const Token* from = tokens + row * length + begin;
  uint8_t* to = pixels + (packed ? 3 * begin : 3 * row * run + begin);
  const bool whole = begin + kUnit <= length;

  uint32_t colour[kUnit];
  bool inside = true;
  Token token[kUnit];
  if (whole && misalignment(from, 16) == 0) {
    constexpr int per_quad = 16 / sizeof(Token);
#pragma unroll
    for (int i = 0; i < kUnit / per_quad; ++i) {
      const Quad quad = load_quad(from + per_quad * i);
      std::memcpy(token + per_quad * i, &quad, sizeof(quad));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) token[i] = begin + i < length ? from[i] : Token{0};
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const bool valid = static_cast<uint64_t>(static_cast<int64_t>(token[i])) < static_cast<uint64_t>(size);
    inside &= valid;
    colour[i] = valid ? read(colours + static_cast<int64_t>(token[i])) : 0;  // little-endian: red is the lowest byte
  }
  if (!inside) *beyond = 1;  // every thread that writes it writes the same

  if (!whole) {
#pragma unroll  // with a bound known to the compiler `colour` stays in registers
    for (int i = 0; i < kUnit; ++i)
      for (int channel = 0; channel < 3; ++channel)
        if (i < length - begin)
          to[packed ? 3 * i + channel : channel * run + i] = static_cast<uint8_t>(colour[i] >> (8 * channel));
    return;
  }
  if (packed) {
    uint8_t bytes[3 * kUnit];
#pragma unroll
    for (int i = 0; i < 3 * kUnit; ++i) bytes[i] = static_cast<uint8_t>(colour[i / 3] >> (8 * (i % 3)));
    store_all(to, bytes);
  } else {
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      uint8_t bytes[kUnit];
#pragma unroll
      for (int i = 0; i < kUnit; ++i) bytes[i] = static_cast<uint8_t>(colour[i] >> (8 * channel));
      store_all(to + channel * run, bytes);
    }
  }
}

// The table. A team of kTeam threads fills one cell of kCellSide^3 colours: it finds the palette colour nearest to the
// cell's centre, keeps those that can win somewhere in the cell (csrc/palette.cpp, keep_near, has the proof), in their
// order, and evaluates the contract's expression for each colour of the cell against those alone.
constexpr int kTeam = 256;
constexpr int kCellSide = 8;
constexpr int kCellsPerAxis = 256 / kCellSide;
constexpr int kCells = kCellsPerAxis * kCellsPerAxis * kCellsPerAxis;
constexpr int kCellColours = kCellSide * kCellSide * kCellSide;
constexpr int kColoursPerThread = kCellColours / kTeam;
constexpr int kKept = 2 * kTeam;  // colours kept before they are evaluated to free space for more

// What a team has in common.
struct Shared {
  double distance[kTeam];
  int nearest[kTeam];
  uint32_t keep[kTeam / 32];  // a bit for each thread
  double red[kKept], green[kKept], blue[kKept];
  int index[kKept];
};

// What a thread has for itself.
struct Own {
  double least[kColoursPerThread];
  int winner[kColoursPerThread];
};

// The squared distance, in the order of the contract. palette.cu is compiled without contraction to fused operations.
IGPT_DEVICE double distance(double red, double green, double blue, const double* colour) {
  const double r = red - colour[0], g = green - colour[1], b = blue - colour[2];
  return (r * r + g * g) + b * b;
}

// Sets bit `thread` of `bits` to `keep`; the threads of a warp come together, or one after another from its first.
IGPT_DEVICE void vote(uint32_t* bits, int thread, bool keep) {
#ifdef __CUDA_ARCH__
  const uint32_t all = __ballot_sync(0xFFFFFFFFu, keep);
  if (thread % 32 == 0) bits[thread / 32] = all;
#else
  if (thread % 32 == 0) bits[thread / 32] = 0;
  bits[thread / 32] |= uint32_t{keep} << (thread % 32);
#endif
}

IGPT_DEVICE int bits_in(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// How many of the bits before `thread` are set.
IGPT_DEVICE int bits_before(const uint32_t* bits, int thread) {
  int count = 0;
  for (int warp = 0; warp < thread / 32; ++warp) count += bits_in(bits[warp]);
  return thread % 32 == 0 ? count : count + bits_in(bits[thread / 32] << (32 - thread % 32));
}

// Fills the cell `cell` of the table. team.each(f) calls f(thread, own) for every thread of the team; when it returns,
// all calls have been made, and every thread sees what the others wrote.
template <class Team>
IGPT_DEVICE void fill_cell(Team& team, Shared& shared, const double* colours, int size, int cell, uint16_t* table) {
  const int red = cell / (kCellsPerAxis * kCellsPerAxis) * kCellSide;
  const int green = cell / kCellsPerAxis % kCellsPerAxis * kCellSide;
  const int blue = cell % kCellsPerAxis * kCellSide;
  const double half = 0.5 * (kCellSide - 1);
  const double mid_red = red + half, mid_green = green + half, mid_blue = blue + half;

  team.each([&](int thread, Own& own) {
    double least = INFINITY;
    int nearest = 0;
    for (int k = thread; k < size; k += kTeam) {
      const double far = distance(mid_red, mid_green, mid_blue, colours + 3 * static_cast<int64_t>(k));
      if (far < least) least = far, nearest = k;
    }
    shared.distance[thread] = least;
    shared.nearest[thread] = nearest;
    for (int i = 0; i < kColoursPerThread; ++i) own.least[i] = INFINITY, own.winner[i] = 0;
  });
  for (int step = kTeam / 2; step > 0; step /= 2) {
    team.each([&](int thread, Own&) {
      if (thread < step && shared.distance[thread + step] < shared.distance[thread]) {
        shared.distance[thread] = shared.distance[thread + step];
        shared.nearest[thread] = shared.nearest[thread + step];
      }
    });
  }
  const double* best = colours + 3 * static_cast<int64_t>(shared.nearest[0]);
  const double best_distance = shared.distance[0];

  int kept = 0;
  for (int first = 0; first < size; first += kTeam) {
    team.each([&](int thread, Own&) {
      bool keep = false;
      if (first + thread < size) {
        const double* colour = colours + 3 * static_cast<int64_t>(first + thread);
        const double far = distance(mid_red, mid_green, mid_blue, colour);
        const double spread = std::fabs(colour[0] - best[0]) + std::fabs(colour[1] - best[1]) + std::fabs(colour[2] - best[2]);
        const double slack = 1e-13 * (far + best_distance + 1e6);
        keep = !(far - best_distance - 2 * half * spread > slack);
      }
      vote(shared.keep, thread, keep);
    });
    team.each([&](int thread, Own&) {
      if ((shared.keep[thread / 32] >> (thread % 32) & 1) == 0) return;
      const int place = kept + bits_before(shared.keep, thread);
      const double* colour = colours + 3 * static_cast<int64_t>(first + thread);
      shared.red[place] = colour[0], shared.green[place] = colour[1], shared.blue[place] = colour[2];
      shared.index[place] = first + thread;
    });
    for (int warp = 0; warp < kTeam / 32; ++warp) kept += bits_in(shared.keep[warp]);
    if (kept <= kKept - kTeam && first + kTeam < size) continue;
    team.each([&](int thread, Own& own) {
      for (int i = 0; i < kColoursPerThread; ++i) {
        const int place = thread + i * kTeam;
        const int r = red + place / (kCellSide * kCellSide), g = green + place / kCellSide % kCellSide;
        const int b = blue + place % kCellSide;
        for (int k = 0; k < kept; ++k) {
          const double colour[3] = {shared.red[k], shared.green[k], shared.blue[k]};
          const double far = distance(r, g, b, colour);
          if (far < own.least[i]) own.least[i] = far, own.winner[i] = shared.index[k];
        }
      }
    });
    kept = 0;
  }
  team.each([&](int thread, Own& own) {
    for (int i = 0; i < kColoursPerThread; ++i) {
      const int place = thread + i * kTeam;
      const int r = red + place / (kCellSide * kCellSide), g = green + place / kCellSide % kCellSide;
      table[r << 16 | g << 8 | (blue + place % kCellSide)] = static_cast<uint16_t>(own.winner[i]);
    }
  });
}

}  // namespace device
}  // namespace igpt
