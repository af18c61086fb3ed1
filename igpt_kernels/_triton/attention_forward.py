"""Flash attention, forward: softmax(scale·q·kᵀ)·v without the T x T scores (Dao et al. 2022, 2023)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from igpt_kernels import tuning
from igpt_kernels._triton.common import (
    LN2,
    LOG2E,
    accumulate,
    ceil_div,
    head_arguments,
    heads_in_l2,
    load_tile,
    on_device,
    place_tile,
    scores,
    store_tile,
    zeros,
)
from igpt_kernels._triton.launch import launch
from igpt_kernels.tensors import empty_heads


@triton.jit
def softmax_step(q0, q1, k0, k1, v0, v1, acc0, acc1, m, l, visible, scale_log2, MASKED: tl.constexpr, DB: tl.constexpr):  # noqa: E741
    """Take one tile of keys into the running softmax: m maximum in units of log2, l sum, acc weighted sum of values."""
    s = scores(q0, q1, k0, k1, DB)
    if MASKED:
        s = tl.where(visible, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN.
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(s - finite[:, None])
        shrink = tl.math.exp2(m - finite)
    else:
        # scale is not negative, so it moves out of the maximum and into one multiply-add per score.
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.math.exp2(s * scale_log2 - m_new[:, None])
        shrink = tl.math.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)  # noqa: E741
    acc0 = acc0 * shrink[:, None]
    if DB > 0:
        acc1 = acc1 * shrink[:, None]
    acc0, acc1 = accumulate(p, v0, v1, acc0, acc1, DB)
    return acc0, acc1, m_new, l


@triton.jit(do_not_specialize=["heads", "H", "Tq", "Tk", "offset", "group"])
def _flash_forward_kernel(
    Q, K, V, Out, Lse,  # q [B,H,Tq,D], k, v [B,H,Tk,D] of any strides; out in memory [B,Tq,H,D]; lse [B,H,Tq]
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    heads, H, Tq, Tk, offset, group, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Query i sees key j when j <= i + offset; full attention is offset = Tk."""
    tile, head = place_tile(tl.program_id(0), tl.cdiv(Tq, BLOCK_M), heads, group, True)
    batch = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    row_ok = rows < Tq
    cols = tl.arange(0, BLOCK_N)
    scale_log2 = scale * LOG2E

    q_base = Q + batch * stride_qb + h * stride_qh
    q0, q1 = load_tile(q_base, rows.to(tl.int64) * stride_qt, row_ok, stride_qd, D, DA, DB, DOT, True)
    k_base = K + batch * stride_kb + h * stride_kh
    v_base = V + batch * stride_vb + h * stride_vh
    k_offset = cols.to(tl.int64) * stride_kt
    v_offset = cols.to(tl.int64) * stride_vt
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc0, acc1 = zeros(BLOCK_M, DA, DB)

    # Keys below `full` are seen by every row of the tile; the few tiles from there to `end` need a mask. They come first and
    # without prefetch: two pipelined loops in one kernel make ptxas wait for each WGMMA (its warning C7515).
    full = tl.minimum(tl.maximum(first + offset + 1, 0), Tk) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.maximum(tl.minimum(first + BLOCK_M, Tq) + offset, 0), Tk)
    for start in tl.range(full, end, BLOCK_N, num_stages=1):
        key_offset = tl.cast(start, tl.int64)
        col_ok = start + cols < Tk
        visible = col_ok[None, :] & ((start + cols)[None, :] <= (rows + offset)[:, None])
        k0, k1 = load_tile(k_base + key_offset * stride_kt, k_offset, col_ok, stride_kd, D, DA, DB, DOT, True)
        v0, v1 = load_tile(v_base + key_offset * stride_vt, v_offset, col_ok, stride_vd, D, DA, DB, DOT, True)
        acc0, acc1, m, l = softmax_step(q0, q1, k0, k1, v0, v1, acc0, acc1, m, l, visible, scale_log2, True, DB)  # noqa: E741
    for start in tl.range(0, full, BLOCK_N):
        key_offset = tl.cast(start, tl.int64)
        k0, k1 = load_tile(k_base + key_offset * stride_kt, k_offset, row_ok, stride_kd, D, DA, DB, DOT, False)
        v0, v1 = load_tile(v_base + key_offset * stride_vt, v_offset, row_ok, stride_vd, D, DA, DB, DOT, False)
        acc0, acc1, m, l = softmax_step(q0, q1, k0, k1, v0, v1, acc0, acc1, m, l, row_ok, scale_log2, False, DB)  # noqa: E741

    # l == 0 exactly for fully masked rows; NaN propagates.
    fully_masked = l == 0
    l = tl.where(fully_masked, 1.0, l)  # noqa: E741
    lse = tl.where(fully_masked, float("-inf"), (m + tl.math.log2(l)) * LN2)
    tl.store(Lse + head.to(tl.int64) * Tq + rows, lse, mask=row_ok)
    out_base = Out + (batch * Tq * H + h) * D
    acc0 = acc0 / l[:, None]
    acc1 = acc1 / l[:, None]
    store_tile(out_base, rows.to(tl.int64) * H * D, row_ok, acc0, acc1, D, DA, DB)


