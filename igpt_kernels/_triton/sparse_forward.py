"""Block-sparse attention, forward: the tiles of keys that a pattern's lists name, gathered from tokens in raster order.

A pattern is one or more disjoint parts (`igpt_kernels.block_lists`), each a launch; a later part takes in the output of those
before by its log-sum-exp. Shapes of tiles, sizes and lists are runtime values: no pattern and no size compiles anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import layouts, tuning
from igpt_kernels._triton.common import (
    LN2,
    LOG2E,
    accumulate,
    head_arguments,
    heads_in_l2,
    load_box,
    load_tile,
    on_device,
    place_tile,
    scores,
    store_tile,
    zeros,
)
from igpt_kernels._triton.descriptors import read_by, takes_own_box
from igpt_kernels._triton.launch import launch
from igpt_kernels.block_lists import BlockLists
from igpt_kernels.tensors import empty_heads


@triton.jit
def tile_tokens(y, x, slots, cols, pitch, T):
    """Tokens of the elements `slots` of a tile of `cols` columns whose first is in row y, column x; which of them exist."""
    col = slots % cols
    token = (y + slots // cols) * pitch + x + col
    return token, (x + col < pitch) & (token < T)


@triton.jit
def first_place(tile, rows, cols, pitch):
    """Row and column of the first token of a tile, by its number."""
    across = tl.cdiv(pitch, cols)
    return tile // across * rows, tile % across * cols


@triton.jit
def load_entry(Places, MaskIds, j, end):
    """Entry j of a list of tiles: row, column, mask; beyond `end` what nothing uses.

    Read one tile ahead and carried through the loop: then no load of a tile waits for another load.
    """
    inside = j < end
    y = tl.load(Places + 2 * j, mask=inside, other=0)
    x = tl.load(Places + 2 * j + 1, mask=inside, other=0)
    return y, x, tl.load(MaskIds + j, mask=inside, other=-1)


@triton.jit
def load_words(Masks, mask, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Words of mask number `mask`, 32 columns each: four tensors [ROWS], of which a narrow tile repeats the first.

    Below 0 all ones. Loaded beside the tile, so that its scores need not wait for them.
    """
    base = Masks + (mask * ROWS + tl.arange(0, ROWS)) * ((COLS + 31) // 32)
    some = tl.full([ROWS], mask, tl.int32) >= 0
    w0 = tl.load(base, mask=some, other=-1)
    w1, w2, w3 = w0, w0, w0
    if COLS > 32:
        w1 = tl.load(base + 1, mask=some, other=-1)
    if COLS > 64:
        w2 = tl.load(base + 2, mask=some, other=-1)
        w3 = tl.load(base + 3, mask=some, other=-1)
    return w0, w1, w2, w3


@triton.jit
def visible_pairs(w0, w1, w2, w3, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bits of the words as bools [ROWS, COLS]."""
    col = tl.arange(0, COLS)
    word = tl.broadcast_to(w0[:, None], [ROWS, COLS])
    if COLS > 32:
        word = tl.where((col // 32 == 1)[None, :], w1[:, None], word)
    if COLS > 64:
        word = tl.where((col // 32 == 2)[None, :], w2[:, None], word)
        word = tl.where((col // 32 == 3)[None, :], w3[:, None], word)
    return ((word >> (col % 32)[None, :]) & 1) != 0


@triton.jit(do_not_specialize=["heads", "LAYOUT_HEADS", "H", "T", "pitch", "q_rows", "q_cols", "k_cols", "tiles", "group"])
def _sparse_forward_kernel(
    Q, K, V, Q1, K1, V1,  # q, k, v [B,H,T,D] of any strides, or descriptors of their column parts; see `descriptors.read_by`
    Out, Lse, PartialOut, PartialLse,  # out and what was before in memory [B,T,H,D]; lse [B,H,T]
    Heads, Ptr, Keys, MaskIds, Masks,  # heads [LAYOUT_HEADS]; lists of `BlockLists`
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    heads, LAYOUT_HEADS, H, T, pitch, q_rows, q_cols, k_cols, tiles, group, scale,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, BOXES: tl.constexpr, OWN_BOX: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. `PartialOut` and `PartialLse` are of the parts before, in memory of their own."""
    tile, head = place_tile(tl.program_id(0), tiles, heads, group, True)
    batch = (head // LAYOUT_HEADS).to(tl.int64)
    h = tl.load(Heads + head % LAYOUT_HEADS).to(tl.int64)
    y, x = first_place(tile, q_rows, q_cols, pitch)
    rows, row_ok = tile_tokens(y, x, tl.arange(0, BLOCK_M), q_cols, pitch, T)
    scale_log2 = scale * LOG2E
    row_offset = rows.to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    inner_col = cols % k_cols
    inner = cols // k_cols * pitch + inner_col

    if OWN_BOX:
        q0, q1 = load_box(Q, Q1, batch, h, y, x, BLOCK_M, DA, DB, DOT)
    else:
        q_base = Q + batch * stride_qb + h * stride_qh
        q0, q1 = load_tile(q_base, row_offset * stride_qt, row_ok, stride_qd, D, DA, DB, DOT, True)
    if not BOXES:
        k_base = K + batch * stride_kb + h * stride_kh
        v_base = V + batch * stride_vb + h * stride_vh
        k_offset = inner.to(tl.int64) * stride_kt
        v_offset = inner.to(tl.int64) * stride_vt
    lse_offset = (batch * H + h) * T + rows
    out_offset = (batch * T * H + h) * D
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc0, acc1 = zeros(BLOCK_M, DA, DB)

    begin = tl.load(Ptr + tile)
    end = tl.load(Ptr + tile + 1)
    y, x, mask = load_entry(Keys, MaskIds, begin, end)
    for j in tl.range(begin, end):
        if BOXES:
            k0, k1 = load_box(K, K1, batch, h, y, x, BLOCK_N, DA, DB, DOT)
            v0, v1 = load_box(V, V1, batch, h, y, x, BLOCK_N, DA, DB, DOT)
        else:
            token = y * pitch + x
            col_ok = (inner_col < pitch - x) & (inner < T - token)
            i = tl.cast(token, tl.int64)
            k0, k1 = load_tile(k_base + i * stride_kt, k_offset, col_ok, stride_kd, D, DA, DB, DOT, True)
            v0, v1 = load_tile(v_base + i * stride_vt, v_offset, col_ok, stride_vd, D, DA, DB, DOT, True)
        w0, w1, w2, w3 = load_words(Masks, mask, BLOCK_M, BLOCK_N)
        s = scores(q0, q1, k0, k1, DB)
        if mask >= 0:
            s = tl.where(visible_pairs(w0, w1, w2, w3, BLOCK_M, BLOCK_N), s, float("-inf"))
        y, x, mask = load_entry(Keys, MaskIds, j + 1, end)
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN.
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(s * scale_log2 - finite[:, None])
        shrink = tl.math.exp2(m - finite)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        acc0 = acc0 * shrink[:, None]
        if DB > 0:
            acc1 = acc1 * shrink[:, None]
        acc0, acc1 = accumulate(p, v0, v1, acc0, acc1, DB)
        m = m_new

    if PartialOut is not None:
        # Merge earlier parts: treat them as one softmax with max = lse and sum = 1. Here and not before the loop,
        # where their output would hold registers (D = 96 spilled).
        partial_lse = tl.load(PartialLse + lse_offset, mask=row_ok, other=float("-inf")) * LOG2E
        top = tl.maximum(m, partial_lse)
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.math.exp2(m - finite)
        partial_weight = tl.math.exp2(partial_lse - finite)
        partial0, partial1 = load_tile(PartialOut + out_offset, row_offset * H * D, row_ok, 1, D, DA, DB, tl.float32, True)
        acc0 = acc0 * weight[:, None] + partial0 * partial_weight[:, None]
        if DB > 0:
            acc1 = acc1 * weight[:, None] + partial1 * partial_weight[:, None]
        l = l * weight + partial_weight  # noqa: E741
        m = top
    # l == 0 exactly for fully masked rows; NaN propagates.
    fully_masked = l == 0
    l = tl.where(fully_masked, 1.0, l)  # noqa: E741
    lse = tl.where(fully_masked, float("-inf"), (m + tl.math.log2(l)) * LN2)
    tl.store(Lse + lse_offset, lse, mask=row_ok)
    store_tile(Out + out_offset, row_offset * H * D, row_ok, acc0 / l[:, None], acc1 / l[:, None], D, DA, DB)


Group = tuple[str, Sequence[int]]
"""The key of a layout, and the heads that use it."""


@functools.lru_cache(maxsize=256)
def head_numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads of a group, int32 on the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def parts_of(
    groups: Sequence[Group], config: tuning.Config, device: torch.device
) -> Iterator[tuple[Tensor, BlockLists, bool, int]]:
    """What is launched: heads, lists, whether these are the first of these heads, and how many follow."""
    for key, heads in groups:
        numbers = head_numbers(tuple(heads), device)
        lists = layouts.lists_on(key, config.block_m, config.block_n, device)
        last = len(lists) - 1
        for i, part in enumerate(lists):
            yield numbers, part, i == 0, last - i


def most_parts(groups: Sequence[Group], config: tuning.Config) -> int:
    """Parts of the layout that has most of them."""
    return max(len(layouts.lists_of(key, config.block_m, config.block_n)) for key, _ in groups)


def buffers(final: Tensor, parts: int) -> list[Tensor]:
    """Where the parts of a layout write, by how many parts follow: `final` for the last, float32 for those before it.

    A part reads what the part before it wrote, at the next number of the list. The two never share memory: some layouts of
    registers hold a row in several warps, and then one warp may store before another has loaded.

    Cost: for two parts one float32 tensor, for three or more a second one unless `final` is float32 and takes its place.
    """
    made = [final]
    while len(made) < parts:
        if len(made) > 2:
            made.append(made[-2])
        elif len(made) == 2 and final.dtype == torch.float32:
            made.append(final)
        elif final.dim() == 4:
            made.append(empty_heads(final, dtype=torch.float32))
        else:
            made.append(torch.empty(*final.shape, dtype=torch.float32, device=final.device))
    return made


def launch_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float, *, config: tuning.Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on checked arguments; see `igpt_kernels.block_sparse_attention`.

    Args:
        q: [B,H,T,D] float16, bfloat16 or float32, D <= 256; any strides.
        k: [B,H,T,D].
        v: [B,H,T,D].
        groups: layouts with their heads; every head once.
        scale: factor of the scores, above 0.
        config: tile sizes and warps; the shipped ones for this device when None.

    Returns:
        out [B,H,T,D] in memory [B,T,H,D], dtype of q, and lse [B,H,T] float32, natural logarithm.
    """
    batch, heads, tokens, head_dim = q.shape
    out = empty_heads(q, tokens)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = tuning.lookup("sparse_forward", dtype=q.dtype, head_dim=head_dim, device=q.device)
    head = head_arguments(q, config)
    parts = most_parts(groups, config)
    outs, lses = buffers(out, parts), buffers(lse, parts)
    own_box = takes_own_box(head_dim)
    for numbers, lists, first, left in parts_of(groups, config, q.device):
        count = numbers.shape[0]
        rows = batch * count
        tiles = lists.q_tiles
        shapes = (lists.q_tile if own_box else None, lists.k_tile, lists.k_tile)
        boxed, operands = read_by(config, (q, k, v), shapes, [lists.pitch] * 3, (head["DA"], head["DB"]))
        with on_device(q):
            launch(
                _sparse_forward_kernel, (tiles * rows,),
                *operands, outs[left], lses[left], *((None, None) if first else (outs[left + 1], lses[left + 1])),
                numbers, lists.q_ptr, lists.q_keys, lists.q_masks, lists.masks,
                *q.stride(), *k.stride(), *v.stride(),
                rows, count, heads, tokens, lists.pitch, *lists.q_tile, lists.k_tile[1],
                tiles, heads_in_l2(rows, tokens, head_dim, q.element_size()), scale,
                **head, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BOXES=boxed, OWN_BOX=boxed and own_box,
                **config.options,
            )  # fmt: skip
    return out, lse
