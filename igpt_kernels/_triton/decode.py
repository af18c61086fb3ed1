"""Decoding: one query a sequence against a cache of keys, split over the keys and merged by log-sum-exp.

One query leaves nothing for tensor cores; the time is that of reading the keys and values once. So the keys of one head
are split over enough programs to fill the chip (Dao et al. 2023, "Flash-Decoding"), in a fixed order: no atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._triton.common import LN2, LOG2E, ceil_div, load_part, on_device, power_of_2
from igpt_kernels._triton.launch import launch
from igpt_kernels.tensors import empty_heads

MAX_SPLITS = 64


@triton.jit
def finish(m, l, acc):  # noqa: E741
    """Merge independent running softmaxes, one a row: maxima m, sums l, weighted sums acc -> out [WIDTH], lse (natural)."""
    top = tl.max(m, 0)
    fully_masked = top == float("-inf")
    weight = tl.math.exp2(m - tl.where(fully_masked, 0.0, top))
    total = tl.sum(l * weight, 0)
    total = tl.where(fully_masked, 1.0, total)
    out = tl.sum(acc * weight[:, None], 0) / total
    lse = tl.where(fully_masked, float("-inf"), (top + tl.math.log2(total)) * LN2)
    return out, lse


@triton.jit
def decode_step(q, k, v, seen, m, l, acc):  # noqa: E741
    """Take one key a row into the rows' running softmaxes; where not `seen`, nothing."""
    s = tl.where(seen, tl.sum(k * q[None, :], 1), float("-inf"))
    m_new = tl.maximum(m, s)
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s - finite)
    shrink = tl.math.exp2(m - finite)
    return m_new, l * shrink + p, acc * shrink[:, None] + p[:, None] * v


@triton.jit(do_not_specialize=["H", "Tmax", "length", "splits"])
def _decode_kernel(
    Q, K, V, Lengths, Out, Lse,  # q [B,H,1,D], k, v [B,H,Tmax,D] of any strides; out [B·H,splits,D], lse [B·H,splits]
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    H, Tmax, length, splits, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys of one split of one head."""
    head = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    if Lengths is None:
        n = length
    else:
        # Lengths on a GPU were not checked by the host; outside the cache there is nothing to read.
        n = tl.minimum(tl.maximum(tl.load(Lengths + batch).to(tl.int32), 0), Tmax)
    chunk = tl.cdiv(tl.cdiv(n, splits), BLOCK_N) * BLOCK_N
    first = split * chunk
    last = tl.minimum(first + chunk, n)

    dims = tl.arange(0, WIDTH)
    q_ptrs = Q + batch * stride_qb + h * stride_qh + dims.to(tl.int64) * stride_qd
    q = tl.load(q_ptrs, mask=dims < D, other=0.0).to(tl.float32) * (scale * LOG2E)
    slots = tl.arange(0, BLOCK_N)
    k_base = K + batch * stride_kb + h * stride_kh
    v_base = V + batch * stride_vb + h * stride_vh
    k_offset = slots.to(tl.int64) * stride_kt
    v_offset = slots.to(tl.int64) * stride_vt
    # Each row of the tile keeps a softmax of its own, so no iteration waits for the other warps; they meet once, at the end.
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        key_offset = tl.cast(start, tl.int64)
        seen = start + slots < last
        k = load_part(k_base + key_offset * stride_kt, k_offset, seen, stride_kd, D, 0, WIDTH, True).to(tl.float32)
        v = load_part(v_base + key_offset * stride_vt, v_offset, seen, stride_vd, D, 0, WIDTH, True).to(tl.float32)
        m, l, acc = decode_step(q, k, v, seen, m, l, acc)  # noqa: E741
    out, lse = finish(m, l, acc)
    row = head.to(tl.int64) * splits + split
    tl.store(Out + row * D + dims, out.to(Out.dtype.element_ty), mask=dims < D)
    tl.store(Lse + row, lse)


@triton.jit(do_not_specialize=["splits"])
def _decode_merge_kernel(
    Parts, PartLse, Out, Lse,  # parts [B·H,splits,D] and their lse, both float32 -> out [B·H,D], lse [B·H]
    splits,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits of one head, merged."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    dims = tl.arange(0, WIDTH)
    lse = tl.load(PartLse + head * splits + part, mask=part < splits, other=float("-inf")) * LOG2E
    mask = (part < splits)[:, None] & (dims < D)[None, :]
    parts = tl.load(Parts + (head * splits + part)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    out, total = finish(lse, tl.where(lse == float("-inf"), 0.0, 1.0), parts)
    tl.store(Out + head * D + dims, out.to(Out.dtype.element_ty), mask=dims < D)
    tl.store(Lse + head, total)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132, an H100's, for the CPU tensors of interpreter and audit."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def count_splits(rows: int, keys: int, device: torch.device) -> int:
    """Splits of the keys: enough for four programs a processor, none shorter than 128 keys, at most 64.

    An H100 reads 64 MiB of keys and values at 2.6 TB/s with four; at 2.3 TB/s with two (a copy moves 3.0 TB/s).
    """
    return max(1, min(ceil_div(4 * processors(device), rows), ceil_div(keys, 128), MAX_SPLITS))


def launch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    scale: float,
    *,
    config: tuning.Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch decoding on checked arguments; see `igpt_kernels.decode_attention`.

    Args:
        q: [B,H,1,D] float16, bfloat16 or float32, D <= 256; any strides.
        k_cache: [B,H,Tmax,D].
        v_cache: [B,H,Tmax,D].
        length: keys visible, one number for all or an integer tensor [B] on the same device, clamped to the cache. With a
            tensor nothing depends on its values, so the launch can be captured in a CUDA graph.
        scale: factor of the scores.
        config: keys in a tile (block_n) and warps; the shipped ones for this device when None.
        splits: programs that share the keys of one head; chosen from the size of the chip when None.

    Returns:
        out [B,H,1,D] in memory [B,1,H,D], dtype of q, and lse [B,H,1] float32, natural logarithm.
    """
    batch, heads, _, head_dim = q.shape
    longest = k_cache.shape[2]
    rows = batch * heads
    out = empty_heads(q, 1)
    lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = tuning.lookup("decode", dtype=q.dtype, head_dim=head_dim, device=q.device)
    if splits is None:
        splits = count_splits(rows, length if isinstance(length, int) else longest, q.device)
    # One split writes the result; several write float32 parts for the merge.
    parts = out if splits == 1 else torch.empty(rows, splits, head_dim, dtype=torch.float32, device=q.device)
    part_lse = lse if splits == 1 else torch.empty(rows, splits, dtype=torch.float32, device=q.device)
    width = power_of_2(head_dim)
    with on_device(q):
        launch(
            _decode_kernel, (rows * splits,),
            q, k_cache, v_cache, None if isinstance(length, int) else length, parts, part_lse,
            q.stride(0), q.stride(1), q.stride(3), *k_cache.stride(), *v_cache.stride(),
            heads, longest, length if isinstance(length, int) else 0, splits, scale,
            D=head_dim, WIDTH=width, BLOCK_N=config.block_n, **config.options,
        )  # fmt: skip
        if splits > 1:
            launch(
                _decode_merge_kernel, (rows,),
                parts, part_lse, out, lse, splits,
                D=head_dim, WIDTH=width, SPLITS=power_of_2(splits), num_warps=4,
            )  # fmt: skip
    return out, lse
