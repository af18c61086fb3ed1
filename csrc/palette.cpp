#include "palette.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>

#ifdef __linux__
#include <sys/mman.h>
#endif

// The contract fixes every rounding: no wider intermediates (x87) and, by -ffp-contract=off, no fused multiply-add.
static_assert(FLT_EVAL_METHOD == 0, "the palette contract needs arithmetic in plain float64");

namespace igpt {
namespace {

constexpr int kSide = 256;      // values of a channel
constexpr int kBlockSide = 32;  // kBlocks of these fill the cube
constexpr int kLeafSide = 4;    // cells of this side are evaluated colour by colour
static_assert(kBlocks == (kSide / kBlockSide) * (kSide / kBlockSide) * (kSide / kBlockSide));

struct Cell {
  int red, green, blue, side;
};

double square(double x) { return x * x; }

void fill_cell(const Cell& cell, uint16_t index, uint16_t* table) {
  for (int r = cell.red; r < cell.red + cell.side; ++r)
    for (int g = cell.green; g < cell.green + cell.side; ++g)
      std::fill_n(table + ((r << 16) | (g << 8) | cell.blue), cell.side, index);
}

// Copies to `near` the colours of `all` that can be nearest to some colour of the cell, in the same order.
//
// Colour k cannot win if some j is strictly nearer to every colour of the cell. The difference of the two true squared
// distances is affine over the cell, so its minimum is its value at the centre less half the side times twice
// |k - j|_1. An evaluated distance is within 8 * 2^-53 of the true one, relatively; `slack` is more than thirty times what
// the roundings of two distances and of the bound can add up to, so no winner and no tie is ever dropped.
void keep_near(const Cell& cell, const Colours& all, std::vector<double>& distance, Colours& near) {
  const int64_t n = all.size();
  const double half = 0.5 * (cell.side - 1);
  const double red = cell.red + half, green = cell.green + half, blue = cell.blue + half;
  distance.resize(n);
  for (int64_t k = 0; k < n; ++k)
    distance[k] = square(red - all.red[k]) + square(green - all.green[k]) + square(blue - all.blue[k]);
  const int64_t j = std::min_element(distance.begin(), distance.end()) - distance.begin();
  const double red_j = all.red[j], green_j = all.green[j], blue_j = all.blue[j], distance_j = distance[j];

  near.resize(n);
  int64_t kept = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double spread = std::abs(all.red[k] - red_j) + std::abs(all.green[k] - green_j) + std::abs(all.blue[k] - blue_j);
    const double slack = 1e-13 * (distance[k] + distance_j + 1e6);
    const bool dropped = distance[k] - distance_j - 2 * half * spread > slack;
    near.red[kept] = all.red[k];
    near.green[kept] = all.green[k];
    near.blue[kept] = all.blue[k];
    near.index[kept] = all.index[k];
    kept += !dropped;
  }
  near.resize(kept);
}

// Evaluates the contract's expression for each colour of a leaf cell against each candidate: one plane of equal red at
// a time, two blues to a vector. (GCC does not vectorise the scalar form: 1.7 times slower over a whole table.)
void fill_leaf(const Cell& cell, const Colours& near, uint16_t* table) {
  typedef double Pair __attribute__((vector_size(2 * sizeof(double))));
  constexpr int pairs = kLeafSide / 2;
  for (int r = cell.red; r < cell.red + kLeafSide; ++r) {
    Pair least[kLeafSide][pairs], winner[kLeafSide][pairs];
    for (int g = 0; g < kLeafSide; ++g) {
      for (int b = 0; b < pairs; ++b) {
        least[g][b] = Pair{INFINITY, INFINITY};
        winner[g][b] = Pair{};
      }
    }
    for (int64_t k = 0; k < near.size(); ++k) {
      const double red = square(r - near.red[k]), index = near.index[k];
      Pair blue[pairs];
      for (int b = 0; b < pairs; ++b)
        blue[b] = Pair{square(cell.blue + 2 * b - near.blue[k]), square(cell.blue + 2 * b + 1 - near.blue[k])};
      for (int g = 0; g < kLeafSide; ++g) {
        const double red_green = red + square(cell.green + g - near.green[k]);
        for (int b = 0; b < pairs; ++b) {
          const Pair distance = red_green + blue[b];
          winner[g][b] = distance < least[g][b] ? Pair{index, index} : winner[g][b];
          least[g][b] = distance < least[g][b] ? distance : least[g][b];
        }
      }
    }
    for (int g = 0; g < kLeafSide; ++g)
      for (int b = 0; b < kLeafSide; ++b)
        table[(r << 16) | ((cell.green + g) << 8) | (cell.blue + b)] = static_cast<uint16_t>(winner[g][b / 2][b % 2]);
  }
}

struct Scratch {
  std::vector<double> distance;
  std::array<Colours, 4> near;  // one for each side from kBlockSide to kLeafSide
};
static_assert(kBlockSide >> 3 == kLeafSide);

void fill(const Cell& cell, const Colours& candidates, int level, Scratch& scratch, uint16_t* table) {
  Colours& near = scratch.near[level];
  keep_near(cell, candidates, scratch.distance, near);
  if (near.size() == 1) return fill_cell(cell, near.index[0], table);
  if (cell.side == kLeafSide) return fill_leaf(cell, near, table);
  const int half = cell.side / 2;
  for (int octant = 0; octant < 8; ++octant) {
    const Cell child{cell.red + (octant >> 2 & 1) * half, cell.green + (octant >> 1 & 1) * half,
                     cell.blue + (octant & 1) * half, half};
    fill(child, near, level + 1, scratch, table);
  }
}

// Index of the colour of a pixel whose channels lie side by side. Reads one byte beyond it.
inline uint32_t packed_colour(const uint8_t* pixel) {
  uint32_t word;
  std::memcpy(&word, pixel, sizeof(word));
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  word = __builtin_bswap32(word);
#endif
  return word >> 8;
}

inline uint32_t colour(const uint8_t* pixel, int64_t channel_stride) {
  return uint32_t{pixel[0]} << 16 | uint32_t{pixel[channel_stride]} << 8 | pixel[2 * channel_stride];
}

// A run of pixels at a constant distance.
template <class Token>
void lookup_run(const uint16_t* table, const uint8_t* data, int64_t stride, int64_t channel_stride, int64_t count,
                Token* tokens) {
  int64_t i = 0;
  if (stride == 3 && channel_stride == 1) {  // one load in place of three: twice as fast
#pragma GCC unroll 4
    for (; i < count - 1; ++i) tokens[i] = static_cast<Token>(table[packed_colour(data + 3 * i)]);
  }
  for (; i < count; ++i) tokens[i] = static_cast<Token>(table[colour(data + stride * i, channel_stride)]);
}

}  // namespace

