// Pixels of three bytes anywhere in memory: the one description that the CPU and the CUDA lookup work from.
#pragma once

#include <cstdint>
#include <vector>

namespace igpt {

// Entries of a lookup table: one for each (r << 16) | (g << 8) | b.
constexpr int64_t kColours = int64_t{1} << 24;

// Pixel i is at the row-major position i of `sizes`; strides are in bytes.
struct Pixels {
  const uint8_t* data;
  std::vector<int64_t> sizes, strides;  // at least one dimension, none of size 0
  int64_t channel_stride;
};

// The pixels of an array of bytes with `dims` dimensions, of which `channel_dim` has size 3 and no other has size 0.
// Dimensions that follow each other in memory become one.
inline Pixels pixels_of(const uint8_t* data, const int64_t* sizes, const int64_t* strides, int64_t dims,
                        int64_t channel_dim) {
  Pixels pixels{data, {1}, {0}, strides[channel_dim]};
  for (int64_t d = 0; d < dims; ++d) {
    if (d == channel_dim || sizes[d] == 1) continue;
    if (pixels.sizes.back() == 1 || pixels.strides.back() == sizes[d] * strides[d]) {
      pixels.sizes.back() *= sizes[d];
      pixels.strides.back() = strides[d];
    } else {
      pixels.sizes.push_back(sizes[d]);
      pixels.strides.push_back(strides[d]);
    }
  }
  return pixels;
}

}  // namespace igpt
