// The CUDA operators, on the LibTorch stable ABI. The schemas are in binding_cpu.cpp, whose library is loaded first.
//
// libtorch_cuda is not linked, only asked for its current stream when it is there: so this file loads, and can be looked
// at, with a torch that has no CUDA, and needs no CUDA torch to be built.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "palette_cuda.h"
#include "palette_plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch gave no current stream of the device");
  return stream;
}

void check_launch(const char* problem) { STD_TORCH_CHECK(problem == nullptr, "the kernel was not launched: ", problem); }

bool is_on(const Tensor& tensor, int32_t device) { return tensor.is_cuda() && tensor.get_device_index() == device; }

Tensor palette_table(const Tensor& colors) {
  STD_TORCH_CHECK(colors.is_cuda() && colors.scalar_type() == ScalarType::Double && colors.is_contiguous() &&
                      colors.dim() == 2 && colors.size(1) == 3 && colors.size(0) >= 1 && colors.size(0) <= 65536,
                  "colors must be a contiguous float64 CUDA tensor [V, 3] with 1 <= V <= 65536");
  const int32_t device = colors.get_device_index();
  const DeviceGuard guard(device);
  Tensor table = torch::stable::new_empty(colors, {igpt::kColours}, ScalarType::UInt16);
  check_launch(igpt::launch_table(device, current_stream(device), static_cast<const double*>(colors.const_data_ptr()),
                                  colors.size(0), static_cast<uint16_t*>(table.mutable_data_ptr())));
  return table;
}

int bytes_of(const Tensor& tokens) {
  switch (tokens.scalar_type()) {
    case ScalarType::Byte: return 1;
    case ScalarType::Short:
    case ScalarType::UInt16: return 2;
    case ScalarType::Int: return 4;
    case ScalarType::Long: return 8;
    default: STD_TORCH_CHECK(false, "tokens must be uint8, int16, uint16, int32 or int64");
  }
}

void palette_lookup(const Tensor& table, const Tensor& pixels, int64_t channel_dim, const Tensor& tokens) {
  STD_TORCH_CHECK(pixels.is_cuda() && pixels.scalar_type() == ScalarType::Byte && channel_dim >= 0 &&
                      channel_dim < pixels.dim() && pixels.dim() <= igpt::device::kMaxDims && pixels.size(channel_dim) == 3,
                  "pixels must be a uint8 CUDA tensor whose dimension channel_dim has size 3");
  const int32_t device = pixels.get_device_index();
  STD_TORCH_CHECK(is_on(table, device) && table.scalar_type() == ScalarType::UInt16 && table.is_contiguous() &&
                      table.numel() == igpt::kColours,
                  "table must be a contiguous uint16 tensor of 2^24 entries on the device of pixels");
  STD_TORCH_CHECK(is_on(tokens, device) && tokens.is_contiguous() && tokens.numel() == pixels.numel() / 3,
                  "tokens must be a contiguous tensor with one element for each pixel, on the device of pixels");
  const int bytes = bytes_of(tokens);
  if (tokens.numel() == 0) return;
  const DeviceGuard guard(device);
  const igpt::Pixels view =
      igpt::pixels_of(static_cast<const uint8_t*>(pixels.const_data_ptr()), pixels.sizes().data(),
                      pixels.strides().data(), pixels.dim(), channel_dim);
  check_launch(igpt::launch_lookup(device, current_stream(device), static_cast<const uint16_t*>(table.const_data_ptr()),
                                   view, bytes, tokens.mutable_data_ptr()));
}

void palette_pixels(const Tensor& colors, const Tensor& tokens, int64_t run, const Tensor& pixels, const Tensor& beyond) {
  STD_TORCH_CHECK(tokens.is_cuda() && tokens.is_contiguous() && run >= 1 && tokens.numel() % run == 0,
                  "tokens must be a contiguous CUDA tensor, of a multiple of run elements");
  const int32_t device = tokens.get_device_index();
  STD_TORCH_CHECK(is_on(colors, device) && colors.scalar_type() == ScalarType::Byte && colors.is_contiguous() &&
                      colors.dim() == 2 && colors.size(1) == 4 &&
                      reinterpret_cast<uintptr_t>(colors.const_data_ptr()) % 4 == 0,
                  "colors must be a contiguous uint8 tensor [V, 4] on the device of tokens");
  STD_TORCH_CHECK(is_on(pixels, device) && pixels.scalar_type() == ScalarType::Byte && pixels.is_contiguous() &&
                      pixels.numel() == 3 * tokens.numel(),
                  "pixels must be a contiguous uint8 tensor of three elements for each token, on the device of tokens");
  STD_TORCH_CHECK(is_on(beyond, device) && beyond.scalar_type() == ScalarType::Int && beyond.numel() == 1,
                  "beyond must be one int32 on the device of tokens");
  const int bytes = bytes_of(tokens);
  if (tokens.numel() == 0) return;
  const DeviceGuard guard(device);
  check_launch(igpt::launch_decode(
      device, current_stream(device), static_cast<const uint32_t*>(colors.const_data_ptr()), colors.size(0), bytes,
      tokens.scalar_type() == ScalarType::Short, tokens.const_data_ptr(), tokens.numel(), run,
      static_cast<uint8_t*>(pixels.mutable_data_ptr()), static_cast<int32_t*>(beyond.mutable_data_ptr())));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(igpt_kernels, CUDA, m) {
  m.impl("palette_table", TORCH_BOX(&palette_table));
  m.impl("palette_lookup", TORCH_BOX(&palette_lookup));
  m.impl("palette_pixels", TORCH_BOX(&palette_pixels));
}
