"""Cross-entropy of a linear layer whose logits are never in memory all at once.

The loss alone is one kernel: logits = hidden·weightᵀ a tile at a time. A program owns some rows and walks over the classes with
a running maximum and sum, as attention does. For gradients, some thousand rows at a time, there are three products of torch's
and one kernel between them. It takes a row of logits and leaves their gradient in its place, within the L2 cache. With
p = softmax::

    loss = lse - logit[target] + z·lse²      dlogit = grad·(p·(1 + 2·z·lse) - onehot(target))

Every sum has one order, so the bits are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._torch.loss import add_product, mean_is_folded, rows_at_once, rows_that_count
from igpt_kernels._triton.common import LOG2E, ceil_div, dot_dtype, on_device
from igpt_kernels._triton.launch import launch
from igpt_kernels._triton.rows import load_rows, store_rows

_BYTES = 128
"""What of a row one step takes: a line of the cache, and the widest swizzle of shared memory."""
_SCALED = 4096
"""Values that a program of `_cross_entropy_scale_kernel` multiplies: 64 bytes and more a thread in flight."""


@triton.jit
def logits_tile(
    Hidden, Weight, rows, cols, stride_hm, stride_hc, stride_wv, stride_wc, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Logits [M, N] of the rows and classes given, float32. "ieee": float32 inputs are not rounded to TF32.

    The rows and classes exist, so nothing is masked but the end of a row (EVEN: C is a multiple of BLOCK_K). Offsets are
    64-bit: 2³¹ values are 4 million rows of 512.
    """
    k = tl.arange(0, BLOCK_K)
    h_offset = (rows.to(tl.int64) * stride_hm)[:, None] + (k.to(tl.int64) * stride_hc)[None, :]
    w_offset = (cols.to(tl.int64) * stride_wv)[:, None] + (k.to(tl.int64) * stride_wc)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, C, BLOCK_K):
        column = tl.cast(start, tl.int64)
        h_ptrs = Hidden + column * stride_hc + h_offset
        w_ptrs = Weight + column * stride_wc + w_offset
        if EVEN:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            ok = (start + k < C)[None, :]
            h = tl.load(h_ptrs, mask=ok, other=0.0)
            w = tl.load(w_ptrs, mask=ok, other=0.0)
        acc = tl.dot(h.to(DOT), tl.trans(w.to(DOT)), acc, input_precision="ieee")
    return acc


@triton.jit
def load_target(Target, rows, row_ok, stride_t, V, ignore_index):
    """The class of each row (-1 where there is no such class), and whether the row counts."""
    target = tl.load(Target + rows.to(tl.int64) * stride_t, mask=row_ok, other=0)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32), target != ignore_index


