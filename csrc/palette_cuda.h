// palette.h's work on a GPU: launches on raw device pointers, no framework and no CUDA header.
//
// Every function launches one kernel on `stream` (a cudaStream_t) of device `device`, which becomes the calling thread's
// current one, and returns at once: nullptr, or the runtime's words for what is wrong.
#pragma once

#include <cstdint>

#include "pixels.h"

namespace igpt {

// The table of the float64 colours [size, 3], 1 <= size <= 65536: the same bits as fill_block gives.
const char* launch_table(int device, void* stream, const double* colours, int64_t size, uint16_t* table);

// tokens[i] = table[colour of pixel i], `token_bytes` (1, 2, 4 or 8) each; at least one pixel.
const char* launch_lookup(int device, void* stream, const uint16_t* table, const Pixels& pixels, int token_bytes,
                          void* tokens);

// decode of `count` >= 1 tokens of 1 (unsigned), 2 (`token_signed` tells), 4 or 8 bytes (signed).
// `beyond` becomes 1 if a token is not in 0..size-1, and is left alone if not.
const char* launch_decode(int device, void* stream, const uint32_t* colours, int64_t size, int token_bytes,
                          bool token_signed, const void* tokens, int64_t count, int64_t run, uint8_t* pixels,
                          int32_t* beyond);

}  // namespace igpt