void Colours::resize(int64_t size) {
  red.resize(size);
  green.resize(size);
  blue.resize(size);
  index.resize(size);
}

Colours distinct_colours(const double* rows, int64_t size) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  const auto row = [rows](int64_t i) { return std::array<double, 3>{rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]}; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row(a) < row(b); });
  order.erase(std::unique(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row(a) == row(b); }), order.end());
  std::sort(order.begin(), order.end());

  Colours distinct;
  distinct.resize(static_cast<int64_t>(order.size()));
  for (int64_t k = 0; k < distinct.size(); ++k) {
    distinct.red[k] = rows[3 * order[k]];
    distinct.green[k] = rows[3 * order[k] + 1];
    distinct.blue[k] = rows[3 * order[k] + 2];
    distinct.index[k] = static_cast<uint16_t>(order[k]);
  }
  return distinct;
}

void fill_block(const Colours& palette, int64_t block, uint16_t* table) {
  Scratch scratch;
  constexpr int per_axis = kSide / kBlockSide;
  const int b = static_cast<int>(block);
  fill({b / (per_axis * per_axis) * kBlockSide, b / per_axis % per_axis * kBlockSide, b % per_axis * kBlockSide, kBlockSide},
       palette, 0, scratch, table);
}

void advise_large_pages(uint16_t* table) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(table) + page - 1) & ~(page - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(table + kColours) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal costs speed only
#else
  (void)table;
#endif
}

template <class Token>
void lookup(const uint16_t* table, const Pixels& pixels, int64_t begin, int64_t end, Token* tokens) {
  const size_t last = pixels.sizes.size() - 1;
  while (begin < end) {
    int64_t row = begin / pixels.sizes[last];
    const int64_t column = begin % pixels.sizes[last];
    const int64_t count = std::min(end - begin, pixels.sizes[last] - column);
    const uint8_t* data = pixels.data + column * pixels.strides[last];
    for (size_t d = last; d-- > 0; row /= pixels.sizes[d]) data += row % pixels.sizes[d] * pixels.strides[d];
    lookup_run(table, data, pixels.strides[last], pixels.channel_stride, count, tokens + begin);
    begin += count;
  }
}

template void lookup(const uint16_t*, const Pixels&, int64_t, int64_t, uint8_t*);
template void lookup(const uint16_t*, const Pixels&, int64_t, int64_t, uint16_t*);
template void lookup(const uint16_t*, const Pixels&, int64_t, int64_t, int32_t*);
template void lookup(const uint16_t*, const Pixels&, int64_t, int64_t, int64_t*);

template <class Token>
bool decode(const uint8_t* colours, int64_t size, const Token* tokens, int64_t begin, int64_t end, int64_t run,
            uint8_t* pixels) {
  bool inside = true;
  int64_t row = begin / run, column = begin % run;
  for (int64_t i = begin; i < end; ++i) {
    const bool valid = static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) < static_cast<uint64_t>(size);
    inside &= valid;
    for (int64_t c = 0; c < 3; ++c)
      pixels[(3 * row + c) * run + column] = valid ? colours[4 * static_cast<int64_t>(tokens[i]) + c] : uint8_t{0};
    if (++column == run) column = 0, ++row;
  }
  return inside;
}

template bool decode(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, uint8_t*);
template bool decode(const uint8_t*, int64_t, const int16_t*, int64_t, int64_t, int64_t, uint8_t*);
template bool decode(const uint8_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, uint8_t*);
template bool decode(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t, uint8_t*);
template bool decode(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t, uint8_t*);

}  // namespace igpt
