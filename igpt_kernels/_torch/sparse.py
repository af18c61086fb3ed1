"""Block-sparse attention by torch: tiles of keys gathered for each tile of queries, into batches of small attentions.

On the CPU a batch runs in torch's flash kernel, elsewhere as matrix products. Memory is linear in tokens: tiles are gathered
a few at a time. Where a pattern touches most of a small square, one attention with a dense mask is cheaper and is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from igpt_kernels import layouts
from igpt_kernels._torch.attention import cpu_backward, cpu_forward, dense_rows, merge
from igpt_kernels._torch.sparse_plan import BLOCK, Plan, plan
from igpt_kernels.caches import kept
from igpt_kernels.layouts import registered
from igpt_kernels.tensors import accumulation_dtype, zero_heads

CHUNK_BYTES = 16 << 20
"""Gathered keys and values of one batch of tiles. Measured at 128², R = 7, 8 heads of 64: 4 to 32 MiB are alike."""

DENSE_BYTES = 64 << 20
"""Largest dense mask that is taken because it is cheaper."""

BLOCK_COST = 2.0
"""A gathered tile costs up to twice a dense one: it is copied, and its gradient is added up."""

FUSED = ("cpu",)
"""Device types with torch's flash kernel that takes masks and gives the log-sum-exp."""

