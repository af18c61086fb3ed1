// Random palettes, pixels and tokens through the C++ of csrc/, and through the code of the GPU threads, one thread after
// another. Each answer is compared with three plain lines; buffers are exactly as long as what may be touched, so with
// -fsanitize=address,undefined a read or write outside is found too. Arguments: seconds, first seed. The same seed does
// the same again, alone with 0 seconds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/palette.h"
#include "../../csrc/palette_device.h"

namespace {

uint64_t seed = 0;
std::mt19937_64 generator;

int64_t pick(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

[[noreturn]] void fail(const char* what, int64_t place) {
  std::printf("seed %llu: %s is wrong at %lld\n", static_cast<unsigned long long>(seed), what, static_cast<long long>(place));
  std::exit(1);
}

// `size` bytes that end where the allocation ends, `ahead` bytes after an address that is a multiple of 16.
class Buffer {
 public:
  Buffer(int64_t size, int64_t ahead) : memory_(static_cast<uint8_t*>(std::malloc(size + ahead))), data_(memory_.get() + ahead) {
    for (int64_t i = 0; i < ahead; ++i) memory_.get()[i] = 0xA5;
    for (int64_t i = 0; i < size; ++i) data_[i] = static_cast<uint8_t>(generator());
    ahead_ = ahead;
  }
  uint8_t* data() { return data_; }
  void check(const char* what) const {
    for (int64_t i = 0; i < ahead_; ++i)
      if (memory_.get()[i] != 0xA5) fail(what, i - ahead_);
  }

 private:
  struct Free {
    void operator()(uint8_t* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  uint8_t* data_;
  int64_t ahead_;
};

// A tensor of bytes with one dimension of size 3, its dimensions in any order of memory, with gaps or without.
struct Array {
  std::vector<int64_t> sizes, strides;
  int64_t channel_dim, extent = 1;

  Array() {
    const int64_t dims = pick(1, 5);
    channel_dim = pick(0, dims - 1);
    if (pick(0, 1)) channel_dim = dims - 1;
    const int64_t longest[] = {400, 400, 40, 12, 6, 4};
    for (int64_t d = 0; d < dims; ++d) sizes.push_back(d == channel_dim ? 3 : pick(1, longest[dims]));
    std::vector<int64_t> order;
    for (int64_t d = dims; d-- > 0;) order.push_back(d);
    if (pick(0, 2) == 0) std::shuffle(order.begin(), order.end(), generator);
    strides.resize(dims);
    int64_t next = 1;
    for (const int64_t d : order) {
      if (pick(0, 8) == 0) next += pick(1, 20);
      strides[d] = next;
      if (pick(0, 20) == 0) strides[d] = pick(0, 2);  // expanded, overlapping
      next = std::max(next, strides[d] * sizes[d]);
    }
    for (int64_t d = 0; d < dims; ++d) extent += (sizes[d] - 1) * strides[d];
  }
  int64_t pixels() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count / 3;
  }
  int64_t offset(int64_t pixel, int64_t channel) const {
    int64_t at = channel * strides[channel_dim];
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
      if (d == channel_dim) continue;
      at += pixel % sizes[d] * strides[d];
      pixel /= sizes[d];
    }
    return at;
  }
};

using igpt::device::Layout;
using igpt::device::View;

template <class Token>
void emulate_lookup(Layout layout, const uint16_t* table, const View& view, Token* tokens) {
  int64_t units = igpt::device::lookup_units(view);
  if (layout == igpt::device::kStrided) {
    units = view.run;
    for (int d = 0; d < view.dims; ++d) units *= view.sizes[d];
  }
  for (int64_t unit = units; unit-- > 0;) {
    switch (layout) {
      case igpt::device::kPacked: igpt::device::lookup_unit<igpt::device::kPacked>(table, view, unit, tokens); break;
      case igpt::device::kPlanar: igpt::device::lookup_unit<igpt::device::kPlanar>(table, view, unit, tokens); break;
      case igpt::device::kStrided: igpt::device::lookup_unit<igpt::device::kStrided>(table, view, unit, tokens);
    }
  }
}

template <class Token>
void check_lookup(const uint16_t* table) {
  const Array array;
  Buffer memory(array.extent, pick(0, 16));
  const uint8_t* data = memory.data();
  const int64_t count = array.pixels();
  const igpt::Pixels pixels = igpt::pixels_of(data, array.sizes.data(), array.strides.data(),
                                              static_cast<int64_t>(array.sizes.size()), array.channel_dim);
  std::vector<Token> wanted(count);
  for (int64_t i = 0; i < count; ++i) {
    const auto channel = [&](int64_t c) { return uint32_t{data[array.offset(i, c)]}; };
    wanted[i] = static_cast<Token>(table[channel(0) << 16 | channel(1) << 8 | channel(2)]);
  }
  const View view = igpt::device::view_of(pixels);
  for (const int path : {0, 1, 2}) {
    Buffer tokens(count * static_cast<int64_t>(sizeof(Token)), static_cast<int64_t>(sizeof(Token)) * pick(0, 16));
    auto* out = reinterpret_cast<Token*>(tokens.data());
    if (path == 0) {
      const int64_t cut = pick(0, count);
      igpt::lookup(table, pixels, cut, count, out);
      igpt::lookup(table, pixels, 0, cut, out);
    } else {
      emulate_lookup(path == 1 ? igpt::device::layout_of(view) : igpt::device::kStrided, table, view, out);
    }
    for (int64_t i = 0; i < count; ++i)
      if (out[i] != wanted[i]) fail(path == 0 ? "lookup" : path == 1 ? "lookup_unit" : "lookup_unit<kStrided>", i);
    tokens.check("memory before the tokens");
  }
}

template <class Token>
void check_decode() {
  const int64_t most = sizeof(Token) == 1 ? 256 : sizeof(Token) == 2 ? 32768 : 65536;
  const int64_t size = pick(0, 2) ? pick(1, std::min<int64_t>(most, 600)) : most;
  const int64_t rows = pick(1, 5), run = pick(0, 1) ? 1 : pick(1, 300);
  const int64_t count = rows * run * (run == 1 ? pick(1, 100) : 1);
  Buffer colours(4 * size, 0), memory(count * static_cast<int64_t>(sizeof(Token)), static_cast<int64_t>(sizeof(Token)) * pick(0, 16));
  auto* tokens = reinterpret_cast<Token*>(memory.data());
  for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<Token>(pick(0, size - 1));
  bool valid = true;
  if (pick(0, 3) == 0) {
    const int64_t place = pick(0, count - 1), value = pick(0, 1) ? size : -1;
    tokens[place] = static_cast<Token>(value);
    valid = static_cast<int64_t>(tokens[place]) >= 0 && static_cast<int64_t>(tokens[place]) < size;
  }
  for (const bool emulated : {false, true}) {
    Buffer pixels(3 * count, pick(0, 16));
    bool found_valid = true;
    if (emulated) {
      int32_t beyond = 0;
      for (int64_t unit = igpt::device::decode_units(count, run); unit-- > 0;)
        igpt::device::decode_unit(reinterpret_cast<const uint32_t*>(colours.data()), size, tokens, count, run, unit,
                                  pixels.data(), &beyond);
      found_valid = beyond == 0;
    } else {
      const int64_t cut = pick(0, count);
      found_valid = igpt::decode(colours.data(), size, tokens, 0, cut, run, pixels.data());
      found_valid &= igpt::decode(colours.data(), size, tokens, cut, count, run, pixels.data());
    }
    const char* name = emulated ? "decode_unit" : "decode";
    if (found_valid != valid) fail(name, -1);
    for (int64_t i = 0; i < count; ++i) {
      const auto token = static_cast<int64_t>(tokens[i]);
      for (int64_t c = 0; c < 3; ++c) {
        const uint8_t wanted = token >= 0 && token < size ? colours.data()[4 * token + c] : 0;
        if (pixels.data()[(i / run * 3 + c) * run + i % run] != wanted) fail(name, i);
      }
    }
    pixels.check("memory before the pixels");
  }
}

struct Team {
  igpt::device::Own own[igpt::device::kTeam];

  template <class Work>
  void each(const Work& work) {
    for (int thread = 0; thread < igpt::device::kTeam; ++thread) work(thread, own[thread]);
  }
};

std::vector<double> random_palette() {
  const int64_t sizes[] = {1, 2, 3, 16, 100, 255, 256, 257, 512, 513, 2048, 5000};
  const int64_t size = sizes[pick(0, 11)], kind = pick(0, 6);
  std::vector<double> rows(3 * size);
  const double low = kind == 1 ? -300 : 0, high = kind == 1 ? 600 : 255;
  for (double& value : rows) {
    value = std::uniform_real_distribution<double>(low, high)(generator);
    if (kind != 0) value = std::round(value * 65536) / 65536;
    if (kind == 2) value = std::round(value / 15) * 15;         // many ties, many equal rows
    if (kind == 3) value = 100 + std::round(value) / 64;        // all near one place
  }
  if (kind == 5) {  // equal distances to one grey, of which roundings in the order of the contract choose one
    const double grey = static_cast<double>(pick(1, 254));
    double step[3];
    for (double& value : step) value = static_cast<double>(pick(1, 1 << 30)) / (1 << 30);
    for (int64_t k = 0; k < size; ++k) {
      std::shuffle(step, step + 3, generator);
      for (int c = 0; c < 3; ++c) rows[3 * k + c] = grey + (pick(0, 1) ? step[c] : -step[c]);
    }
  }
  for (int64_t k = 0; kind == 4 && k < size; ++k) rows[3 * k] = rows[3 * k + 1] = rows[3 * k + 2];  // on a line
  return rows;
}

int64_t brute(const std::vector<double>& rows, int r, int g, int b) {
  double least = INFINITY;
  int64_t winner = 0;
  for (size_t k = 0; k < rows.size() / 3; ++k) {
    const double dr = r - rows[3 * k], dg = g - rows[3 * k + 1], db = b - rows[3 * k + 2];
    const double far = (dr * dr + dg * dg) + db * db;
    if (far < least) least = far, winner = static_cast<int64_t>(k);
  }
  return winner;
}

void check_table(std::vector<uint16_t>& table, std::vector<uint16_t>& other) {
  const std::vector<double> rows = random_palette();
  const auto size = static_cast<int64_t>(rows.size() / 3);
  const igpt::Colours palette = igpt::distinct_colours(rows.data(), size);
  int near[3];  // a place, as often as not near a colour of the palette
  for (int c = 0; c < 3; ++c) near[c] = static_cast<int>(std::min(255.0, std::max(0.0, std::round(rows[c]))));
  if (pick(0, 1)) for (int& value : near) value = static_cast<int>(pick(0, 255));
  const int block = near[0] / 32 * 64 + near[1] / 32 * 8 + near[2] / 32;
  igpt::fill_block(palette, block, table.data());
  const int axis = igpt::device::kCellsPerAxis, side = igpt::device::kCellSide;
  auto shared = std::make_unique<igpt::device::Shared>();
  auto team = std::make_unique<Team>();
  for (int trial = 0; trial < 8; ++trial) {
    int at[3];
    for (int c = 0; c < 3; ++c)
      at[c] = trial == 0 ? near[c] / side * side : near[c] / 32 * 32 + static_cast<int>(pick(0, 32 / side - 1)) * side;
    const int cell = (at[0] / side * axis + at[1] / side) * axis + at[2] / side;
    igpt::device::fill_cell(*team, *shared, rows.data(), static_cast<int>(size), cell, other.data());
    for (int i = 0; i < side * side * side; ++i) {
      const int r = at[0] + i / (side * side), g = at[1] + i / side % side, b = at[2] + i % side;
      const int place = r << 16 | g << 8 | b;
      if (table[place] != other[place]) fail("fill_cell against fill_block", place);
      if (i % 61 == trial && table[place] != brute(rows, r, g, b)) fail("fill_block", place);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 1;
  seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::vector<uint16_t> table(igpt::kColours), other(igpt::kColours), entries(igpt::kColours);
  for (int64_t i = 0; i < igpt::kColours; ++i) entries[i] = static_cast<uint16_t>(i * 0x9E3779B1u >> 13);
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  do {
    generator.seed(seed);
    for (int i = 0; i < 4; ++i) {
      check_lookup<uint8_t>(entries.data());
      check_lookup<uint16_t>(entries.data());
      check_lookup<int32_t>(entries.data());
      check_lookup<int64_t>(entries.data());
      check_decode<uint8_t>();
      check_decode<int16_t>();
      check_decode<uint16_t>();
      check_decode<int32_t>();
      check_decode<int64_t>();
    }
    check_table(table, other);
    ++rounds, ++seed;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%lld rounds, nothing wrong\n", static_cast<long long>(rounds));
  return 0;
}
