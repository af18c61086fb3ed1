// The CPU operators, on the LibTorch stable ABI: one library serves torch 2.10 and every later release.
//
// Checks here guard memory only; arguments of users are checked, with better words, in igpt_kernels/palette.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

#include "palette.h"
#include "share.h"

namespace {

using igpt::share;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kShare = 32768;  // pixels: some 40 us of work, enough to repay the start of a thread

Tensor palette_table(const Tensor& colors) {
  STD_TORCH_CHECK(colors.is_cpu() && colors.scalar_type() == ScalarType::Double && colors.is_contiguous() &&
                      colors.dim() == 2 && colors.size(1) == 3 && colors.size(0) >= 1 && colors.size(0) <= 65536,
                  "colors must be a contiguous float64 CPU tensor [V, 3] with 1 <= V <= 65536");
  Tensor table = torch::stable::new_empty(colors, {igpt::kColours}, ScalarType::UInt16);
  auto* entries = static_cast<uint16_t*>(table.mutable_data_ptr());
  igpt::advise_large_pages(entries);
  const igpt::Colours palette = igpt::distinct_colours(static_cast<const double*>(colors.const_data_ptr()), colors.size(0));
  share(igpt::kBlocks, [&](int64_t block) { igpt::fill_block(palette, block, entries); });
  return table;
}

template <class Token>
void lookup_all(const Tensor& table, const igpt::Pixels& pixels, const Tensor& tokens) {
  const auto* entries = static_cast<const uint16_t*>(table.const_data_ptr());
  auto* out = static_cast<Token*>(tokens.mutable_data_ptr());
  const int64_t count = tokens.numel();
  share((count + kShare - 1) / kShare, [&](int64_t i) {
    igpt::lookup(entries, pixels, i * kShare, std::min(count, (i + 1) * kShare), out);
  });
}

void palette_lookup(const Tensor& table, const Tensor& pixels, int64_t channel_dim, const Tensor& tokens) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::UInt16 && table.is_contiguous() &&
                      table.numel() == igpt::kColours,
                  "table must be a contiguous uint16 CPU tensor of 2^24 entries");
  STD_TORCH_CHECK(pixels.is_cpu() && pixels.scalar_type() == ScalarType::Byte && channel_dim >= 0 &&
                      channel_dim < pixels.dim() && pixels.size(channel_dim) == 3,
                  "pixels must be a uint8 CPU tensor whose dimension channel_dim has size 3");
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.is_contiguous() && tokens.numel() == pixels.numel() / 3,
                  "tokens must be a contiguous CPU tensor with one element for each pixel");
  if (tokens.numel() == 0) return;
  const igpt::Pixels view =
      igpt::pixels_of(static_cast<const uint8_t*>(pixels.const_data_ptr()), pixels.sizes().data(),
                      pixels.strides().data(), pixels.dim(), channel_dim);
  switch (tokens.scalar_type()) {
    case ScalarType::Byte: return lookup_all<uint8_t>(table, view, tokens);
    case ScalarType::Short:
    case ScalarType::UInt16: return lookup_all<uint16_t>(table, view, tokens);
    case ScalarType::Int: return lookup_all<int32_t>(table, view, tokens);
    case ScalarType::Long: return lookup_all<int64_t>(table, view, tokens);
    default: STD_TORCH_CHECK(false, "tokens must be uint8, int16, uint16, int32 or int64");
  }
}

template <class Token>
bool decode_all(const Tensor& colors, const Tensor& tokens, int64_t run, const Tensor& pixels) {
  const auto* colours = static_cast<const uint8_t*>(colors.const_data_ptr());
  const auto* from = static_cast<const Token*>(tokens.const_data_ptr());
  auto* out = static_cast<uint8_t*>(pixels.mutable_data_ptr());
  const int64_t count = tokens.numel();
  std::atomic<bool> inside{true};
  share((count + kShare - 1) / kShare, [&](int64_t i) {
    if (!igpt::decode(colours, colors.size(0), from, i * kShare, std::min(count, (i + 1) * kShare), run, out)) inside = false;
  });
  return inside;
}

void palette_pixels(const Tensor& colors, const Tensor& tokens, int64_t run, const Tensor& pixels, const Tensor& beyond) {
  STD_TORCH_CHECK(tokens.is_cpu() && tokens.is_contiguous() && run >= 1 && tokens.numel() % run == 0,
                  "tokens must be a contiguous CPU tensor, of a multiple of run elements");
  STD_TORCH_CHECK(colors.is_cpu() && colors.scalar_type() == ScalarType::Byte && colors.is_contiguous() &&
                      colors.dim() == 2 && colors.size(1) == 4,
                  "colors must be a contiguous uint8 CPU tensor [V, 4]");
  STD_TORCH_CHECK(pixels.is_cpu() && pixels.scalar_type() == ScalarType::Byte && pixels.is_contiguous() &&
                      pixels.numel() == 3 * tokens.numel(),
                  "pixels must be a contiguous uint8 CPU tensor of three elements for each token");
  STD_TORCH_CHECK(beyond.is_cpu() && beyond.scalar_type() == ScalarType::Int && beyond.numel() == 1,
                  "beyond must be one int32 on the CPU");
  bool inside = true;
  switch (tokens.scalar_type()) {
    case ScalarType::Byte: inside = decode_all<uint8_t>(colors, tokens, run, pixels); break;
    case ScalarType::Short: inside = decode_all<int16_t>(colors, tokens, run, pixels); break;
    case ScalarType::UInt16: inside = decode_all<uint16_t>(colors, tokens, run, pixels); break;
    case ScalarType::Int: inside = decode_all<int32_t>(colors, tokens, run, pixels); break;
    case ScalarType::Long: inside = decode_all<int64_t>(colors, tokens, run, pixels); break;
    default: STD_TORCH_CHECK(false, "tokens must be uint8, int16, uint16, int32 or int64");
  }
  if (!inside) *static_cast<int32_t*>(beyond.mutable_data_ptr()) = 1;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(igpt_kernels, m) {
  m.def("palette_table(Tensor colors) -> Tensor");
  m.def("palette_lookup(Tensor table, Tensor pixels, int channel_dim, Tensor(a!) tokens) -> ()");
  m.def("palette_pixels(Tensor colors, Tensor tokens, int run, Tensor(a!) pixels, Tensor(b!) beyond) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(igpt_kernels, CPU, m) {
  m.impl("palette_table", TORCH_BOX(&palette_table));
  m.impl("palette_lookup", TORCH_BOX(&palette_lookup));
  m.impl("palette_pixels", TORCH_BOX(&palette_pixels));
}
