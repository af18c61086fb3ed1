// The operators of a linear layer's cross-entropy: products of torch, and one pass between them over some rows of logits.
//
// The pass reads a row of logits and leaves the row's gradient in its place, from which the products make dhidden and dweight.
// All of it is one call. Its parts called from Python take 0.1 ms more, 2 % of the loss of a 32 x 32 image.
#include "binding.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace igpt::cpu {
namespace {

constexpr int64_t kPiece = 32768;  // logits that a thread takes at once: 15 us of work, enough to repay it
// Logits in memory at once: 4 MiB of float32, 8 of bfloat16. With half as many of the latter, the products of 9,216 rows of
// 512 classes take 1.5 % longer.
constexpr int64_t kLogits = 1 << 20, kLogitsOfBFloat16 = 1 << 22, kLeastRows = 64;

// out = a b, rounded to the dtype of out. Not `matmul`, which autocast would see.
void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor flipped(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

Tensor rows_of(Tensor x, int64_t begin, int64_t end) {
  return begin == 0 && end == x.size(0) ? x : torch::stable::narrow(x, 0, begin, end - begin);
}

// The sum over parts of the rows of dlogits^T hidden: float32, or bfloat16 where there is one part.
class WeightGradient {
 public:
  void add(const Tensor& dlogits, const Tensor& hidden) {
    const int64_t shape[] = {dlogits.size(1), hidden.size(1)};
    const Tensor left = flipped(dlogits);
    if (!sum_.has_value()) {  // written, not added to zeros: that takes 0.1 ms for 512 x 512 values
      sum_ = torch::stable::new_empty(dlogits, {shape, 2});
      product(*sum_, left, hidden);
    } else if (dlogits.scalar_type() == ScalarType::Float) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum_->get(), sum_->get(), left.get(), hidden.get(), 1.0, 1.0));
    } else {  // a part is rounded once, its sums are float32: oneDNN has 150 GFLOP/s a core in float32, 480 in bfloat16
      const Tensor part = torch::stable::new_empty(dlogits, {shape, 2});
      product(part, left, hidden);
      if (sum_->scalar_type() != ScalarType::Float) sum_ = torch::stable::to(*sum_, ScalarType::Float);
      AtenTensorHandle total = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(sum_->get(), part.get(), 1.0, &total));
      sum_ = Tensor(total);
    }
  }

  // In bfloat16 for weights of that dtype and float32 for others.
  Tensor take(const Tensor& weight, bool wanted) const {
    const ScalarType type = weight.scalar_type() == ScalarType::Half ? ScalarType::Float : weight.scalar_type();
    const int64_t shape[] = {wanted ? weight.size(0) : 0, weight.size(1)};
    if (!sum_.has_value()) return torch::stable::new_zeros(weight, {shape, 2}, type);
    return sum_->scalar_type() == type ? *sum_ : torch::stable::to(*sum_, type);
  }

 private:
  std::optional<Tensor> sum_;
};

struct Gradients {
  Tensor dhidden, dweight;  // [M,C] and [V,C]; [0,C] where none is wanted
};

// Gradients are those of the sum of `factor` times each row's loss. The stride is 0 where one factor is that of all rows.
struct Factor {
  const float* of_rows;  // null: no gradients
  int64_t stride;
};

void pass(const Tensor& logits, const int64_t* target, const Factor& factor, int64_t ignore_index, double z_loss, float* loss,
          float* lse) {
  Loss of{};
  of.logits = logits.mutable_data_ptr();
  of.type = type_of(logits);
  of.vocab = logits.size(1);
  of.stride = of.vocab;
  of.target = target;
  of.ignore_index = ignore_index;
  of.z_loss = static_cast<float>(z_loss);
  of.factor = factor.of_rows;
  of.factor_stride = factor.stride;
  of.loss = loss;
  of.lse = lse;
  const int64_t rows = logits.size(0), piece = std::max<int64_t>(1, kPiece / of.vocab);
  const int64_t scratch = of.factor != nullptr && of.type != Type::kFloat ? of.vocab : 0;
  share((rows + piece - 1) / piece, [&](int64_t i) {
    std::vector<float> own(scratch);
    kernels().loss_rows(of, i * piece, std::min(rows, (i + 1) * piece), own.data());
  });
}