@triton.jit(do_not_specialize=["M", "V", "ignore_index", "z_loss"])
def _cross_entropy_forward_kernel(
    Hidden, Weight, Target, Loss, Lse,  # hidden [M,C], weight [V,C], target [M] of any strides; loss, lse [M] float32
    stride_hm, stride_hc, stride_wv, stride_wc, stride_t,
    M, V, C, ignore_index, z_loss,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Loss and log-sum-exp of one tile of rows: every class, a tile at a time."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    target, counts = load_target(Target, rows, row_ok, stride_t, V, ignore_index)
    row_index = tl.minimum(rows, M - 1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    picked = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, V, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        s = logits_tile(
            Hidden, Weight, row_index, tl.minimum(cols, V - 1), stride_hm, stride_hc, stride_wv, stride_wc, C,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN, DOT,
        )  # fmt: skip
        picked += tl.sum(tl.where(cols[None, :] == target[:, None], s, 0.0), 1)
        s = tl.where((cols < V)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # Classes may be switched off by a logit of -inf; where all so far are, -inf - -inf would be NaN.
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.math.exp2((m - finite) * LOG2E) + tl.sum(tl.math.exp2((s - finite[:, None]) * LOG2E), 1)  # noqa: E741
        m = m_new
    # A class that does not exist makes the row's loss NaN, and by way of lse its gradients.
    lse = tl.where(counts & (target < 0), float("nan"), m + tl.math.log(l))
    loss = tl.where(counts, lse - picked + z_loss * lse * lse, 0.0)
    tl.store(Loss + rows, loss, mask=row_ok)
    tl.store(Lse + rows, lse, mask=row_ok)


@triton.jit(do_not_specialize=["M", "ignore_index", "z_loss"])
def _cross_entropy_gradient_kernel(
    Logits, Target, Grad, Loss,  # logits [M,V], rows stride_lm apart; target, grad float32 [M], any stride; loss [M] or None
    stride_lm, stride_t, stride_g, M, ignore_index, z_loss,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits become their gradients, one tile of whole rows; beside it the rows' losses."""
    FULL: tl.constexpr = V == BLOCK_N
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    cols = tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64) * stride_lm
    s = load_rows(Logits, offsets, row_ok, cols, V, FULL)
    if not FULL:
        s = tl.where((cols < V)[None, :], s, float("-inf"))
    target, counts = load_target(Target, rows, row_ok, stride_t, V, ignore_index)
    m = tl.max(s, 1)
    # Where all classes are switched off by a logit of -inf, -inf - -inf would be NaN before the sum is 0.
    finite = tl.where(m == float("-inf"), 0.0, m)
    e = tl.math.exp2((s - finite[:, None]) * LOG2E)
    l = tl.sum(e, 1)  # noqa: E741
    hit = cols[None, :] == target[:, None]
    # A class that does not exist makes the row's loss NaN, and by way of lse its gradients.
    lse = tl.where(counts & (target < 0), float("nan"), m + tl.math.log(l))
    if Loss is not None:
        picked = tl.sum(tl.where(hit, s, 0.0), 1)
        tl.store(Loss + rows, tl.where(counts, lse - picked + z_loss * lse * lse, 0.0), mask=row_ok)
    grad = tl.load(Grad + rows.to(tl.int64) * stride_g, mask=row_ok, other=0.0)
    d = e * (grad * (1.0 + 2.0 * z_loss * lse) / l)[:, None] - tl.where(hit, grad[:, None], 0.0)
    # Not by a factor of 0: the mean over no rows at all has the gradient inf.
    d = tl.where(counts[:, None], d, 0.0)
    tl.debug_barrier()  # a layout of registers may hold one value in two warps: none stores before all have loaded
    store_rows(Logits, offsets, row_ok, cols, V, d, FULL)


@triton.jit
def _cross_entropy_scale_kernel(X, Factor, Out, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Out = X times a number that lies in memory; what is 0 stays 0. In place, a factor of 1 leaves nothing to do."""
    factor = tl.load(Factor).to(tl.float32)
    if IN_PLACE:
        count = tl.where(factor == 1.0, 0, count)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place, mask=place < count, other=0.0).to(tl.float32)
    scaled = tl.where(x == 0.0, 0.0, x * factor).to(Out.dtype.element_ty)
    tl.debug_barrier()  # as above
    tl.store(Out + place, scaled, mask=place < count)


def _tile(config: tuning.Config, x: Tensor) -> dict[str, object]:
    """The compile-time arguments of the kernel that multiplies."""
    block_k = _BYTES // x.element_size()
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "EVEN": x.shape[1] % block_k == 0,
        "DOT": dot_dtype(x.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _shipped(kernel: str, hidden: Tensor, weight: Tensor) -> tuning.Config:
    """The configuration for this many classes; the smallest where a load takes fewer than 16 bytes.

    Then every value has an address of its own, for which the larger tiles have no registers: 128 x 256 spills 260 words.
    """
    (hidden_row, hidden_step), (weight_row, weight_step) = hidden.stride(), weight.stride()
    steps = hidden_row | weight_row | hidden.shape[1] | hidden.data_ptr() | weight.data_ptr()
    wide = hidden_step == 1 and weight_step == 1 and steps & 15 == 0
    return tuning.lookup(kernel, dtype=hidden.dtype, head_dim=weight.shape[0] if wide else 1, device=hidden.device)


def launch_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    z_loss: float,
    *,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on checked arguments; see `igpt_kernels.linear_cross_entropy`.

    Args:
        hidden: [M,C] float16, bfloat16 or float32; any strides.
        weight: [V,C], of its dtype.
        target: int64 [M].
        ignore_index: target of rows that do not count.
        z_loss: factor of the squared log-sum-exp.
        config: tile sizes and warps; the shipped ones for this device when None.

    Returns:
        loss [M] and log-sum-exp [M], float32, natural logarithm. A row that does not count has loss 0, one whose target is no
        class NaN.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    loss = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    lse = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return loss, lse
    if config is None:
        config = _shipped("cross_entropy_forward", hidden, weight)
    with on_device(hidden):
        launch(
            _cross_entropy_forward_kernel, (ceil_div(rows, config.block_m),),
            hidden, weight, target, loss, lse, *hidden.stride(), *weight.stride(), target.stride(0),
            rows, vocab, width, ignore_index, z_loss, **_tile(config, hidden),
        )  # fmt: skip
    return loss, lse


class _Gradients:
    """dhidden and float32 dweight of [M,C] rows and a [V,C] weight, some rows at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, chunk: int | None,
        config: tuning.Config | None,
    ) -> None:  # fmt: skip
        (rows, width), vocab = hidden.shape, weight.shape[0]
        if config is None:
            config = tuning.lookup("cross_entropy_gradient", dtype=hidden.dtype, head_dim=vocab, device=hidden.device)
        if config.block_n < vocab:
            raise ValueError(f"config.block_n must be at least the number of classes {vocab}, got {config.block_n}")
        self.hidden, self.weight, self.config = hidden, weight, config
        self.need_hidden, self.need_weight = need_hidden, need_weight
        self.dhidden = torch.empty(rows if need_hidden else 0, width, dtype=hidden.dtype, device=hidden.device)
        self.dweight = torch.zeros(vocab if need_weight else 0, width, dtype=torch.float32, device=hidden.device)
        columns = ceil_div(vocab, 16) * 16
        self.chunk = rows_at_once(columns, hidden.device) if chunk is None else chunk
        # Rows begin at multiples of 32 bytes, so that loads are wide. What fills a row up is 0: a product may read beyond its
        # last value and multiply by 0 (oneDNN with AMX tiles on bfloat16 does), and NaN times 0 is NaN.
        padded = torch.empty(min(self.chunk, rows), columns, dtype=hidden.dtype, device=hidden.device)
        padded[:, vocab:].zero_()
        self.logits = padded[:, :vocab]

    def make(self, target: Tensor, grad: Tensor, loss: Tensor | None, ignore_index: int, z_loss: float) -> None:
        """Fill dhidden, dweight and `loss`; `grad` is that of each row's loss, [M] float32 of any stride."""
        rows, config = self.hidden.shape[0], self.config
        for start in range(0, rows, self.chunk):
            part = slice(start, min(start + self.chunk, rows))
            some, logits = self.hidden[part], self.logits[: part.stop - start]
            torch.mm(some, self.weight.t(), out=logits)
            with on_device(logits):
                launch(
                    _cross_entropy_gradient_kernel, (ceil_div(some.shape[0], config.block_m),),
                    logits, target[part], grad[part], None if loss is None else loss[part],
                    logits.stride(0), target.stride(0), grad.stride(0), some.shape[0], ignore_index, z_loss,
                    V=logits.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                    num_warps=config.num_warps, num_stages=1,
                )  # fmt: skip
            if self.need_hidden:
                torch.mm(logits, self.weight, out=self.dhidden[part])
            if self.need_weight:
                add_product(self.dweight, logits, some)


def launch_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool = True,
    need_weight: bool = True,
    *,
    config: tuning.Config | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch products and kernel, some rows at a time; arguments as for the forward launcher, and

    Args:
        grad: of each row's loss, [M] float32, any stride.
        lse: from the forward launcher; not read. The logits made here are rounded, and p is normed by their own sum.
        need_hidden: False leaves dhidden away.
        need_weight: False leaves dweight away.
        config: rows, warps, and as many columns as there are classes; the shipped ones for this device when None.
        chunk: rows at a time; as many as have 2²⁴ logits when None.

    Returns:
        dhidden [M,C] and dweight [V,C] in the dtype of `hidden`; one that is not needed has no rows. Parts of dweight are
        added in float32.
    """
    gradients = _Gradients(hidden, weight, need_hidden, need_weight, chunk, config)
    gradients.make(target, grad, None, ignore_index, z_loss)
    return gradients.dhidden, gradients.dweight.to(hidden.dtype)


def launch_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    z_loss: float,
    mean: bool,
    need_hidden: bool = True,
    need_weight: bool = True,
    *,
    config: tuning.Config | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what makes the sum or mean of all losses and its gradients; arguments as for the other launchers, and

    Args:
        mean: over the rows that count.

    Returns:
        The loss, a float32 number; dhidden [M,C] in the dtype of `hidden`; dweight [V,C] in float32. With `mean` and float16
        the gradients are those of the sum: see `igpt_kernels._torch.loss.mean_is_folded`.
    """
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    count = rows_that_count(target, ignore_index, torch.float32, mean)
    each = count.reciprocal() if mean_is_folded(hidden.dtype) else torch.ones_like(count)
    gradients = _Gradients(hidden, weight, need_hidden, need_weight, chunk, config)
    gradients.make(target, each.expand_as(losses), losses, ignore_index, z_loss)
    return losses.sum() / count, gradients.dhidden, gradients.dweight


def launch_cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    """``gradient`` (contiguous, float16, bfloat16 or float32) times a number on its device, in place; what is 0 stays 0."""
    _scale(gradient, factor, gradient)


def launch_cross_entropy_scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in a new tensor of `dtype`."""
    out = torch.empty(*gradient.shape, dtype=dtype, device=gradient.device)
    _scale(gradient, factor, out)
    return out


def _scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    count = gradient.numel()
    if count == 0:
        return
    with on_device(gradient):
        launch(
            _cross_entropy_scale_kernel, (ceil_div(count, _SCALED),),
            gradient, factor, out, count, IN_PLACE=gradient is out, BLOCK=_SCALED, num_warps=4,
        )  # fmt: skip
