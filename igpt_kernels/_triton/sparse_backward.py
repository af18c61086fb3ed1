"""Block-sparse attention, backward: as `flash_backward`, two passes and no atomics, over the tiles that a pattern's lists name.

One kernel walks the queries of a tile of keys (dK, dV); the other the keys of a tile of queries (dQ). Later parts of a
pattern add to the sums of the parts before, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._triton.attention_backward import key_step, launch_flash_delta
from igpt_kernels._triton.common import (
    LOG2E,
    accumulate,
    head_arguments,
    heads_in_l2,
    load_box,
    load_rows,
    load_tile,
    on_device,
    place_tile,
    scores,
    store_tile,
    zeros,
)
from igpt_kernels._triton.descriptors import read_by, read_rows_by, takes_own_box
from igpt_kernels._triton.launch import launch
from igpt_kernels._triton.sparse_forward import (
    Group,
    buffers,
    first_place,
    load_entry,
    load_words,
    most_parts,
    parts_of,
    tile_tokens,
    visible_pairs,
)
from igpt_kernels.tensors import empty_heads


@triton.jit
def add_tile(x0, x1, base, row_offset, row_ok, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Both column parts plus the rows at `row_offset`, float32."""
    y0, y1 = load_tile(base, row_offset, row_ok, 1, D, DA, DB, tl.float32, True)
    if DB > 0:
        x1 = x1 + y1
    return x0 + y0, x1


