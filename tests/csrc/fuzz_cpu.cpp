// Random rows of logits, values to be multiplied, and random caches through the CPU kernels of csrc/cpu, those of every instruction set that this
// machine has. Each answer is compared with plain lines in double; buffers are exactly as long as what may be touched, so with
// -fsanitize=address,undefined a read or write outside is found too. Arguments: seconds, first seed. The same seed does the
// same again, alone with 0 seconds.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

using igpt::cpu::Decode;
using igpt::cpu::Kernels;
using igpt::cpu::Loss;
using igpt::cpu::Type;

uint64_t seed = 0;
std::mt19937_64 generator;

int64_t pick(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
double normal(double deviation) { return std::normal_distribution<double>(0.0, deviation)(generator); }

[[noreturn]] void fail(const std::string& what, int64_t place, double got, double want) {
  std::printf("seed %llu: %s is wrong at %lld: %g, not %g\n", static_cast<unsigned long long>(seed), what.c_str(),
              static_cast<long long>(place), got, want);
  std::exit(1);
}

void compare(const std::string& what, int64_t place, double got, double want, double allowed) {
  const bool right = std::isnan(want) ? std::isnan(got) : got == want || std::abs(got - want) <= allowed;
  if (!right) fail(what, place, got, want);
}

// The value of a float, bfloat16 or half, and the nearest of them: one bit after another, unlike what is tested.
double value_of(Type type, const uint8_t* at) {
  if (type == Type::kFloat) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const int fraction_bits = type == Type::kHalf ? 10 : 7, bias = type == Type::kHalf ? 15 : 127;
  const int exponent = (bits & 0x7FFF) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const int top = type == Type::kHalf ? 31 : 255;
  double x = exponent == top ? (fraction ? NAN : INFINITY)
             : exponent      ? std::ldexp(1.0 + std::ldexp(fraction, -fraction_bits), exponent - bias)
                             : std::ldexp(fraction, 1 - bias - fraction_bits);
  return bits & 0x8000 ? -x : x;
}

// The nearest value of the type, of two the even one.
double nearest(Type type, double x) {
  if (type == Type::kFloat || x == 0.0 || !std::isfinite(x)) return x;
  const int digits = type == Type::kHalf ? 11 : 8, least = type == Type::kHalf ? -14 : -126, most = type == Type::kHalf ? 16 : 128;
  const int last = std::max(std::ilogb(x), least) + 1 - digits;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::abs(y) < std::ldexp(1.0, most) ? y : std::copysign(INFINITY, x);
}

int size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// What rounding to the type may cost.
double unit(Type type, double x) {
  if (type == Type::kFloat) return 0.0;
  return std::max(std::abs(x) * (type == Type::kHalf ? 0x1p-11 : 0x1p-8), type == Type::kHalf ? 0x1p-25 : 0x1p-133);
}

// `count` values that end where their allocation ends.
class Values {
 public:
  Values(Type type, int64_t count, double deviation) : type_(type), memory_(static_cast<uint8_t*>(std::malloc(count * size_of(type)))) {
    for (int64_t i = 0; i < count; ++i) set(i, normal(deviation));
  }
  Values(const Values&) = delete;
  ~Values() { std::free(memory_); }
  void set(int64_t i, double x) {  // not to the nearest: any near value will do
    const float narrow = static_cast<float>(x);
    uint8_t* to = memory_ + i * size_of(type_);
    if (type_ == Type::kFloat) {
      std::memcpy(to, &narrow, 4);
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type_ == Type::kHalf) {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      const uint32_t magnitude = std::isnan(x)      ? 0x7E00
                                 : exponent >= 31   ? 0x7C00
                                 : exponent >= 1    ? static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FF)
                                 : exponent >= -10  ? ((bits & 0x7FFFFF) | 0x800000) >> (14 - exponent)
                                                    : 0;
      half = static_cast<uint16_t>((bits >> 16 & 0x8000) | magnitude);
    }
    std::memcpy(to, &half, 2);
  }
  double at(int64_t i) const { return value_of(type_, memory_ + i * size_of(type_)); }
  uint8_t* data() { return memory_; }

 private:
  Type type_;
  uint8_t* memory_;
};