// Loss and log-sum-exp of all rows, into [M] each, and the gradients.
Gradients over_parts(const Tensor& hidden, const Tensor& weight, const Tensor& target, Factor factor, int64_t ignore_index,
                     double z_loss, bool need_hidden, bool need_weight, float* loss, float* lse) {
  STD_TORCH_CHECK(hidden.is_cpu() && hidden.dim() == 2, "hidden must be a CPU tensor [M, C]");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == hidden.scalar_type() && weight.dim() == 2 &&
                      weight.size(0) >= 1 && weight.size(1) == width,
                  "weight must be a CPU tensor [V, C] of hidden's dtype");
  STD_TORCH_CHECK(holds(target, ScalarType::Long, rows), "target must be a contiguous int64 CPU tensor [M]");
  const bool half = type_of(hidden) == Type::kHalf;  // torch 2.13 multiplies it on the CPU at a tenth of the speed of float32
  const auto wide = [half](const Tensor& x) { return half ? torch::stable::to(x, ScalarType::Float) : x; };
  const Tensor classes = wide(weight);
  const int64_t vocab = weight.size(0), values = type_of(hidden) == Type::kBFloat16 ? kLogitsOfBFloat16 : kLogits;
  const int64_t step = std::min(rows, std::max(kLeastRows, values / std::max(vocab, width)));

  const int64_t like_hidden[] = {need_hidden ? rows : 0, width}, some[] = {step, vocab};
  const Tensor dhidden = torch::stable::new_empty(hidden, {like_hidden, 2});
  const auto* const labels = static_cast<const int64_t*>(target.const_data_ptr());
  if (!need_hidden && !need_weight) factor.of_rows = nullptr;
  const Tensor buffer = torch::stable::new_empty(classes, {some, 2});
  WeightGradient dweight;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t end = std::min(rows, begin + step);
    const Tensor own = wide(rows_of(hidden, begin, end)), logits = rows_of(buffer, 0, end - begin);
    product(logits, own, flipped(classes));
    const Factor here{factor.of_rows != nullptr ? factor.of_rows + begin * factor.stride : nullptr, factor.stride};
    pass(logits, labels + begin, here, ignore_index, z_loss, loss + begin, lse + begin);
    if (need_weight) dweight.add(logits, own);
    if (need_hidden) {
      Tensor out = rows_of(dhidden, begin, end);
      const Tensor exact = half ? torch::stable::empty_like(own) : out;
      product(exact, logits, classes);
      if (half) torch::stable::copy_(out, exact);
    }
  }
  return {dhidden, dweight.take(weight, need_weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                                                  const Tensor& target, const std::optional<Tensor>& factor,
                                                                  int64_t ignore_index, double z_loss, bool need_hidden,
                                                                  bool need_weight) {
  Factor of_rows{nullptr, 0};
  if (factor.has_value()) {
    STD_TORCH_CHECK(factor->is_cpu() && factor->scalar_type() == ScalarType::Float && factor->dim() == 1 &&
                        factor->size(0) == target.numel(),
                    "factor must be a float32 CPU tensor [M]");
    of_rows = {static_cast<const float*>(factor->const_data_ptr()), factor->stride(0)};
  }
  STD_TORCH_CHECK(factor.has_value() || !(need_hidden || need_weight), "factor must be given where gradients are wanted");
  const int64_t rows[] = {target.numel()};
  const Tensor loss = torch::stable::new_empty(hidden, {rows, 1}, ScalarType::Float), lse = torch::stable::empty_like(loss);
  const Gradients made =
      over_parts(hidden, weight, target, of_rows, ignore_index, z_loss, need_hidden, need_weight,
                 static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(lse.mutable_data_ptr()));
  return {loss, lse, made.dhidden, made.dweight};
}

std::tuple<Tensor, Tensor, Tensor> cpu_cross_entropy_sum(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                                         int64_t ignore_index, double z_loss, bool mean, bool folded,
                                                         bool need_hidden, bool need_weight) {
  STD_TORCH_CHECK(holds(target, ScalarType::Long, target.numel()), "target must be a contiguous int64 CPU tensor [M]");
  const auto* const labels = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t rows = target.numel(), count = mean ? rows - std::count(labels, labels + rows, ignore_index) : 1;
  // Where no row counts, it is infinite, and no row takes it.
  const float factor = folded ? 1.0f / static_cast<float>(count) : 1.0f;
  std::vector<float> losses(rows), lse(rows);
  const Gradients made = over_parts(hidden, weight, target, {&factor, 0}, ignore_index, z_loss, need_hidden, need_weight,
                                    losses.data(), lse.data());
  const double total = std::accumulate(losses.begin(), losses.end(), 0.0);  // in one order
  Tensor loss = torch::stable::new_empty(hidden, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / static_cast<double>(count));
  return {loss, made.dhidden, made.dweight};
}

void cpu_scale(const Tensor& values, double factor) {
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous(), "values must be a contiguous CPU tensor");
  const Type type = type_of(values);
  void* const data = values.mutable_data_ptr();
  const int64_t count = values.numel();
  share((count + kPiece - 1) / kPiece, [&](int64_t i) {
    kernels().scale(data, type, i * kPiece, std::min(count, (i + 1) * kPiece), static_cast<float>(factor));
  });
}

}  // namespace
}  // namespace igpt::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(igpt_kernels, m) {
  m.def(
      "cpu_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, Tensor? factor, int ignore_index, float z_loss,"
      " bool need_hidden, bool need_weight) -> (Tensor loss, Tensor lse, Tensor dhidden, Tensor dweight)");
  m.def(
      "cpu_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor target, int ignore_index, float z_loss, bool mean,"
      " bool folded, bool need_hidden, bool need_weight) -> (Tensor loss, Tensor dhidden, Tensor dweight)");
  m.def("cpu_scale(Tensor(a!) values, float factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(igpt_kernels, CPU, m) {
  m.impl("cpu_cross_entropy_rows", TORCH_BOX(&igpt::cpu::cpu_cross_entropy_rows));
  m.impl("cpu_cross_entropy_sum", TORCH_BOX(&igpt::cpu::cpu_cross_entropy_sum));
  m.impl("cpu_scale", TORCH_BOX(&igpt::cpu::cpu_scale));
}
