// Exact nearest palette colour for every 24-bit colour: table construction and lookup, on raw pointers.
//
// The answer for the colour (r, g, b) is the entry (R, G, B) with the least (r-R)^2 + (g-G)^2 + (b-B)^2, evaluated in
// float64 in exactly that order; of equal distances the lowest index wins. Threads are the caller's: every function
// here does the part of the work it is told to do.
#pragma once

#include <cstdint>
#include <vector>

namespace igpt {

// Entries of a lookup table: one for each (r << 16) | (g << 8) | b.
constexpr int64_t kColours = int64_t{1} << 24;

// The colour cube is filled in this many equal blocks, each by one call of `fill_block`.
constexpr int64_t kBlocks = 512;

// Colours in structure-of-arrays form, ascending by `index` (their place in the palette).
struct Colours {
  std::vector<double> red, green, blue;
  std::vector<uint16_t> index;

  int64_t size() const { return static_cast<int64_t>(index.size()); }
  void resize(int64_t size);
};

// The distinct colours among `size` rows of three; of equal rows the first is kept, because it wins every tie.
Colours distinct_colours(const double* rows, int64_t size);

// Writes the 2^15 table entries of one block of the colour cube, 0 <= block < kBlocks.
void fill_block(const Colours& palette, int64_t block, uint16_t* table);

// Asks the system for large pages behind a table that is not yet written: random reads then miss the TLB less.
void advise_large_pages(uint16_t* table);

// Pixels of three bytes anywhere in memory. Pixel i is at the row-major position i of `sizes`; strides are in bytes.
struct Pixels {
  const uint8_t* data;
  std::vector<int64_t> sizes, strides;  // at least one dimension, none of size 0
  int64_t channel_stride;
};

// The pixels of an array of bytes with `dims` dimensions, of which `channel_dim` has size 3 and no other has size 0.
// Dimensions that follow each other in memory become one.
Pixels pixels_of(const uint8_t* data, const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t channel_dim);

// tokens[i] = table[colour of pixel i] for begin <= i < end; an index that does not fit a Token is cut off.
template <class Token>
void lookup(const uint16_t* table, const Pixels& pixels, int64_t begin, int64_t end, Token* tokens);

}  // namespace igpt