double special() { return pick(0, 1) ? (pick(0, 1) ? NAN : INFINITY) : -INFINITY; }

void losses(const Kernels& run) {
  const Type type = pick(0, 1) ? Type::kFloat : Type::kBFloat16;
  const int64_t rows = pick(1, 5), vocab = pick(0, 1) ? pick(1, 70) : pick(1, 600), stride = vocab + pick(0, 3) * pick(0, 9);
  const double deviation = std::ldexp(1.0, static_cast<int>(pick(-6, 6)));
  Values logits(type, (rows - 1) * stride + vocab, deviation);
  std::vector<int64_t> target(rows);
  const int64_t ignore_index = pick(0, 2) ? -100 : pick(0, vocab - 1);
  for (int64_t& label : target) label = pick(0, 5) ? pick(0, vocab - 1) : pick(0, 2) ? ignore_index : pick(0, 1) ? vocab + pick(0, 9) : -1 - pick(0, 9);
  if (pick(0, 3) == 0) logits.set(pick(0, rows - 1) * stride + pick(0, vocab - 1), special());
  std::vector<double> before((rows - 1) * stride + vocab);
  for (size_t i = 0; i < before.size(); ++i) before[i] = logits.at(i);

  const bool with_gradient = pick(0, 3) > 0, one_factor = pick(0, 1);
  Values factor(Type::kFloat, one_factor ? 1 : rows, 1.0), loss(Type::kFloat, rows, 1.0), lse(Type::kFloat, rows, 1.0);
  if (pick(0, 9) == 0) std::memset(factor.data(), 0x7F, 4), factor.data()[2] = factor.data()[1] = factor.data()[0] = 0xFF;  // NaN
  const float z_loss = pick(0, 1) ? 0.0f : 0.125f;
  Loss of{logits.data(), type, vocab, stride, target.data(), ignore_index, z_loss,
          with_gradient ? reinterpret_cast<float*>(factor.data()) : nullptr, one_factor ? 0 : 1,
          reinterpret_cast<float*>(loss.data()), reinterpret_cast<float*>(lse.data())};
  std::vector<float> scratch(vocab);
  run.loss_rows(of, 0, rows, scratch.data());

  const std::string name = std::string(run.name) + " loss";
  for (int64_t row = 0; row < rows; ++row) {
    const double* x = before.data() + row * stride;
    double most = -INFINITY, total = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < vocab; ++i) most = std::max(most, x[i]), finite = finite && !std::isnan(x[i]);
    for (int64_t i = 0; i < vocab; ++i) total += std::exp(x[i] - most);
    if (!finite) total = NAN;
    const bool ignored = target[row] == ignore_index, exists = target[row] >= 0 && target[row] < vocab;
    const double wanted_lse = exists || ignored ? most + std::log(total) : NAN, scale = 1.0 + std::abs(most);
    const double z = z_loss;
    const double wanted = ignored ? 0.0 : exists ? std::log(total) - (x[target[row]] - most) + z * wanted_lse * wanted_lse : NAN;
    compare(name + " lse", row, lse.at(row), wanted_lse, 1e-6 * scale);
    compare(name, row, loss.at(row), wanted, 1e-6 * (1.0 + std::abs(wanted) + z * scale * scale * 3));
    const double g = with_gradient ? factor.at(one_factor ? 0 : row) : 0.0;
    for (int64_t i = 0; i < stride && row * stride + i < static_cast<int64_t>(before.size()); ++i) {
      const double got = logits.at(row * stride + i);
      if (!with_gradient || i >= vocab) {
        compare(name + " untouched", i, got, x[i], 0.0);
        continue;
      }
      const double p = std::exp(x[i] - most) / total;
      const double slope = ignored ? 0.0 : g * ((1 + 2 * z * wanted_lse) * p - (i == target[row]));
      const double size = std::abs(g) * (1 + std::abs(2 * z * wanted_lse)) * p + (i == target[row] ? std::abs(g) : 0.0);
      // Below the least normal float32 the vectors' exponentials may be 0.
      compare(name + " gradient", i, got, slope, 1e-5 * size + unit(type, slope) * 1.001 + 1e-37);
    }
  }
}