Group = tuple[str, Sequence[int]]


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [N,n,Tq,D] with an additive mask [n or 1,Tq,Tk] of 0 and -inf; fully masked rows give 0 and -inf."""
    q, k, v = dense_rows(q, k, v)
    if q.device.type in FUSED:
        mask = None if bias is None else bias[None].to(q.dtype).expand(q.shape[0], q.shape[1], -1, -1)
        out, lse = cpu_forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    else:
        scores = (q @ k.transpose(-1, -2)).to(accumulation_dtype(q.dtype)) * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = torch.exp(scores - lse[..., None]).to(q.dtype) @ v
    if bias is not None:
        fully_masked = (bias == -torch.inf).all(-1)
        out, lse = out.masked_fill(fully_masked[..., None], 0.0), lse.masked_fill(fully_masked, -torch.inf)
    return out, lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`, given output and log-sum-exp of the whole row, of which these keys may be a part."""
    # A row that sees nothing anywhere: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    grad, q, k, v, out = dense_rows(grad, q, k, v, out)
    if q.device.type in FUSED:
        # In float32: torch 2.13's kernel takes 1.1 to 2.5 times as long for bfloat16 and 3 to 4 times for float16.
        grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))
        mask = None if bias is None else bias[None].expand(q.shape[0], q.shape[1], -1, -1)
        return cpu_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)).to(lse.dtype) * scale
    p = torch.exp((scores if bias is None else scores + bias) - lse[..., None])
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    ds = (p * ((grad @ v.transpose(-1, -2)).to(lse.dtype) - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad


def _gather(x: Tensor, tokens: Tensor, tiles: int) -> Tensor:
    """Rows [N,T,...] of the tokens, as tiles [N,tiles,rows,...]."""
    return x.index_select(1, tokens).view(x.shape[0], tiles, -1, *x.shape[2:])


def _chunks(part: Plan, heads: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Slices of tiles with the tokens and tiles of their keys and their additive masks, small enough to gather."""
    bias = part.bias.to(heads.device, accumulation_dtype(heads.dtype))
    everything = len(bias) - 1
    for batch in part.batches:
        count, width = batch.key_tiles.shape
        if width == 0:
            continue
        size = 2 * heads.shape[0] * width * BLOCK * heads.shape[2] * heads.element_size()
        step = max(1, CHUNK_BYTES // size)
        for start in range(0, count, step):
            stop = min(start + step, count)
            ids = batch.masks if len(batch.masks) == 1 else batch.masks[start:stop]
            additive = None
            if not bool((ids == everything).all()):
                additive = bias[ids.to(heads.device)].permute(0, 2, 1, 3).reshape(len(ids), BLOCK, width * BLOCK)
            tiles = slice(batch.tiles.start + start, batch.tiles.start + stop)
            yield tiles, batch.keys[start:stop].reshape(-1), batch.key_tiles[start:stop].reshape(-1), additive


def _rows(tiles: slice) -> slice:
    return slice(tiles.start * BLOCK, tiles.stop * BLOCK)


def _part_forward(part: Plan, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """One part of a pattern: q, k, v [N,T,D] -> out [N,T,D], lse [N,T]."""
    device = q.device
    out = q.new_zeros(q.shape[0], len(part.queries), q.shape[2])
    lse = q.new_full(out.shape[:2], -torch.inf, dtype=accumulation_dtype(q.dtype))
    for tiles, tokens, _, bias in _chunks(part, q):
        count, rows = tiles.stop - tiles.start, _rows(tiles)
        tokens = tokens.to(device)
        some_q = _gather(q, part.queries[rows].to(device), count)
        some_out, some_lse = attend(some_q, _gather(k, tokens, count), _gather(v, tokens, count), bias=bias, scale=scale)
        out[:, rows], lse[:, rows] = some_out.flatten(1, 2), some_lse.flatten(1, 2)
    back = part.query_place.to(device)
    return out.index_select(1, back), lse.index_select(1, back)


def _part_backward(
    part: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part [N,T,D], in float32 (float64)."""
    device, kind = q.device, accumulation_dtype(q.dtype)
    dq = q.new_zeros(q.shape[0], len(part.queries), q.shape[2], dtype=kind)
    dk, dv = (k.new_zeros(k.shape[0], part.key_tiles, BLOCK * k.shape[2], dtype=kind) for _ in range(2))
    for tiles, tokens, numbers, bias in _chunks(part, q):
        count, rows = tiles.stop - tiles.start, _rows(tiles)
        tokens, numbers = tokens.to(device), numbers.to(device)
        of_queries = (_gather(x, part.queries[rows].to(device), count) for x in (grad, q, out, lse))
        some_grad, some_q, some_out, some_lse = of_queries
        some_k, some_v = _gather(k, tokens, count), _gather(v, tokens, count)
        gradients = _attend_backward(some_grad, some_q, some_k, some_v, some_out, some_lse, bias=bias, scale=scale)
        dq[:, rows] = gradients[0].flatten(1, 2).to(kind)
        for total, mine in zip((dk, dv), gradients[1:], strict=True):
            total.index_add_(1, numbers, mine.reshape(total.shape[0], len(numbers), -1).to(kind))
    dq = dq.index_select(1, part.query_place.to(device))
    dk, dv = (x.view(x.shape[0], -1, q.shape[2]).index_select(1, part.key_place.to(device)) for x in (dk, dv))
    return dq, dk, dv


@kept
def _dense_bias(key: str) -> Tensor | None:
    """The dense additive mask [1,T,T] of a layout where it is small and mostly touched tiles, else None."""
    lists = layouts.lists_of(key, BLOCK, BLOCK)
    tokens = registered(key).tokens
    gathered = BLOCK_COST * BLOCK * BLOCK * sum(part.blocks for part in lists)
    if 4 * tokens * tokens > DENSE_BYTES or gathered < tokens * tokens:
        return None
    return torch.zeros(1, tokens, tokens).masked_fill(~registered(key).dense_mask(), -torch.inf)


def rows_of_heads(x: Tensor, members: Sequence[int]) -> Tensor:
    """The rows [N,T,D] of some heads of x [B,H,T,D], contiguous."""
    if len(members) < x.shape[1]:
        x = x[:, list(members)]
    return x.contiguous().flatten(0, 1)


def sparse_forward(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float) -> tuple[Tensor, Tensor]:
    """The step "forward" of block-sparse attention: out [B,H,T,D] in memory [B,T,H,D], lse [B,H,T]."""
    batch, _, tokens, head_dim = q.shape
    out = zero_heads(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    if q.numel() == 0:
        return out, lse
    for key, members in groups:
        some = [rows_of_heads(x, members) for x in (q, k, v)]
        bias = _dense_bias(key)
        if bias is not None:
            bias = bias.to(q.device, accumulation_dtype(q.dtype))
            mine, log = (x.squeeze(1) for x in attend(*(x[:, None] for x in some), bias=bias, scale=scale))
        else:
            parts = len(layouts.lists_of(key, BLOCK, BLOCK))
            mine, log = _part_forward(plan(key, 0), *some, scale=scale)
            for part in range(1, parts):
                mine, log = merge(mine.to(log.dtype), log, *_part_forward(plan(key, part), *some, scale=scale))
        out[:, list(members)] = mine.to(q.dtype).view(batch, len(members), tokens, head_dim)
        lse[:, list(members)] = log.view(batch, len(members), tokens)
    return out, lse


def sparse_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The step "backward" of block-sparse attention: dq, dk, dv [B,H,T,D] in memory [B,T,H,D]."""
    batch, _, tokens, head_dim = q.shape
    dq, dk, dv = (zero_heads(q) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    for key, members in groups:
        some = [rows_of_heads(x, members) for x in (grad, q, k, v, out)]
        some.append(rows_of_heads(lse[..., None], members).squeeze(-1))
        bias = _dense_bias(key)
        if bias is not None:
            bias = bias.to(q.device, accumulation_dtype(q.dtype))
            wide = [x[:, None] for x in some]
            gradients = [x.squeeze(1) for x in _attend_backward(*wide, bias=bias, scale=scale)]
        else:
            gradients = list(_part_backward(plan(key, 0), *some, scale=scale))
            for part in range(1, len(layouts.lists_of(key, BLOCK, BLOCK))):
                for total, more in zip(gradients, _part_backward(plan(key, part), *some, scale=scale), strict=True):
                    total += more
        for result, gradient in zip((dq, dk, dv), gradients, strict=True):
            result[:, list(members)] = gradient.to(q.dtype).view(batch, len(members), tokens, head_dim)
    return dq, dk, dv
