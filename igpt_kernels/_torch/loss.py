"""Cross-entropy of a linear layer by torch, some rows at a time: the logits of no more than those are in memory.

A sum or a mean makes its gradients in the forward pass, while the logits are in memory. The backward pass multiplies them by
that number's own gradient. So there are three products instead of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels.tensors import accumulation_dtype


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows that are computed together: of 2²⁰ logits on the CPU (4 MiB of float32), 2²⁴ on a GPU (32 MiB of bfloat16).

    So few that they stay in a cache (50 MB of L2 in an H100); so many that launches take less time than what they launch.
    Of 512 classes a part is 32,768 rows, three products of 17 GFLOP. Parts of half that size cost 100 µs each on an H100,
    and Python took as long.
    """
    return max(64, (1 << 20 if device.type == "cpu" else 1 << 24) // columns)


def mean_is_folded(dtype: torch.dtype) -> bool:
    """Whether gradients made beside a mean have its 1/M in them; float16 does not hold 2⁻¹⁸ of a probability."""
    return dtype != torch.float16


def sum_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """Of weight's gradient beside a sum or mean, before it is multiplied by what is not known yet.

    Float32 of half dtypes, since float16 does not hold every sum. C++ gives bfloat16, which does, as it gives hidden's.
    """
    return dtype if backend == "ext" and dtype == torch.bfloat16 else accumulation_dtype(dtype)


def splits_of(rows: int, values: int, multiprocessors: int) -> int:
    """Into how many groups the rows of ``aᵀ·b`` go: one for every 128 x 128 tile of multiprocessors left without work.

    A product of [512,R] and [R,512] has 16 such tiles for the 132 multiprocessors of an H100. Groups have 256 rows or more.
    """
    return max(1, min(rows // 256, multiprocessors * 128 * 128 // values))


def product_over_rows(a: Tensor, b: Tensor, splits: int, out_dtype: torch.dtype) -> Tensor:
    """``aᵀ·b`` in `out_dtype`, of a [R,V] and b [R,C]: `splits` groups of rows side by side, then added in one order."""
    size = a.shape[0] // splits
    whole = size * splits
    left, right = (x[:whole].unflatten(0, (splits, size)) for x in (a, b))
    left = left.transpose(1, 2)
    wide = a.dtype != out_dtype
    parts = torch.bmm(left, right, out_dtype) if wide else torch.bmm(left, right)
    total = parts[0] if splits == 1 else parts.sum(0)
    if whole < a.shape[0]:
        rest = a[whole:].t(), b[whole:]
        total += torch.mm(*rest, out_dtype) if wide else torch.mm(*rest)
    return total


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += aᵀ·b`` in `accumulation_dtype`, without rounding to half dtypes on the way; a [R,V], b [R,C].

    Products write into a tensor, here and below, because those that make one are autocast, whatever calls them. Those with an
    `out_dtype` are not.
    """
    # With that setting torch has no product of float16 with a float32 result (a check in its CUDABlas.cpp).
    sums_in_half = a.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    if a.dtype in (torch.float16, torch.bfloat16) and a.is_cuda and not sums_in_half:
        multiprocessors = torch.cuda.get_device_properties(a.device).multi_processor_count
        total += product_over_rows(a, b, splits_of(a.shape[0], total.numel(), multiprocessors), torch.float32)
    elif a.dtype == b.dtype == torch.bfloat16:
        # A part is rounded once, its sums are float32: oneDNN has 150 GFLOP/s a core in float32, 480 in bfloat16.
        total += torch.mm(a.t(), b, out=a.new_empty(total.shape))
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [R,V] of some rows in `accumulation_dtype`, which the caller may overwrite."""
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    return _product_into(out, hidden, weight.t()).to(accumulation_dtype(hidden.dtype))


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a·b``, rounded to the dtype of `out`, in `out`."""
    if out.dtype == torch.float16 and not out.is_cuda:
        # Torch 2.13 multiplies float16 on the CPU at a tenth of the speed of float32.
        wide = out.new_empty(out.shape, dtype=torch.float32)
        return out.copy_(torch.mm(a.float(), b.float(), out=wide))
    return torch.mm(a, b, out=out)


def _exponentials(
    logits: Tensor, target: Tensor, ignore_index: int, z_loss: float, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp of each row, and the sum of what is left in `logits`: exponentials, the largest of a row 1.

    Where the logits were `rounded` to a half dtype, softmax is exact enough: 20 units in the last place (torch 2.13).
    It takes 0.6 ms for 2,048 rows of 512 on one core, where exponentials take 1.0. Then the sum is 1.
    """
    vocab = logits.shape[1]
    missing = (target < 0) | (target >= vocab)
    picked = logits.gather(1, target.masked_fill(missing, 0)[:, None])[:, 0]
    largest = logits.amax(1)
    if rounded:
        torch.softmax(logits, 1, out=logits)
        lse, sums = largest - logits.amax(1).log(), torch.ones_like(largest)  # the largest probability is 1 / sum
    else:
        sums = logits.sub_(largest[:, None]).exp_().sum(1)
        lse = largest + sums.log()
    ignored = target == ignore_index
    lse = lse.masked_fill_(missing & ~ignored, torch.nan)
    loss = (lse - picked + z_loss * lse * lse).masked_fill_(ignored, 0.0)
    return loss, lse, sums


def _subtract_target(p: Tensor, grad: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """``p - grad·onehot(target)`` in place; rows that do not count are 0, whatever was in them.

    A row whose target is no class is NaN already; its target stands for class 0 here, so that nothing else is read.
    """
    ignored = target == ignore_index
    missing = (target < 0) | (target >= p.shape[1])
    if p.is_cuda or bool(ignored.any()):  # a GPU would have to be waited for
        p.masked_fill_(ignored[:, None], 0.0)
    return p.scatter_add_(1, target.masked_fill(missing, 0)[:, None], -grad.masked_fill(ignored, 0.0)[:, None])


class _Gradients:
    """dhidden and dweight as they come, some rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> None:
        self.hidden, self.weight = hidden, weight
        self.need_hidden, self.need_weight = need_hidden, need_weight
        width = hidden.shape[1]
        self.dhidden = hidden.new_empty(hidden.shape[0] if need_hidden else 0, width)
        self._sum: Tensor | None = None

    def dweight(self, dtype: torch.dtype) -> Tensor:
        """The sum over all rows that were taken in, rounded to `dtype`."""
        if self._sum is None:
            return self.weight.new_zeros(self.weight.shape[0] if self.need_weight else 0, self.weight.shape[1], dtype=dtype)
        return self._sum.to(dtype)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Take in the gradient of the logits of `rows`, in `accumulation_dtype`."""
        some = self.hidden[rows]
        if some.dtype == torch.bfloat16 and not some.is_cuda:
            dlogits = dlogits.to(some.dtype)  # of both products, as plain torch has it
        if self.need_weight:
            self._add_to_sum(dlogits, some)
        if self.need_hidden:
            _product_into(self.dhidden[rows], dlogits if some.dtype == torch.float16 else dlogits.to(some.dtype), self.weight)

    def _add_to_sum(self, dlogits: Tensor, some: Tensor) -> None:
        shape, wide = self.weight.shape, accumulation_dtype(self.weight.dtype)
        if self._sum is None and not some.is_cuda:
            # Written, not added to zeros. That takes 0.1 ms for 512 x 512 values, and a product 1.3.
            self._sum = _product_into(dlogits.new_empty(shape), dlogits.t(), some.to(dlogits.dtype))
            return
        if self._sum is None or self._sum.dtype != wide:
            self._sum = self.weight.new_zeros(shape, dtype=wide) if self._sum is None else self._sum.to(wide)
        add_product(self._sum, dlogits, some)


def _parts(rows: int, columns: int, device: torch.device) -> list[slice]:
    step = rows_at_once(columns, device)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _parts_of(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The rows of hidden, as many together as `rows_at_once` says."""
    return _parts(hidden.shape[0], max(weight.shape), hidden.device)


def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows``: loss and log-sum-exp of each row, [M]."""
    loss, lse = (hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype)) for _ in range(2))
    rounded = loss.dtype != hidden.dtype
    for part in _parts_of(hidden, weight):
        logits = _logits(hidden[part], weight)
        loss[part], lse[part], _ = _exponentials(logits, target[part], ignore_index, z_loss, rounded)
    return loss, lse


def cross_entropy_rows_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows_backward``: the logits once more, and what follows from them."""
    gradients = _Gradients(hidden, weight, need_hidden, need_weight)
    for part in _parts_of(hidden, weight):
        p = _logits(hidden[part], weight).sub_(lse[part, None]).exp_()
        p.mul_((grad[part] * (1.0 + 2.0 * z_loss * lse[part]))[:, None])
        gradients.add(part, _subtract_target(p, grad[part], target[part], ignore_index))
    return gradients.dhidden, gradients.dweight(weight.dtype)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    z_loss: float,
    mean: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_sum``: the sum or mean of all rows' losses, and its gradients.

    dweight is in `accumulation_dtype`: what will multiply both is not known yet, and float16 would not hold every sum. The
    gradients of a mean are those of the sum where its 1/M is not folded in: see `mean_is_folded`.
    """
    gradients = _Gradients(hidden, weight, need_hidden, need_weight)
    loss = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    rounded = loss.dtype != hidden.dtype
    count = rows_that_count(target, ignore_index, loss.dtype, mean)
    factor = count.reciprocal() if mean_is_folded(hidden.dtype) else torch.ones_like(count)
    for part in _parts_of(hidden, weight):
        p = _logits(hidden[part], weight)
        loss[part], lse, sums = _exponentials(p, target[part], ignore_index, z_loss, rounded)
        if not (need_hidden or need_weight):
            continue
        p.mul_((factor * (1.0 + 2.0 * z_loss * lse) / sums)[:, None])
        gradients.add(part, _subtract_target(p, factor.expand_as(sums), target[part], ignore_index))
    return loss.sum() / count, gradients.dhidden, gradients.dweight(accumulation_dtype(weight.dtype))


def rows_that_count(target: Tensor, ignore_index: int, dtype: torch.dtype, mean: bool) -> Tensor:
    """What the sum of the rows' losses is divided by, a number: the rows that count in a mean (0 where none does), else 1."""
    return (target != ignore_index).sum().to(dtype) if mean else torch.ones((), dtype=dtype, device=target.device)


def cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    """The operator ``igpt_kernels::cross_entropy_scale_``: a gradient of one number times that number's own, in place.

    What is 0 stays 0, as the mean over no row at all has the gradient inf. Half dtypes are multiplied in float32, which holds
    every factor; a GPU would round it first. On the CPU nothing is done where the factor is 1.
    """
    if not factor.is_cuda:
        if float(factor.detach()) == 1.0:
            return
        if bool(torch.isfinite(factor)):
            gradient.mul_(factor)  # torch multiplies by a number on the CPU in float32; a test holds that
            return
    for part in _parts(gradient.shape[0], gradient.shape[1], gradient.device):  # the values of a GPU are not waited for
        wide = gradient[part].to(factor.dtype)
        gradient[part] = (wide * factor).masked_fill_(wide == 0, 0.0)


def cross_entropy_scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator ``igpt_kernels::cross_entropy_scaled``: the same in a new tensor, rounded to `dtype` at last."""
    if not factor.is_cuda and float(factor.detach()) == 1.0:
        return gradient.to(dtype, copy=True)
    out = gradient.clone()
    cross_entropy_scale_(out, factor)
    return out.to(dtype)