void scaling(const Kernels& run) {
  const Type type = static_cast<Type>(pick(0, 2));
  const int64_t count = pick(1, 300), begin = pick(0, count - 1), end = pick(0, 1) ? count : pick(begin, count);
  Values values(type, count, std::ldexp(1.0, static_cast<int>(pick(-6, 6))));
  for (int64_t i = 0; i < count; ++i)
    if (pick(0, 9) == 0) values.set(i, pick(0, 1) ? 0.0 : special());
  std::vector<double> before(count);
  for (int64_t i = 0; i < count; ++i) before[i] = values.at(i);
  const float factors[] = {static_cast<float>(normal(2.0)), 1.5f, -0.375f, static_cast<float>(special()), 0.0f};
  const float factor = factors[pick(0, 4)];
  run.scale(values.data(), type, begin, end, factor);
  for (int64_t i = 0; i < count; ++i) {
    const bool changed = i >= begin && i < end && before[i] != 0.0;
    const float product = static_cast<float>(before[i]) * factor;
    compare(std::string(run.name) + " scale", i, values.at(i), changed ? nearest(type, product) : before[i], 0.0);
  }
}

void decoding(const Kernels& run) {
  const Type type = static_cast<Type>(pick(0, 2));
  const int64_t batch = pick(1, 2), heads = pick(1, 2), head_dim = pick(0, 1) ? pick(1, 40) : pick(1, 140);
  const int64_t tokens = pick(0, 1) ? pick(1, 40) : pick(1, 700);
  const double deviation = std::ldexp(1.0, static_cast<int>(pick(-3, 2)));
  struct Array {
    int64_t token, head, batch, size;
  };
  const auto array = [&](int64_t length) {
    Array a;
    const bool heads_inside = pick(0, 1);
    a.token = heads_inside ? head_dim * heads + pick(0, 5) : head_dim + pick(0, 5);
    a.head = heads_inside ? head_dim : a.token * length;
    a.batch = (heads_inside ? a.token * length : a.head * heads) + pick(0, 5);
    if (pick(0, 9) == 0) a.batch = 0;  // one cache for all
    a.size = (batch - 1) * a.batch + (heads - 1) * a.head + (length - 1) * a.token + head_dim;
    return a;
  };
  const Array aq = array(1), ak = array(tokens), av = array(tokens);
  Values q(type, aq.size, 1.0), k(type, ak.size, deviation), v(type, av.size, 1.0), out(type, batch * heads * head_dim, 1.0);
  Values lse(Type::kFloat, batch * heads, 1.0);
  std::vector<int64_t> keys;
  const bool listed = pick(0, 1);
  if (listed)
    for (int64_t i = 0; i < tokens; ++i)
      if (pick(0, 1)) keys.push_back(i);
  const int64_t visible = listed ? static_cast<int64_t>(keys.size()) : pick(0, tokens);
  const auto token = [&](int64_t i) { return listed ? keys[i] : i; };
  // What no query may see: whatever it is, it must not be read into the result.
  std::vector<bool> seen(tokens, false);
  for (int64_t i = 0; i < visible; ++i) seen[token(i)] = true;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t)
        if (!seen[t]) k.set(b * ak.batch + h * ak.head + t * ak.token, NAN), v.set(b * av.batch + h * av.head + t * av.token, NAN);
  const float scale = static_cast<float>(normal(0.5));
  if (pick(0, 3) == 0 && visible > 0) {  // scores of -inf (or inf), for a run of keys or all of them
    const int64_t begin = pick(0, 1) * pick(0, visible - 1), end = pick(0, 1) ? visible : pick(begin, visible), d = pick(0, head_dim - 1);
    for (int64_t i = begin; i < end; ++i) k.set((batch - 1) * ak.batch + token(i) * ak.token + d, pick(0, 60) ? -INFINITY : INFINITY);
  }
  Decode of{};
  of.q = q.data(), of.k = k.data(), of.v = v.data(), of.out = out.data(), of.lse = reinterpret_cast<float*>(lse.data());
  of.type = type, of.head_dim = head_dim;
  of.q_batch = aq.batch, of.q_head = aq.head;
  of.k_batch = ak.batch, of.k_head = ak.head, of.k_token = ak.token;
  of.v_batch = av.batch, of.v_head = av.head, of.v_token = av.token;
  of.out_batch = heads * head_dim, of.out_head = head_dim, of.lse_batch = heads, of.lse_head = 1;
  of.keys = listed ? keys.data() : nullptr;
  of.scale = scale;
  const int64_t piece = pick(0, 1) ? igpt::cpu::kDecodeKeys : pick(1, 50);
  const int64_t count = (visible + piece - 1) / piece, size = igpt::cpu::part_size(head_dim);

  const std::string name = std::string(run.name) + " decode";
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<float> parts(count * size);
      for (int64_t i = 0; i < count; ++i)
        run.decode_part(of, b, h, i * piece, std::min(visible, (i + 1) * piece), parts.data() + i * size);
      run.decode_finish(of, b, h, parts.data(), count);
      double most = -INFINITY, total = 0.0, largest = 0.0;
      std::vector<double> scores(visible), wanted(head_dim, 0.0), heavy(head_dim, 0.0);
      for (int64_t i = 0; i < visible; ++i) {
        double score = 0.0, weight = 0.0;
        for (int64_t d = 0; d < head_dim; ++d) {
          const double product = q.at(b * aq.batch + h * aq.head + d) * k.at(b * ak.batch + h * ak.head + token(i) * ak.token + d);
          score += product, weight += std::abs(product);
        }
        scores[i] = score * scale, most = std::max(most, scores[i]), largest = std::max(largest, std::isfinite(weight) ? weight * std::abs(scale) : 0.0);
      }
      for (int64_t i = 0; i < visible; ++i) {
        const double p = std::exp(scores[i] - most);
        total += p;
        for (int64_t d = 0; d < head_dim; ++d) {
          const double x = p * v.at(b * av.batch + h * av.head + token(i) * av.token + d);
          wanted[d] += x, heavy[d] += std::abs(x);
        }
      }
      const double error = 3e-6 * (1 + largest);
      compare(name + " lse", h, lse.at(b * heads + h), visible ? most + std::log(total) : -INFINITY, error);
      for (int64_t d = 0; d < head_dim; ++d) {
        const double x = visible ? wanted[d] / total : 0.0;
        compare(name, d, out.at((b * heads + h) * head_dim + d), x, visible ? error * heavy[d] / total + unit(type, x) * 1.001 + 1e-37 : 0.0);
      }
    }
  }
}