@triton.jit(do_not_specialize=["heads", "LAYOUT_HEADS", "H", "T", "pitch", "k_rows", "k_cols", "q_cols", "tiles", "group"])
def _sparse_backward_keys_kernel(
    Q, K, V, Grad, Q1, K1, V1, Grad1, Lse, Delta,  # tensors of any strides, or descriptors; see `descriptors.read_by`
    DK, DV, PartialDK, PartialDV,  # dk, dv and what was before in memory [B,T,H,D]
    Heads, Ptr, Queries, MaskIds, Masks,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    heads, LAYOUT_HEADS, H, T, pitch, k_rows, k_cols, q_cols, tiles, group, scale, factor,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, BOXES: tl.constexpr, ROW_BOXES: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one head; `factor` is the scale in the last part, 1 in those before."""
    tile, head = place_tile(tl.program_id(0), tiles, heads, group, False)
    batch = (head // LAYOUT_HEADS).to(tl.int64)
    h = tl.load(Heads + head % LAYOUT_HEADS).to(tl.int64)
    y, x = first_place(tile, k_rows, k_cols, pitch)
    cols, col_ok = tile_tokens(y, x, tl.arange(0, BLOCK_N), k_cols, pitch, T)
    key_offset = cols.to(tl.int64)
    scale_log2 = scale * LOG2E
    slots = tl.arange(0, BLOCK_M)
    inner_col = slots % q_cols
    inner = slots // q_cols * pitch + inner_col

    if BOXES:
        k0, k1 = load_box(K, K1, batch, h, y, x, BLOCK_N, DA, DB, DOT)
        v0, v1 = load_box(V, V1, batch, h, y, x, BLOCK_N, DA, DB, DOT)
    else:
        k_base = K + batch * stride_kb + h * stride_kh
        v_base = V + batch * stride_vb + h * stride_vh
        k0, k1 = load_tile(k_base, key_offset * stride_kt, col_ok, stride_kd, D, DA, DB, DOT, True)
        v0, v1 = load_tile(v_base, key_offset * stride_vt, col_ok, stride_vd, D, DA, DB, DOT, True)
        q_base = Q + batch * stride_qb + h * stride_qh
        g_base = Grad + batch * stride_gb + h * stride_gh
        q_offset = inner.to(tl.int64) * stride_qt
        g_offset = inner.to(tl.int64) * stride_gt
    base = (batch * T * H + h) * D
    dk0, dk1 = zeros(BLOCK_N, DA, DB)
    dv0, dv1 = zeros(BLOCK_N, DA, DB)
    row_base = (batch * H + h) * T

    begin = tl.load(Ptr + tile)
    end = tl.load(Ptr + tile + 1)
    y, x, mask = load_entry(Queries, MaskIds, begin, end)
    for j in tl.range(begin, end):
        token = y * pitch + x
        row_ok = (inner_col < pitch - x) & (inner < T - token)
        if BOXES:
            q0, q1 = load_box(Q, Q1, batch, h, y, x, BLOCK_M, DA, DB, DOT)
            g0, g1 = load_box(Grad, Grad1, batch, h, y, x, BLOCK_M, DA, DB, DOT)
        else:
            i = tl.cast(token, tl.int64)
            q0, q1 = load_tile(q_base + i * stride_qt, q_offset, row_ok, stride_qd, D, DA, DB, DOT, True)
            g0, g1 = load_tile(g_base + i * stride_gt, g_offset, row_ok, stride_gd, D, DA, DB, DOT, True)
        if ROW_BOXES:
            lse = load_rows(Lse, batch, h, y, x, BLOCK_M)
            delta = load_rows(Delta, batch, h, y, x, BLOCK_M)
        else:
            lse = tl.load(Lse + row_base + token + inner, mask=row_ok, other=0.0)
            delta = tl.load(Delta + row_base + token + inner, mask=row_ok, other=0.0)
        w0, w1, w2, w3 = load_words(Masks, mask, BLOCK_N, BLOCK_M)
        visible = visible_pairs(w0, w1, w2, w3, BLOCK_N, BLOCK_M)
        dk0, dk1, dv0, dv1 = key_step(
            q0, q1, g0, g1, k0, k1, v0, v1, lse * LOG2E, delta, dk0, dk1, dv0, dv1, visible, scale_log2, DB, False
        )
        y, x, mask = load_entry(Queries, MaskIds, j + 1, end)

    if PartialDK is not None:
        dk0, dk1 = add_tile(dk0, dk1, PartialDK + base, key_offset * H * D, col_ok, D, DA, DB)
    store_tile(DK + base, key_offset * H * D, col_ok, dk0 * factor, dk1 * factor, D, DA, DB)
    if PartialDV is not None:
        dv0, dv1 = add_tile(dv0, dv1, PartialDV + base, key_offset * H * D, col_ok, D, DA, DB)
    store_tile(DV + base, key_offset * H * D, col_ok, dv0, dv1, D, DA, DB)


@triton.jit(do_not_specialize=["heads", "LAYOUT_HEADS", "H", "T", "pitch", "q_rows", "q_cols", "k_cols", "tiles", "group"])
def _sparse_backward_queries_kernel(
    Q, K, V, Grad, Q1, K1, V1, Grad1, Lse, Delta,
    DQ, PartialDQ,  # dq and what was before in memory [B,T,H,D]
    Heads, Ptr, Keys, MaskIds, Masks,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gd,
    heads, LAYOUT_HEADS, H, T, pitch, q_rows, q_cols, k_cols, tiles, group, scale, factor,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, BOXES: tl.constexpr, OWN_BOX: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head; `factor` is the scale in the last part, 1 in those before."""
    tile, head = place_tile(tl.program_id(0), tiles, heads, group, True)
    batch = (head // LAYOUT_HEADS).to(tl.int64)
    h = tl.load(Heads + head % LAYOUT_HEADS).to(tl.int64)
    y, x = first_place(tile, q_rows, q_cols, pitch)
    rows, row_ok = tile_tokens(y, x, tl.arange(0, BLOCK_M), q_cols, pitch, T)
    query_offset = rows.to(tl.int64)
    scale_log2 = scale * LOG2E
    slots = tl.arange(0, BLOCK_N)
    inner_col = slots % k_cols
    inner = slots // k_cols * pitch + inner_col

    if OWN_BOX:
        q0, q1 = load_box(Q, Q1, batch, h, y, x, BLOCK_M, DA, DB, DOT)
        g0, g1 = load_box(Grad, Grad1, batch, h, y, x, BLOCK_M, DA, DB, DOT)
    else:
        q_base = Q + batch * stride_qb + h * stride_qh
        g_base = Grad + batch * stride_gb + h * stride_gh
        q0, q1 = load_tile(q_base, query_offset * stride_qt, row_ok, stride_qd, D, DA, DB, DOT, True)
        g0, g1 = load_tile(g_base, query_offset * stride_gt, row_ok, stride_gd, D, DA, DB, DOT, True)
    if not BOXES:
        k_base = K + batch * stride_kb + h * stride_kh
        v_base = V + batch * stride_vb + h * stride_vh
        k_offset = inner.to(tl.int64) * stride_kt
        v_offset = inner.to(tl.int64) * stride_vt
    base = (batch * T * H + h) * D
    dq0, dq1 = zeros(BLOCK_M, DA, DB)
    row_base = (batch * H + h) * T
    lse = tl.load(Lse + row_base + rows, mask=row_ok, other=0.0) * LOG2E
    delta = tl.load(Delta + row_base + rows, mask=row_ok, other=0.0)

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
        p = tl.math.exp2(scores(q0, q1, k0, k1, DB) * scale_log2 - lse[:, None])
        if mask >= 0:
            # After the exponential, as in key_step.
            p = tl.where(visible_pairs(w0, w1, w2, w3, BLOCK_M, BLOCK_N), p, 0.0)
        ds = p * (scores(g0, g1, v0, v1, DB) - delta[:, None])
        dq0, dq1 = accumulate(ds, k0, k1, dq0, dq1, DB)
        y, x, mask = load_entry(Keys, MaskIds, j + 1, end)

    if PartialDQ is not None:
        dq0, dq1 = add_tile(dq0, dq1, PartialDQ + base, query_offset * H * D, row_ok, D, DA, DB)
    store_tile(DQ + base, query_offset * H * D, row_ok, dq0 * factor, dq1 * factor, D, DA, DB)


def launch_sparse_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: Sequence[Group],
    scale: float,
    *,
    key_config: tuning.Config | None = None,
    query_config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels on what the forward kernel took and gave.

    Args:
        grad: gradient of the output [B,H,T,D]; any strides, 0 too.
        q: [B,H,T,D].
        k: [B,H,T,D].
        v: [B,H,T,D].
        out: output of the forward kernel.
        lse: its log-sum-exp [B,H,T] float32, contiguous.
        groups: as in the forward kernel.
        scale: as in the forward kernel.
        key_config: tiles and warps of the dK, dV kernel; the shipped ones when None.
        query_config: tiles and warps of the dQ kernel; the shipped ones when None.

    Returns:
        dq, dk, dv of the shape and dtype of q, in memory [B,T,H,D].
    """
    batch, heads, tokens, head_dim = q.shape
    dq, dk, dv = (empty_heads(q, tokens) for _ in range(3))
    if dq.numel() == 0:
        return dq, dk, dv
    delta = launch_flash_delta(grad, out)
    if key_config is None:
        key_config = tuning.lookup("sparse_backward_keys", dtype=q.dtype, head_dim=head_dim, device=q.device)
    if query_config is None:
        query_config = tuning.lookup("sparse_backward_queries", dtype=q.dtype, head_dim=head_dim, device=q.device)
    dks, dvs = (buffers(x, most_parts(groups, key_config)) for x in (dk, dv))
    dqs = buffers(dq, most_parts(groups, query_config))
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    key_head, query_head = head_arguments(q, key_config), head_arguments(q, query_config)
    tensors = (q, k, v, grad)

    def sizes(count: int, tiles: int) -> tuple[int, int]:
        return tiles, heads_in_l2(batch * count, tokens, head_dim, q.element_size())

    with on_device(q):
        for numbers, lists, first, left in parts_of(groups, key_config, q.device):
            count = numbers.shape[0]
            tiles, group = sizes(count, lists.k_tiles)
            shapes = (lists.q_tile, lists.k_tile, lists.k_tile, lists.q_tile)
            boxed, operands = read_by(key_config, tensors, shapes, [lists.pitch] * 4, (key_head["DA"], key_head["DB"]))
            row_boxes, stats = read_rows_by(boxed, (lse, delta), lists.q_tile, lists.pitch)
            launch(
                _sparse_backward_keys_kernel, (tiles * batch * count,),
                *operands, *stats, dks[left], dvs[left], *((None, None) if first else (dks[left + 1], dvs[left + 1])),
                numbers, lists.k_ptr, lists.k_queries, lists.k_masks, lists.key_masks, *strides,
                batch * count, count, heads, tokens, lists.pitch, *lists.k_tile, lists.q_tile[1],
                tiles, group, scale, 1.0 if left else scale,
                **key_head, BLOCK_M=key_config.block_m, BLOCK_N=key_config.block_n, BOXES=boxed, ROW_BOXES=row_boxes,
                **key_config.options,
            )  # fmt: skip
        for numbers, lists, first, left in parts_of(groups, query_config, q.device):
            count = numbers.shape[0]
            tiles, group = sizes(count, lists.q_tiles)
            q_tile = lists.q_tile if takes_own_box(head_dim) else None
            own = (q_tile, lists.k_tile, lists.k_tile, q_tile)
            boxed, operands = read_by(query_config, tensors, own, [lists.pitch] * 4, (query_head["DA"], query_head["DB"]))
            own_box = boxed and q_tile is not None
            launch(
                _sparse_backward_queries_kernel, (tiles * batch * count,),
                *operands, lse, delta, dqs[left], None if first else dqs[left + 1],
                numbers, lists.q_ptr, lists.q_keys, lists.q_masks, lists.masks, *strides,
                batch * count, count, heads, tokens, lists.pitch, *lists.q_tile, lists.k_tile[1],
                tiles, group, scale, 1.0 if left else scale,
                **query_head, BLOCK_M=query_config.block_m, BLOCK_N=query_config.block_n, BOXES=boxed, OWN_BOX=own_box,
                **query_config.options,
            )  # fmt: skip
    return dq, dk, dv
