"""Block-sparse attention by torch: tiles of keys gathered for each tile of queries, into batches of small attentions.

On the CPU a batch runs in torch's flash kernel, elsewhere as matrix products. Memory is linear in tokens: tiles are gathered
a few at a time. Where a pattern touches most of a small square, one attention with a dense mask is cheaper and is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from igpt_kernels import blocks
from igpt_kernels._torch.attention import merge
from igpt_kernels.layouts import registered

CHUNK_BYTES = 16 << 20
"""Gathered keys and values of one batch of tiles. Measured at 128², R = 7, 8 heads of 64: 4 to 32 MiB are alike."""
DENSE_BYTES = 64 << 20
"""Largest dense mask that is taken because it is cheaper."""
BLOCK_COST = 2.0
"""A gathered tile costs up to twice a dense one: it is copied, and its gradient is added up."""
BLOCK = 64
FUSED = ("cpu",)
"""Device types with torch's flash kernel that takes masks and gives the log-sum-exp."""

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Group = tuple[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles of queries that see equally many tiles of keys.

    Attributes:
        tiles: where the batch lies in the order of the plan.
        keys: [n, s·BLOCK] tokens of the keys of each tile.
        key_tiles: [n, s] numbers of their tiles.
        masks: [n, s] mask numbers, or [1, s] where all n tiles have the same.
    """

    tiles: slice
    keys: Tensor
    key_tiles: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """One part of a pattern as batches: queries in an order of tiles, and the way back to raster order."""

    queries: Tensor
    """[tiles·BLOCK] tokens, tile by tile."""
    query_place: Tensor
    """[T] where each token lies in `queries`."""
    key_place: Tensor
    """[T] where each token lies in the tiles of keys."""
    key_tiles: int
    batches: tuple[Batch, ...]
    bias: Tensor
    """[masks + 2, BLOCK, BLOCK] float32: 0 or -inf; the last but one hides all, the last hides nothing."""


def _tokens(first: np.ndarray, tile: tuple[int, int], lists: blocks.BlockLists) -> np.ndarray:
    """Tokens of the tiles that begin at `first`; those beyond the image, which no mask shows, become a token inside it."""
    i = np.arange(tile[0] * tile[1])
    return np.minimum(first[:, None] + i // tile[1] * lists.pitch + i % tile[1], lists.tokens - 1)


def _places(tile: tuple[int, int], lists: blocks.BlockLists, position: np.ndarray) -> np.ndarray:
    """Where each token lies, when tile number t stands at ``position[t]``."""
    token = np.arange(lists.tokens)
    y, x = token // lists.pitch, token % lists.pitch
    number = y // tile[0] * -(-lists.pitch // tile[1]) + x // tile[1]
    return position[number] * (tile[0] * tile[1]) + y % tile[0] * tile[1] + x % tile[1]


def _first_tokens(tile: tuple[int, int], lists: blocks.BlockLists, count: int) -> np.ndarray:
    across = -(-lists.pitch // tile[1])
    number = np.arange(count)
    return number // across * tile[0] * lists.pitch + number % across * tile[1]


def _groups(lists: blocks.BlockLists) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Tiles of queries that run together: their numbers, how many tiles of keys each gets, whether all have equal masks.

    Tiles with equal masks share one; the rest are padded to 1, 2, 3, 4, 6, 8, 12, ... tiles of keys, a third too many at most.
    """
    pointer = lists.q_ptr.numpy()
    masks = lists.q_masks.numpy()
    alike: dict[bytes, list[int]] = {}
    for tile in range(len(pointer) - 1):
        alike.setdefault(masks[pointer[tile] : pointer[tile + 1]].tobytes(), []).append(tile)
    others: dict[int, list[int]] = {}
    for members in alike.values():
        count = int(pointer[members[0] + 1] - pointer[members[0]])
        if len(members) >= 4 or count == 0:
            yield np.array(members), count, True
            continue
        half = 1 << max(count - 1, 0).bit_length() >> 1
        padded = count if count <= 4 else half + half // 2 if count <= half + half // 2 else 2 * half
        others.setdefault(padded, []).extend(members)
    for padded, members in others.items():
        yield np.array(members), padded, False


@functools.lru_cache(maxsize=64)
def plan(key: str, part: int) -> Plan:
    """The batches of one part of a registered layout."""
    lists = blocks.block_lists(key, BLOCK, BLOCK)[part]
    pointer, firsts, masks = (x.numpy() for x in (lists.q_ptr, lists.q_keys, lists.q_masks))
    hidden, full = len(lists.masks), len(lists.masks) + 1
    rows, cols = lists.k_tile
    numbers = firsts // lists.pitch // rows * -(-lists.pitch // cols) + firsts % lists.pitch // cols
    batches = []
    order: list[int] = []
    for members, width, same in _groups(lists):
        entries = pointer[members][:, None] + np.arange(width)
        inside = entries < pointer[members + 1][:, None]
        entries = np.where(inside, entries, 0)
        ids = np.where(inside, np.where(masks[entries] == blocks.FULL, full, masks[entries]), hidden) if width else entries
        first = np.where(inside, firsts[entries], 0) if width else entries
        tokens = _tokens(first.reshape(-1), lists.k_tile, lists).reshape(len(members), width * BLOCK)
        batches.append(
            Batch(
                tiles=slice(len(order), len(order) + len(members)),
                keys=torch.from_numpy(tokens),
                key_tiles=torch.from_numpy(np.where(inside, numbers[entries], 0) if width else entries),
                masks=torch.from_numpy(ids[:1] if same else ids),
            )
        )
        order.extend(members.tolist())
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    queries = _tokens(_first_tokens(lists.q_tile, lists, len(order))[order], lists.q_tile, lists)
    bits = torch.cat(
        [lists.bits(), torch.zeros(1, BLOCK, BLOCK, dtype=torch.bool), torch.ones(1, BLOCK, BLOCK, dtype=torch.bool)]
    )
    key_tiles = len(lists.k_ptr) - 1
    return Plan(
        queries=torch.from_numpy(queries.reshape(-1)),
        query_place=torch.from_numpy(_places(lists.q_tile, lists, position)),
        key_place=torch.from_numpy(_places(lists.k_tile, lists, np.arange(key_tiles))),
        key_tiles=key_tiles,
        batches=tuple(batches),
        bias=torch.zeros(bits.shape).masked_fill(~bits, -torch.inf),
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [N,n,Tq,D] with an additive mask [n or 1,Tq,Tk] of 0 and -inf; blind rows give 0 and -inf."""
    if q.device.type in FUSED:
        mask = None if bias is None else bias[None].to(q.dtype).expand(q.shape[0], q.shape[1], -1, -1)
        out, lse = _cpu_forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    else:
        scores = (q @ k.transpose(-1, -2)).to(_sum_dtype(q.dtype)) * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = torch.exp(scores - lse[..., None]).to(q.dtype) @ v
    if bias is not None:
        blind = (bias == -torch.inf).all(-1)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_attend`, given output and log-sum-exp of the whole row, of which these keys may be a part."""
    # A row that sees nothing anywhere: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    if q.device.type in FUSED:
        # In float32: torch 2.13's kernel takes 1.1 to 2.5 times as long for bfloat16 and 3 to 4 times for float16.
        grad, q, k, v, out = (x.to(lse.dtype) for x in (grad, q, k, v, out))
        mask = None if bias is None else bias[None].expand(q.shape[0], q.shape[1], -1, -1)
        return _cpu_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)).to(lse.dtype) * scale
    p = torch.exp((scores if bias is None else scores + bias) - lse[..., None])
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    ds = (p * ((grad @ v.transpose(-1, -2)).to(lse.dtype) - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(q.dtype).transpose(-1, -2) @ grad


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather(x: Tensor, tokens: Tensor, tiles: int) -> Tensor:
    """Rows [N,T,...] of the tokens, as tiles [N,tiles,rows,...]."""
    return x.index_select(1, tokens).view(x.shape[0], tiles, -1, *x.shape[2:])


def _chunks(part: Plan, heads: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Slices of tiles with the tokens and tiles of their keys and their additive masks, small enough to gather."""
    bias = part.bias.to(heads.device, _sum_dtype(heads.dtype))
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
    lse = q.new_full(out.shape[:2], -torch.inf, dtype=_sum_dtype(q.dtype))
    for tiles, tokens, _, bias in _chunks(part, q):
        count, rows = tiles.stop - tiles.start, _rows(tiles)
        tokens = tokens.to(device)
        some_q = _gather(q, part.queries[rows].to(device), count)
        some_out, some_lse = _attend(some_q, _gather(k, tokens, count), _gather(v, tokens, count), bias=bias, scale=scale)
        out[:, rows], lse[:, rows] = some_out.flatten(1, 2), some_lse.flatten(1, 2)
    back = part.query_place.to(device)
    return out.index_select(1, back), lse.index_select(1, back)


def _part_backward(
    part: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part [N,T,D], in float32 (float64)."""
    device, kind = q.device, _sum_dtype(q.dtype)
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


@functools.lru_cache(maxsize=16)
def _dense_bias(key: str) -> Tensor | None:
    """The dense additive mask [1,T,T] of a layout where it is small and touched tiles are most of it, else None."""
    lists = blocks.block_lists(key, BLOCK, BLOCK)
    tokens = registered(key).tokens
    gathered = BLOCK_COST * BLOCK * BLOCK * sum(part.blocks for part in lists)
    if 4 * tokens * tokens > DENSE_BYTES or gathered < tokens * tokens:
        return None
    return torch.zeros(1, tokens, tokens).masked_fill(~registered(key).dense_mask(), -torch.inf)


def _heads(x: Tensor, members: Sequence[int]) -> Tensor:
    """The rows [N,T,D] of some heads of x [B,H,T,D], contiguous."""
    if len(members) < x.shape[1]:
        x = x[:, list(members)]
    return x.contiguous().flatten(0, 1)


def sparse_forward(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::sparse_forward`` by torch: out [B,H,T,D] in memory [B,T,H,D], lse [B,H,T]."""
    batch, heads, tokens, head_dim = q.shape
    out = q.new_zeros(batch, tokens, heads, head_dim).transpose(1, 2)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_sum_dtype(q.dtype))
    if q.numel() == 0:
        return out, lse
    for key, members in groups:
        some = [_heads(x, members) for x in (q, k, v)]
        bias = _dense_bias(key)
        if bias is not None:
            bias = bias.to(q.device, _sum_dtype(q.dtype))
            mine, log = (x.squeeze(1) for x in _attend(*(x[:, None] for x in some), bias=bias, scale=scale))
        else:
            parts = len(blocks.block_lists(key, BLOCK, BLOCK))
            mine, log = _part_forward(plan(key, 0), *some, scale=scale)
            for part in range(1, parts):
                mine, log = merge(mine.to(log.dtype), log, *_part_forward(plan(key, part), *some, scale=scale))
        out[:, list(members)] = mine.to(q.dtype).view(batch, len(members), tokens, head_dim)
        lse[:, list(members)] = log.view(batch, len(members), tokens)
    return out, lse


def sparse_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``igpt_kernels::sparse_backward`` by torch: dq, dk, dv [B,H,T,D] in memory [B,T,H,D]."""
    batch, heads, tokens, head_dim = q.shape
    dq, dk, dv = (q.new_zeros(batch, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    for key, members in groups:
        some = [_heads(x, members) for x in (grad, q, k, v, out)]
        some.append(_heads(lse[..., None], members).squeeze(-1))
        bias = _dense_bias(key)
        if bias is not None:
            bias = bias.to(q.device, _sum_dtype(q.dtype))
            wide = [x[:, None] for x in some]
            gradients = [x.squeeze(1) for x in _attend_backward(*wide, bias=bias, scale=scale)]
        else:
            gradients = list(_part_backward(plan(key, 0), *some, scale=scale))
            for part in range(1, len(blocks.block_lists(key, BLOCK, BLOCK))):
                for total, more in zip(gradients, _part_backward(plan(key, part), *some, scale=scale), strict=True):
                    total += more
        for result, gradient in zip((dq, dk, dv), gradients, strict=True):
            result[:, list(members)] = gradient.to(q.dtype).view(batch, len(members), tokens, head_dim)
    return dq, dk, dv


def visible_keys(key: str, length: int | Tensor, longest: int, batch: int, device: torch.device) -> Tensor:
    """[B,Tmax] bool: the keys of a cache that the query at position ``length - 1`` sees under a registered layout."""
    layout = registered(key)
    position = torch.arange(longest, device=device)
    # Added, not made into a tensor: the length may be symbolic.
    lengths = length.to(device).long() if isinstance(length, Tensor) else position.new_zeros(1) + length
    query = (lengths - 1).clamp(min=0, max=layout.tokens - 1)[:, None]
    inside = position.clamp(max=layout.tokens - 1)[None, :]
    visible = layout._permits(query, inside) & (position < lengths[:, None]) & (position < layout.tokens)
    return visible.expand(batch, -1)


@functools.lru_cache(maxsize=4096)
def _keys_of(key: str, query: int) -> Tensor:
    return blocks.keys_of(key, query)


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::sparse_decode`` by torch: only keys that are seen are gathered."""
    batch, heads, _, head_dim = q.shape
    out = q.new_zeros(batch, 1, heads, head_dim).transpose(1, 2)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=_sum_dtype(q.dtype))
    if q.numel() == 0 or (lengths is None and length == 0):
        return out, lse
    for key, members in groups:
        some_q, some_k, some_v = (
            x if len(members) == heads else x[:, list(members)] for x in (q.contiguous(), k_cache, v_cache)
        )
        if lengths is None:
            # Non-causal patterns see ahead; a cache holds `length` keys.
            tokens = _keys_of(key, length - 1)
            tokens = tokens[: int(torch.searchsorted(tokens, length))].to(q.device)
            if len(tokens) == 0:
                continue
            mine, log = _attend(some_q, some_k.index_select(2, tokens), some_v.index_select(2, tokens), bias=None, scale=scale)
        else:
            visible = visible_keys(key, lengths, k_cache.shape[2], batch, q.device)
            most = int(visible.sum(-1).max())
            if most == 0:
                continue
            tokens = visible.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
            seen = visible.gather(-1, tokens)
            index = tokens[:, None, :, None].expand(-1, len(members), -1, head_dim)
            # What no key stands for may be NaN, and a weight of 0 would not stop it.
            hidden = ~seen[:, None, :, None]
            chosen = [x.gather(2, index).masked_fill(hidden, 0.0) for x in (some_k, some_v)]
            bias = torch.zeros(seen.shape, device=q.device, dtype=lse.dtype).masked_fill(~seen, -torch.inf)
            # One sequence is one "tile": [H,B,...], because masks differ by the second dimension.
            turned = [x.transpose(0, 1).contiguous() for x in (some_q, *chosen)]
            mine, log = (x.transpose(0, 1) for x in _attend(*turned, bias=bias[:, None], scale=scale))
        out[:, list(members)] = mine
        lse[:, list(members)] = log.to(lse.dtype)
    return out, lse