// The bits of every half and bfloat16, there and back through a cache of one token.
void every_value(const Kernels& run) {
  for (const Type type : {Type::kBFloat16, Type::kHalf}) {
    for (int64_t start = 0; start < 65536; start += 64) {
      std::vector<uint16_t> value(64), zero(64, 0), out(64, 1);
      for (int64_t i = 0; i < 64; ++i) value[i] = static_cast<uint16_t>(start + i);
      float lse = 1.0f;
      std::vector<float> part(igpt::cpu::part_size(64));
      Decode of{};
      of.q = zero.data(), of.k = zero.data(), of.v = value.data(), of.out = out.data(), of.lse = &lse;
      of.type = type, of.head_dim = 64, of.scale = 1.0f;
      run.decode_part(of, 0, 0, 0, 1, part.data());
      run.decode_finish(of, 0, 0, part.data(), 1);
      for (int64_t i = 0; i < 64; ++i) {
        const double want = value_of(type, reinterpret_cast<uint8_t*>(&value[i]));
        compare(std::string(run.name) + " bits", start + i, value_of(type, reinterpret_cast<uint8_t*>(&out[i])), want, 0.0);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10.0;
  seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::vector<const Kernels*> all;
  for (const char* name : {"portable", "avx2", "avx512"})
    if (const Kernels* found = igpt::cpu::kernels(name)) all.push_back(found);
  for (const Kernels* run : all) every_value(*run);
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0;
  do {
    for (const Kernels* run : all) {
      generator.seed(seed);
      losses(*run);
      scaling(*run);
      decoding(*run);
    }
    ++seed, ++cases;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%lld cases of", static_cast<long long>(cases));
  for (const Kernels* run : all) std::printf(" %s", run->name);
  std::printf(", last seed %llu\n", static_cast<unsigned long long>(seed - 1));
}
