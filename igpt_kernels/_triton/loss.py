"""Cross-entropy of a linear layer whose logits are never in memory: logits = hidden·weightᵀ, a tile at a time.

Forward, one program owns some rows and walks over the classes with a running maximum and sum (as attention does). Backward,
some thousand rows at a time: a kernel computes their logits once more and writes the gradient of the logits. 16 MiB of it stay
in the L2 cache. Two products of torch's make of it dhidden and this part of dweight. With p = softmax::

    loss = lse - logit[target] + z·lse²      dlogit = grad·(p·(1 + 2·z·lse) - onehot(target))

Every sum has one order, so the bits are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._torch.loss import add_product, rows_at_once
from igpt_kernels._triton.common import LOG2E, ceil_div, dot_dtype, on_device
from igpt_kernels._triton.launch import launch

_BYTES = 128
"""What of a row one step takes: a line of the cache, and the widest swizzle of shared memory."""


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


@triton.jit(do_not_specialize=["M", "V", "ignore_index", "z_loss"])
def _cross_entropy_backward_kernel(
    Grad, Hidden, Weight, Target, Lse, Out,  # grad [M] of any stride; lse [M] float32; out [M,V], rows stride_om apart
    stride_g, stride_hm, stride_hc, stride_wv, stride_wc, stride_t, stride_om,
    M, V, C, ignore_index, z_loss,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of logits; neighbours in the grid share their rows."""
    tiles = tl.cdiv(V, BLOCK_N)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < M
    s = logits_tile(
        Hidden, Weight, tl.minimum(rows, M - 1), tl.minimum(cols, V - 1), stride_hm, stride_hc, stride_wv, stride_wc, C,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, DOT,
    )  # fmt: skip
    target, counts = load_target(Target, rows, row_ok, stride_t, V, ignore_index)
    lse = tl.load(Lse + rows, mask=row_ok, other=0.0)
    grad = tl.load(Grad + rows.to(tl.int64) * stride_g, mask=row_ok, other=0.0)
    p = tl.math.exp2((s - lse[:, None]) * LOG2E)
    d = p * (grad * (1.0 + 2.0 * z_loss * lse))[:, None] - tl.where(cols[None, :] == target[:, None], grad[:, None], 0.0)
    # Not by a factor of 0: the mean over no rows at all has the gradient inf.
    d = tl.where(counts[:, None], d, 0.0)
    ptrs = Out + (rows.to(tl.int64) * stride_om)[:, None] + cols[None, :]
    tl.store(ptrs, d.to(Out.dtype.element_ty), mask=row_ok[:, None] & (cols < V)[None, :])


def _tile(config: tuning.Config, x: Tensor) -> dict[str, object]:
    """The compile-time arguments of both kernels."""
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
    """Launch the backward kernel and the products, some rows at a time; arguments as for the forward launcher, and

    Args:
        grad: of each row's loss, [M] float32, any stride.
        lse: [M], from the forward launcher.
        need_hidden: False leaves dhidden away.
        need_weight: False leaves dweight away.
        chunk: rows at a time; as many as have 2²³ logits when None.

    Returns:
        dhidden [M,C] and dweight [V,C] in the dtype of `hidden`; one that is not needed has no rows. Parts of dweight are
        added in float32.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    dhidden = torch.empty(rows if need_hidden else 0, width, dtype=hidden.dtype, device=hidden.device)
    total = torch.zeros(vocab if need_weight else 0, width, dtype=torch.float32, device=hidden.device)
    if config is None:
        config = _shipped("cross_entropy_backward", hidden, weight)
    chunk = rows_at_once(vocab, hidden.device) if chunk is None else chunk
    # Rows begin at multiples of 16 bytes, as the products want them. What fills a row up is 0: a product may read beyond its
    # last value and multiply by 0 (oneDNN with AMX tiles on bfloat16 does), and NaN times 0 is NaN.
    padded = torch.empty(min(chunk, rows), ceil_div(vocab, 8) * 8, dtype=hidden.dtype, device=hidden.device)
    dlogits, _ = padded[:, :vocab], padded[:, vocab:].zero_()
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        size = part.stop - start
        some, out = hidden[part], dlogits[:size]
        grid = (ceil_div(size, config.block_m) * ceil_div(vocab, config.block_n),)
        with on_device(hidden):
            launch(
                _cross_entropy_backward_kernel, grid,
                grad[part], some, weight, target[part], lse[part], out,
                grad.stride(0), *hidden.stride(), *weight.stride(), target.stride(0), out.stride(0),
                size, vocab, width, ignore_index, z_loss, **_tile(config, hidden),
            )  # fmt: skip
        if need_hidden:
            torch.mm(out, weight, out=dhidden[part])
        if need_weight:
            add_product(total, out.t(), some)
    return dhidden, total.to(hidden.dtype)
