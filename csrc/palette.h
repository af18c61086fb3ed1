// Exact nearest palette colour for every 24-bit colour: table construction and lookup, on raw pointers.
//
// The answer for the colour (r, g, b) is the entry (R, G, B) with the least (r-R)^2 + (g-G)^2 + (b-B)^2, evaluated in
// float64 in exactly that order; of equal distances the lowest index wins. Threads are the caller's: every function
// here does the part of the work it is told to do.
#pragma once

#include <cstdint>
#include <vector>

#include "pixels.h"

namespace igpt {

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

// tokens[i] = table[colour of pixel i] for begin <= i < end; an index that does not fit a Token is cut off.
template <class Token>
void lookup(const uint16_t* table, const Pixels& pixels, int64_t begin, int64_t end, Token* tokens);

// The colours of tokens[i] for begin <= i < end, written to an array of bytes [rows, 3, run]: run = 1 is channels last.
// `colours` holds `size` colours of four bytes, of which the first three count. A token that is not in 0..size-1 becomes
// black; the result is whether there was none.
template <class Token>
bool decode(const uint8_t* colours, int64_t size, const Token* tokens, int64_t begin, int64_t end, int64_t run,
            uint8_t* pixels);

}  // namespace igpt
