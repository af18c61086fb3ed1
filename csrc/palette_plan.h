// What is settled before a GPU thread starts: the form of its arguments, and how the work is cut into units. Plain C++.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace igpt {
namespace device {

constexpr int kUnit = 16;     // pixels of one thread: 48 bytes, three loads of 16; and 16 table reads in flight
constexpr int kMaxDims = 64;  // torch has no tensor of more

enum Layout { kPacked, kPlanar, kStrided };  // r g b r g b ..., r r r ... g g g ... b b b ..., anything else

// igpt::Pixels in the form of an argument of a kernel. The last dimension, a run of `run` pixels, stands apart.
struct View {
  const uint8_t* data;
  int64_t run, stride, channel_stride;
  int32_t dims;  // the others
  int64_t sizes[kMaxDims], strides[kMaxDims];
};

inline View view_of(const Pixels& pixels) {
  View view{};
  view.data = pixels.data;
  view.run = pixels.sizes.back();
  view.stride = pixels.strides.back();
  view.channel_stride = pixels.channel_stride;
  view.dims = static_cast<int32_t>(pixels.sizes.size()) - 1;
  for (int32_t d = 0; d < view.dims; ++d) view.sizes[d] = pixels.sizes[d], view.strides[d] = pixels.strides[d];
  return view;
}

inline Layout layout_of(const View& view) {
  if (view.stride == 3 && view.channel_stride == 1) return kPacked;
  return view.stride == 1 ? kPlanar : kStrided;
}

inline int64_t pieces(int64_t run) { return (run + kUnit - 1) / kUnit; }

// A unit is kUnit neighbours of a run, or one pixel where the layout is kStrided.
inline int64_t lookup_units(const View& view) {
  int64_t rows = 1;
  for (int32_t d = 0; d < view.dims; ++d) rows *= view.sizes[d];
  return rows * (layout_of(view) == kStrided ? view.run : pieces(view.run));
}

// With channels last (run = 1) all `count` pixels are one run.
inline int64_t decode_units(int64_t count, int64_t run) { return run == 1 ? pieces(count) : count / run * pieces(run); }

}  // namespace device
}  // namespace igpt