@functools.cache
def _gluon_launcher() -> Callable[..., None] | None:
    """The launcher of the Gluon kernel; None where this Triton has no Gluon for Hopper."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return None
    try:
        from igpt_kernels._triton.attention_gluon import launch_flash_forward_gluon
    except ImportError:
        return None
    return launch_flash_forward_gluon


def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability kernels are compiled for; (0, 0) without a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    try:
        arch = driver.active.get_current_target().arch
    except RuntimeError:  # Triton's "0 active drivers"
        return 0, 0
    return divmod(arch, 10) if isinstance(arch, int) else (0, 0)


def gluon_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Gluon kernel runs on these tensors, here.

    It takes 16-bit values, head dims up to 128 and at least one key. The copy engine (TMA) reads tensors whose last stride
    is 1. Their other strides must be multiples of 16 bytes and not 0, and so must the address. Rows of the output follow the
    same rule, so the head dim is a multiple of 8. It needs compute capability 9.0 and Triton 3.6 or later, and no interpreter.
    """
    if triton.knobs.runtime.interpret or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not q.dtype == k.dtype == v.dtype or q.shape[3] > 128 or q.shape[3] % 8 or not q.numel() or not k.numel():
        return False
    for x in (q, k, v):
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(stride <= 0 or stride % 8 for stride in x.stride()[:3]):
            return False
    return _capability(q.device) == (9, 0) and _gluon_launcher() is not None


def without_gluon(head_dim: int) -> tuning.Config:
    """What stands in for a configuration with ``gluon`` where the Gluon kernel cannot run, whatever its numbers.

    The fastest of this kernel on an H100 at head dims 64, 96, 128 and 256 (docs/tuning-log.md).
    """
    if head_dim <= 96:
        return tuning.Config(128, 64, 8, 3, 0 if head_dim <= 64 else 128)
    return tuning.Config(128, 128, 8, 3) if head_dim <= 128 else tuning.Config(128, 64, 8, 2)


def launch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *, config: tuning.Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on checked arguments; see `igpt_kernels.flash_attention`.

    Args:
        q: [B,H,Tq,D] float16, bfloat16 or float32, D <= 256; any strides.
        k: [B,H,Tk,D].
        v: [B,H,Tk,D].
        causal: query i sees key j when ``j <= i + Tk - Tq``.
        scale: factor of the scores, not negative.
        config: tile sizes and warps; the shipped ones for this device when None. With ``gluon`` the Gluon kernel runs where
            `gluon_takes` the tensors, else this kernel as `without_gluon` says.

    Returns:
        out [B,H,Tq,D] in memory [B,Tq,H,D], dtype of q, and lse [B,H,Tq] float32, natural logarithm.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    out = empty_heads(q, queries)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = tuning.lookup("flash_forward", dtype=q.dtype, head_dim=head_dim, device=q.device)
    if config.gluon:
        run = _gluon_launcher() if gluon_takes(q, k, v) else None
        if run is not None:
            with on_device(q):
                run(q, k, v, out, lse, causal, scale, config)
            return out, lse
        config = without_gluon(head_dim)
    grid = (ceil_div(queries, config.block_m) * batch * heads,)
    with on_device(q):
        launch(
            _flash_forward_kernel, grid,
            q, k, v, out, lse,
            *q.stride(), *k.stride(), *v.stride(),
            batch * heads, heads, queries, keys, keys - queries if causal else keys,
            heads_in_l2(batch * heads, keys, head_dim, q.element_size()), scale,
            **head_arguments(q, config), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            **config.options,
        )  # fmt: skip
    return out, lse
