// The operator of decoding, and how its work is shared among threads.
#include "binding.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace igpt::cpu {
namespace {

constexpr int64_t kDecodeBytes = 65536;  // below this much cache, threads cost more than they save

// One piece of decoding: keys begin to end of a sequence and head, a place for the result, how many pieces its row has.
struct Piece {
  int64_t batch, head, begin, end, count;
};

void cpu_decode(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths, int64_t length,
                const std::optional<Tensor>& keys, const std::optional<Tensor>& begins, const std::optional<Tensor>& heads,
                double scale, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(q.is_cpu() && q.dim() == 4 && q.size(2) == 1, "q must be a CPU tensor [B, H, 1, D]");
  const int64_t batch = q.size(0), all_heads = q.size(1), head_dim = q.size(3);
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == q.scalar_type() && x->dim() == 4 && x->size(0) == batch &&
                        x->size(1) == all_heads && x->size(2) == k.size(2) && x->size(3) == head_dim,
                    "k and v must be CPU tensors [B, H, T, D] of q's dtype");
  for (const Tensor* x : {&q, &k, &v, &out})
    STD_TORCH_CHECK(x->stride(3) == 1 || head_dim == 1, "the values of a head must lie without gaps");
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == q.scalar_type() && out.dim() == 4 && out.size(0) == batch &&
                      out.size(1) == all_heads && out.size(2) == 1 && out.size(3) == head_dim,
                  "out must be a CPU tensor like q");
  STD_TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == ScalarType::Float && lse.dim() == 3 && lse.size(0) == batch &&
                      lse.size(1) == all_heads && lse.size(2) == 1,
                  "lse must be a float32 CPU tensor [B, H, 1]");
  const int64_t tokens = k.size(2);
  const int64_t* own_lengths = nullptr;
  if (lengths.has_value()) {
    STD_TORCH_CHECK(holds(*lengths, ScalarType::Long, batch), "lengths must be a contiguous int64 CPU tensor [B]");
    own_lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
  }
  Decode of{};
  const int64_t* own_begins = nullptr;
  int64_t listed = 0;
  if (keys.has_value()) {
    listed = keys->numel();
    STD_TORCH_CHECK(holds(*keys, ScalarType::Long, listed), "keys must be a contiguous int64 CPU tensor");
    of.keys = static_cast<const int64_t*>(keys->const_data_ptr());
    STD_TORCH_CHECK(std::all_of(of.keys, of.keys + listed, [&](int64_t key) { return key >= 0 && key < tokens; }),
                    "keys must lie in the cache");
    if (begins.has_value()) {
      STD_TORCH_CHECK(holds(*begins, ScalarType::Long, batch + 1), "begins must be a contiguous int64 CPU tensor [B + 1]");
      own_begins = static_cast<const int64_t*>(begins->const_data_ptr());
    }
  }
  const int64_t* chosen = nullptr;
  int64_t some_heads = all_heads;
  if (heads.has_value()) {
    some_heads = heads->numel();
    STD_TORCH_CHECK(holds(*heads, ScalarType::Long, some_heads), "heads must be a contiguous int64 CPU tensor");
    chosen = static_cast<const int64_t*>(heads->const_data_ptr());
    STD_TORCH_CHECK(std::all_of(chosen, chosen + some_heads, [&](int64_t head) { return head >= 0 && head < all_heads; }),
                    "heads must exist");
  }
  of.q = q.const_data_ptr();
  of.k = k.const_data_ptr();
  of.v = v.const_data_ptr();
  of.out = out.mutable_data_ptr();
  of.lse = static_cast<float*>(lse.mutable_data_ptr());
  of.type = type_of(q);
  of.head_dim = head_dim;
  of.q_batch = q.stride(0), of.q_head = q.stride(1);
  of.k_batch = k.stride(0), of.k_head = k.stride(1), of.k_token = k.stride(2);
  of.v_batch = v.stride(0), of.v_head = v.stride(1), of.v_token = v.stride(2);
  of.out_batch = out.stride(0), of.out_head = out.stride(1);
  of.lse_batch = lse.stride(0), of.lse_head = lse.stride(1);
  of.scale = static_cast<float>(scale);

  std::vector<Piece> pieces;
  int64_t work = 0;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t begin = 0, end = own_lengths != nullptr ? own_lengths[b] : length;
    if (of.keys != nullptr) {
      begin = own_begins != nullptr ? own_begins[b] : 0;
      end = own_begins != nullptr ? own_begins[b + 1] : listed;
    }
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= (of.keys != nullptr ? listed : tokens), "keys must lie in the cache");
    const int64_t count = std::max<int64_t>(1, (end - begin + kDecodeKeys - 1) / kDecodeKeys);
    for (int64_t h = 0; h < some_heads; ++h)
      for (int64_t i = 0; i < count; ++i)
        pieces.push_back({b, chosen != nullptr ? chosen[h] : h, begin + i * kDecodeKeys,
                          std::min(end, begin + (i + 1) * kDecodeKeys), i == 0 ? count : 0});
    work += (end - begin) * some_heads;
  }
  const Kernels& run = kernels();
  const int64_t size = part_size(head_dim), count = static_cast<int64_t>(pieces.size());
  std::vector<float> parts(count * size);
  const auto part = [&](int64_t i) {
    const Piece& piece = pieces[i];
    if (piece.begin < piece.end) run.decode_part(of, piece.batch, piece.head, piece.begin, piece.end, parts.data() + i * size);
    if (piece.count == 1)
      run.decode_finish(of, piece.batch, piece.head, parts.data() + i * size, piece.begin < piece.end ? 1 : 0);
  };
  if (work * head_dim * 2 * q.element_size() < kDecodeBytes)
    for (int64_t i = 0; i < count; ++i) part(i);
  else
    share(count, part);
  for (int64_t i = 0; i < count; ++i)
    if (pieces[i].count > 1)
      run.decode_finish(of, pieces[i].batch, pieces[i].head, parts.data() + i * size, pieces[i].count);
}

std::string cpu_kernels() { return kernels().name; }

}  // namespace
}  // namespace igpt::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(igpt_kernels, m) {
  m.def("cpu_kernels() -> str");
  m.def(
      "cpu_decode(Tensor q, Tensor k, Tensor v, Tensor? lengths, int length, Tensor? keys, Tensor? begins, Tensor? heads,"
      " float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(igpt_kernels, CPU, m) { m.impl("cpu_decode", TORCH_BOX(&igpt::cpu::cpu_decode)); }

STABLE_TORCH_LIBRARY_IMPL(igpt_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_kernels", TORCH_BOX(&igpt::cpu::cpu_kernels)); }
