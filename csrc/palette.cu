// Kernels around palette_device.h, and their launches.
#include <cuda_runtime.h>

#include "palette_cuda.h"
#include "palette_device.h"

namespace igpt {
namespace {

using device::Layout;
using device::View;

constexpr int kThreads = 256;
constexpr int kTeamsOfProcessor = 4;  // which leaves 64 registers a thread: left to itself, ptxas takes 40 and spills

struct Team {
  device::Own own;

  template <class Work>
  __device__ __forceinline__ void each(const Work& work) {
    work(static_cast<int>(threadIdx.x), own);
    __syncthreads();
  }
};

__global__ void __launch_bounds__(device::kTeam) palette_table_kernel(const double* colours, int size, uint16_t* table) {
  __shared__ device::Shared shared;
  Team team;
  device::fill_cell(team, shared, colours, size, static_cast<int>(blockIdx.x), table);
}

template <Layout kLayout, class Token>
__global__ void __launch_bounds__(kThreads, kTeamsOfProcessor)
    palette_lookup_kernel(const uint16_t* table, const __grid_constant__ View view, int64_t units, Token* tokens) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) device::lookup_unit<kLayout>(table, view, unit, tokens);
}

template <class Token>
__global__ void __launch_bounds__(kThreads, kTeamsOfProcessor)
    palette_decode_kernel(const uint32_t* colours, int64_t size, const Token* tokens, int64_t count, int64_t run,
                          int64_t units, uint8_t* pixels, int32_t* beyond) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit < units) device::decode_unit(colours, size, tokens, count, run, unit, pixels, beyond);
}

const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

unsigned blocks(int64_t units) { return static_cast<unsigned>((units + kThreads - 1) / kThreads); }

template <class Token>
void lookup(cudaStream_t stream, const uint16_t* table, const View& view, Token* tokens) {
  const int64_t units = device::lookup_units(view);
  const auto launch = [&](auto kernel) { kernel<<<blocks(units), kThreads, 0, stream>>>(table, view, units, tokens); };
  switch (device::layout_of(view)) {
    case device::kPacked: return launch(palette_lookup_kernel<device::kPacked, Token>);
    case device::kPlanar: return launch(palette_lookup_kernel<device::kPlanar, Token>);
    case device::kStrided: return launch(palette_lookup_kernel<device::kStrided, Token>);
  }
}

template <class Token>
void decode(cudaStream_t stream, const uint32_t* colours, int64_t size, const Token* tokens, int64_t count, int64_t run,
            uint8_t* pixels, int32_t* beyond) {
  const int64_t units = device::decode_units(count, run);
  palette_decode_kernel<<<blocks(units), kThreads, 0, stream>>>(colours, size, tokens, count, run, units, pixels, beyond);
}

}  // namespace

// This library has the runtime inside, a copy of its own; so torch's current device must be made current here too.

const char* launch_table(int device, void* stream, const double* colours, int64_t size, uint16_t* table) {
  if (const char* problem = words(cudaSetDevice(device))) return problem;
  palette_table_kernel<<<device::kCells, device::kTeam, 0, static_cast<cudaStream_t>(stream)>>>(
      colours, static_cast<int>(size), table);
  return words(cudaGetLastError());
}

const char* launch_lookup(int device, void* stream, const uint16_t* table, const Pixels& pixels, int token_bytes,
                          void* tokens) {
  if (const char* problem = words(cudaSetDevice(device))) return problem;
  const View view = device::view_of(pixels);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (token_bytes) {
    case 1: lookup(on, table, view, static_cast<uint8_t*>(tokens)); break;
    case 2: lookup(on, table, view, static_cast<uint16_t*>(tokens)); break;
    case 4: lookup(on, table, view, static_cast<int32_t*>(tokens)); break;
    default: lookup(on, table, view, static_cast<int64_t*>(tokens));
  }
  return words(cudaGetLastError());
}

const char* launch_decode(int device, void* stream, const uint32_t* colours, int64_t size, int token_bytes,
                          bool token_signed, const void* tokens, int64_t count, int64_t run, uint8_t* pixels,
                          int32_t* beyond) {
  if (const char* problem = words(cudaSetDevice(device))) return problem;
  const auto launch = [&](auto* typed) {
    decode(static_cast<cudaStream_t>(stream), colours, size, typed, count, run, pixels, beyond);
  };
  switch (token_bytes) {
    case 1: launch(static_cast<const uint8_t*>(tokens)); break;
    case 2: token_signed ? launch(static_cast<const int16_t*>(tokens)) : launch(static_cast<const uint16_t*>(tokens)); break;
    case 4: launch(static_cast<const int32_t*>(tokens)); break;
    default: launch(static_cast<const int64_t*>(tokens));
  }
  return words(cudaGetLastError());
}

}  // namespace igpt
