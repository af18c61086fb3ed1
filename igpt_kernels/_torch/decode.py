"""Decoding by torch: one query a sequence against a cache, dense, or gathering the keys that a layout lets it see."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_kernels import layouts
from igpt_kernels._torch.attention import cpu_forward, dense_rows, flash_attention, flash_forward, in_heads_order
from igpt_kernels._torch.sparse import Group, attend
from igpt_kernels.caches import kept
from igpt_kernels.layouts import groups_of, keys_in, registered
from igpt_kernels.tensors import accumulation_dtype, zero_heads, zero_not_visible

_ALONE_BYTES = 1 << 18
"""Keys of a sequence from which on it has a call of its own (30 µs): that takes less time than to read the cache twice."""


def visible_keys(k_cache: Tensor, length: int | Tensor) -> Tensor:
    """[B,Tmax] bool: which keys of a cache may be seen."""
    position = torch.arange(k_cache.shape[2], device=k_cache.device)
    if isinstance(length, Tensor):
        return position < length.to(k_cache.device)[:, None]
    return (position < length).expand(k_cache.shape[0], -1)


def _is_tame(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether a mask of -inf hides any key: no value of the caches is inf or NaN, nor can a score become so.

    What lies behind a sequence in its cache may be anything. To find its bounds takes a third of the time of a copy.
    """
    largest = [float(torch.stack(x.aminmax()).abs().max()) for x in (q, k, v)]
    return (
        all(x < math.inf for x in largest)
        and largest[0] * largest[1] * q.shape[3] * max(scale, 1.0) < torch.finfo(torch.float32).max
    )


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The step "dense" of decoding on the CPU; see `igpt_kernels.attention.decode_attention`."""
    if not isinstance(length, Tensor):
        return flash_forward(q, k_cache[:, :, :length], v_cache[:, :, :length], False, scale)
    if q.numel() == 0 or k_cache.shape[2] == 0:
        return flash_forward(q, k_cache, v_cache, False, scale)
    lengths = length.tolist()
    if min(lengths) == max(lengths):
        return flash_forward(q, k_cache[:, :, : lengths[0]], v_cache[:, :, : lengths[0]], False, scale)
    if k_cache[0].numel() * k_cache.element_size() >= _ALONE_BYTES:
        alone = [
            flash_forward(q[b : b + 1], k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n], False, scale)
            for b, n in enumerate(lengths)
        ]
        return in_heads_order(torch.cat([out for out, _ in alone])), torch.cat([lse for _, lse in alone])
    visible, k, v = visible_keys(k_cache, length), k_cache, v_cache
    if not _is_tame(q, k, v, scale):
        k, v = (zero_not_visible(x, visible[:, None, None, :]) for x in (k, v))
    q, k, v = dense_rows(q, k, v)
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)[:, None, None, :]
    out, lse = cpu_forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    fully_masked = ~visible.any(-1)[:, None, None]
    out = out.masked_fill(fully_masked[..., None], 0.0)
    return in_heads_order(out), lse.masked_fill(fully_masked, -torch.inf).contiguous()


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *, scale: float) -> Tensor:
    """`igpt_kernels.attention.decode_attention` by scaled_dot_product_attention, for devices other than the CPU and CUDA."""
    if isinstance(length, int):
        return flash_attention(q, k_cache[:, :, :length], v_cache[:, :, :length], causal=False, scale=scale)
    if q.numel() == 0 or k_cache.shape[2] == 0:
        return q * 0
    visible = visible_keys(k_cache, length)
    row = visible[:, None, None, :]
    v_cache, k_cache = zero_not_visible(v_cache, row), zero_not_visible(k_cache, row)
    # An empty sequence gets all of its (zeroed) values: a row without any is NaN with some of torch's kernels.
    mask = (visible | ~visible.any(-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)


def visible_by_layout(layout: str, k_cache: Tensor, length: int | Tensor) -> Tensor:
    """Which keys of a cache [B,H,Tmax,D] each query at position ``length - 1`` may see: bool [B, H or 1, 1, Tmax].

    Args:
        layout: one key for all heads, or one a head joined by semicolons.
        k_cache: the keys.
        length: keys in the cache, one for all sequences or int [B].
    """
    batch, heads, longest = k_cache.shape[:3]
    keys = keys_in(layout)
    if len(keys) == 1:  # the number of heads may be symbolic
        return visible_by_key(keys[0], length, longest, batch, k_cache.device)[:, None, None]
    visible = torch.empty(batch, heads, 1, longest, dtype=torch.bool, device=k_cache.device)
    for key, members in groups_of(layout, heads):
        visible[:, list(members), 0] = visible_by_key(key, length, longest, batch, k_cache.device)[:, None]
    return visible


def visible_by_key(key: str, length: int | Tensor, longest: int, batch: int, device: torch.device) -> Tensor:
    """[B,Tmax] bool: what the queries at position ``length - 1`` see under a registered layout."""
    layout = registered(key)
    position = torch.arange(longest, device=device)
    # Added, not made into a tensor: the length may be symbolic.
    lengths = length.to(device).long() if isinstance(length, Tensor) else position.new_zeros(1) + length
    query = (lengths - 1).clamp(min=0, max=layout.tokens - 1)[:, None]
    inside = position.clamp(max=layout.tokens - 1)[None, :]
    visible = layout._permits(query, inside) & (position < lengths[:, None]) & (position < layout.tokens)
    return visible.expand(batch, -1)


@functools.partial(kept, apart=False)
def _keys_of(key: str, query: int) -> Tensor:
    return layouts.keys_of(key, query)


def visible_tokens(key: str, length: int) -> Tensor:
    """The tokens that the query at position ``length - 1`` may see under a registered layout, of a cache of `length`: int64."""
    if length == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    tokens = _keys_of(key, length - 1)
    return tokens[: int(torch.searchsorted(tokens, length))]  # patterns that are not causal see ahead


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """The step "sparse" of decoding: only keys that are seen are gathered."""
    batch, heads, _, head_dim = q.shape
    out = zero_heads(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    if q.numel() == 0 or (not isinstance(length, Tensor) and length == 0):
        return out, lse
    for key, members in groups:
        some_q, some_k, some_v = (
            x if len(members) == heads else x[:, list(members)] for x in (q.contiguous(), k_cache, v_cache)
        )
        if not isinstance(length, Tensor):
            tokens = visible_tokens(key, length).to(q.device)
            if len(tokens) == 0:
                continue
            mine, log = attend(some_q, some_k.index_select(2, tokens), some_v.index_select(2, tokens), bias=None, scale=scale)
        else:
            visible = visible_by_key(key, length, k_cache.shape[2], batch, q.device)
            most = int(visible.sum(-1).max())
            if most == 0:
                continue
            tokens = visible.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
            seen = visible.gather(-1, tokens)
            index = tokens[:, None, :, None].expand(-1, len(members), -1, head_dim)
            chosen = [zero_not_visible(x.gather(2, index), seen[:, None, None, :]) for x in (some_k, some_v)]
            bias = torch.zeros(seen.shape, device=q.device, dtype=lse.dtype).masked_fill(~seen, -torch.inf)
            # One sequence is one "tile": [H,B,...], because masks differ by the second dimension.
            turned = [x.transpose(0, 1).contiguous() for x in (some_q, *chosen)]
            mine, log = (x.transpose(0, 1) for x in attend(*turned, bias=bias[:, None], scale=scale))
        out[:, list(members)] = mine
        lse[:, list(members)] = log.to(lse.dtype)
    return out, lse
