"""Sparse decoding: one query a sequence, which reads only the keys of a cache that its pattern allows.

The query's row of bits in the lists of `igpt_kernels.block_lists` says which; keys without a bit are not loaded. The entries of
each part are split over programs and merged by log-sum-exp, as in `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import layouts, tuning
from igpt_kernels._triton.common import LOG2E, ceil_div, load_part, on_device, power_of_2
from igpt_kernels._triton.decode import _decode_merge_kernel, decode_step, finish, processors
from igpt_kernels._triton.launch import launch
from igpt_kernels._triton.sparse_forward import Group, head_numbers, tile_tokens
from igpt_kernels.tensors import empty_heads

MAX_SPLITS = 16


@triton.jit(
    do_not_specialize=[
        "LAYOUT_HEADS",
        "H",
        "T",
        "length",
        "pitch",
        "q_rows",
        "q_cols",
        "k_cols",
        "block_m",
        "splits",
        "slot",
        "slots",
    ]
)
def _sparse_decode_kernel(
    Q, K, V, Lengths, Out, Lse,  # q [B,H,1,D], k, v [B,H,Tmax,D] of any strides; out [B·H,slots,D], lse [B·H,slots]
    Heads, Ptr, Keys, MaskIds, Masks,
    stride_qb, stride_qh, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    LAYOUT_HEADS, H, T, length, pitch, q_rows, q_cols, k_cols, block_m, splits, slot, slots, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of the entries of one part of one head; its result goes to slot `slot` + split."""
    head = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (head // LAYOUT_HEADS).to(tl.int64)
    h = tl.load(Heads + head % LAYOUT_HEADS).to(tl.int64)
    if Lengths is None:
        n = length
    else:
        # Lengths on a GPU were not checked by the host; outside the image there is no pattern.
        n = tl.minimum(tl.maximum(tl.load(Lengths + batch).to(tl.int32), 0), T)
    query = tl.maximum(n - 1, 0)
    y = query // pitch
    x = query % pitch
    tile = y // q_rows * tl.cdiv(pitch, q_cols) + x // q_cols
    element = y % q_rows * q_cols + x % q_cols
    begin = tl.load(Ptr + tile)
    end = tl.where(n > 0, tl.load(Ptr + tile + 1), begin)
    chunk = tl.cdiv(end - begin, splits)
    first = begin + split * chunk
    last = tl.minimum(first + chunk, end)

    dims = tl.arange(0, WIDTH)
    q_ptrs = Q + batch * stride_qb + h * stride_qh + dims.to(tl.int64) * stride_qd
    q = tl.load(q_ptrs, mask=dims < D, other=0.0).to(tl.float32) * (scale * LOG2E)
    k_base = K + batch * stride_kb + h * stride_kh
    v_base = V + batch * stride_vb + h * stride_vh
    cols = tl.arange(0, BLOCK_N)
    words: tl.constexpr = (BLOCK_N + 31) // 32
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for j in tl.range(first, last):
        mask = tl.load(MaskIds + j)
        word = tl.load(Masks + (mask * block_m + element) * words + cols // 32, mask=(mask >= 0) & (cols >= 0), other=-1)
        token, exists = tile_tokens(tl.load(Keys + 2 * j), tl.load(Keys + 2 * j + 1), cols, k_cols, pitch, T)
        seen = exists & (((word >> (cols % 32)) & 1) != 0) & (token < n)
        key_offset = token.to(tl.int64)
        k = load_part(k_base, key_offset * stride_kt, seen, stride_kd, D, 0, WIDTH, True).to(tl.float32)
        v = load_part(v_base, key_offset * stride_vt, seen, stride_vd, D, 0, WIDTH, True).to(tl.float32)
        m, l, acc = decode_step(q, k, v, seen, m, l, acc)  # noqa: E741
    out, lse = finish(m, l, acc)
    row = (batch * H + h) * slots + slot + split
    tl.store(Out + row * D + dims, out, mask=dims < D)
    tl.store(Lse + row, lse)


def launch_sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    groups: Sequence[Group],
    scale: float,
    *,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch sparse decoding on checked arguments; see `igpt_kernels.decode_attention`.

    Args:
        q: [B,H,1,D] float16, bfloat16 or float32, D <= 256; any strides.
        k_cache: [B,H,Tmax,D], Tmax at least `length`.
        v_cache: [B,H,Tmax,D].
        length: keys so far, one number for all or an integer tensor [B] on the same device. With a tensor nothing depends on
            its values, so the launch can be captured in a CUDA graph.
        groups: layouts with their heads; every head once.
        scale: factor of the scores.
        config: queries (block_m) and keys (block_n) in a tile of the lists, and warps; the shipped ones when None.

    Returns:
        out [B,H,1,D] in memory [B,1,H,D], dtype of q, and lse [B,H,1] float32, natural logarithm.
    """
    batch, heads, _, head_dim = q.shape
    rows = batch * heads
    out = empty_heads(q, 1)
    lse = torch.empty(batch, heads, 1, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = tuning.lookup("sparse_decode", dtype=q.dtype, head_dim=head_dim, device=q.device)
    width = power_of_2(head_dim)
    # Two programs a processor, and at least two entries for each.
    most = max(1, min(ceil_div(2 * processors(q.device), rows), MAX_SPLITS))
    plan = []
    for key, members in groups:
        slot = 0
        for lists in layouts.lists_on(key, config.block_m, config.block_n, q.device):
            splits = max(1, min(most, lists.longest // 2))
            plan.append((head_numbers(tuple(members), q.device), lists, splits, slot))
            slot += splits
    slots = max(slot + splits for _, _, splits, slot in plan)
    # Heads with fewer parts than others leave slots unwritten: an lse of -inf, and zeros.
    parts = torch.zeros(rows, slots, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.full((rows, slots), float("-inf"), dtype=torch.float32, device=q.device)
    with on_device(q):
        for numbers, lists, splits, slot in plan:
            launch(
                _sparse_decode_kernel, (batch * numbers.shape[0] * splits,),
                q, k_cache, v_cache, None if isinstance(length, int) else length, parts, part_lse,
                numbers, lists.q_ptr, lists.q_keys, lists.q_masks, lists.masks,
                q.stride(0), q.stride(1), q.stride(3), *k_cache.stride(), *v_cache.stride(),
                numbers.shape[0], heads, lists.tokens, length if isinstance(length, int) else 0,
                lists.pitch, *lists.q_tile, lists.k_tile[1], config.block_m, splits, slot, slots, scale,
                D=head_dim, WIDTH=width, BLOCK_N=config.block_n, **config.options,
            )  # fmt: skip
        launch(
            _decode_merge_kernel, (rows,),
            parts, part_lse, out, lse, slots,
            D=head_dim, WIDTH=width, SPLITS=power_of_2(slots), num_warps=4,
        )  # fmt: skip
    return out, lse
