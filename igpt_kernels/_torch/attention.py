"""Attention by torch: its flash kernel on the CPU, which gives the log-sum-exp, and scaled_dot_product_attention elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def free_memory(device: torch.device) -> int | None:
    """Bytes free on `device`, or None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def guard_square(what: str, size: int, device: torch.device) -> None:
    """Refuse to allocate `size` bytes of a queries x keys tensor beyond a quarter of free memory.

    Raises:
        MemoryError: with both numbers.
    """
    free = free_memory(device)
    if free is not None and size > free // 4:
        raise MemoryError(
            f"{what} takes {size / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB free on {device}; "
            "use a fused backend or fewer queries at a time"
        )


def _heads(like: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = like.shape
    return like.new_zeros(batch, tokens, heads, head_dim).transpose(1, 2)


def _in_heads_layout(x: Tensor) -> Tensor:
    """`x` [B,H,T,D] in memory [B,T,H,D], copied only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors with their last dimension contiguous, as torch's kernel wants it."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (outputs and log-sum-exps)."""
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == -torch.inf, 0.0)
    weights = (torch.exp(part - safe)[..., None] for part in (lse, other_lse))
    first, second = (x.to(total.dtype) * weight for x, weight in zip((out, other), weights, strict=True))
    return (first + second).to(out.dtype), total


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::flash_forward`` on the CPU: linear memory, no mask.

    Where lengths differ, causality counts from the lower right: the keys before the first query's are a full attention, the
    rest a causal square; queries before the first key see nothing.
    """
    queries, keys = q.shape[2], k.shape[2]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.numel() == 0 or keys == 0:
        return _heads(q), q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
    q, k, v = _dense_rows(q, k, v)
    if not causal or queries == 1:
        out, lse = _cpu_forward(q, k, v, 0.0, False, scale=scale)
    elif queries > keys:
        out, lse = _heads(q), q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
        out[:, :, -keys:], lse[:, :, -keys:] = _cpu_forward(q[:, :, -keys:], k, v, 0.0, True, scale=scale)
    elif queries == keys:
        out, lse = _cpu_forward(q, k, v, 0.0, True, scale=scale)
    else:
        before = keys - queries
        past = _cpu_forward(q, k[:, :, :before], v[:, :, :before], 0.0, False, scale=scale)
        square = _cpu_forward(q, k[:, :, before:], v[:, :, before:], 0.0, True, scale=scale)
        out, lse = merge(*past, *square)
    return _in_heads_layout(out), lse.contiguous()


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``igpt_kernels::flash_backward`` on the CPU: each set of keys adds its part, given the whole's lse."""
    queries, keys = q.shape[2], k.shape[2]
    if q.numel() == 0 or keys == 0:
        return _heads(q), _heads(k), _heads(v)
    grad, q, k, v = _dense_rows(grad, q, k, v)

    def part(rows: slice, cols: slice, square: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = (x[:, :, rows] for x in (q, out, lse))
        some_q, some_out, some_lse = of_rows
        return _cpu_backward(
            grad[:, :, rows], some_q, k[:, :, cols], v[:, :, cols], some_out, some_lse, 0.0, square, scale=scale
        )

    if not causal or queries == 1:
        dq, dk, dv = part(slice(None), slice(None), False)
    elif queries >= keys:
        dq = _heads(q)
        dq[:, :, queries - keys :], dk, dv = part(slice(queries - keys, None), slice(None), True)
    else:
        before = keys - queries
        dq, dk, dv = part(slice(None), slice(None, before), False)
        dq_square, dk_square, dv_square = part(slice(None), slice(before, None), True)
        dq, dk, dv = dq + dq_square, torch.cat([dk, dk_square], 2), torch.cat([dv, dv_square], 2)
    return _in_heads_layout(dq), _in_heads_layout(dk), _in_heads_layout(dv)


def visible_keys(k_cache: Tensor, length: int | Tensor) -> Tensor:
    """[B,Tmax] bool: which keys of a cache may be seen."""
    position = torch.arange(k_cache.shape[2], device=k_cache.device)
    if isinstance(length, Tensor):
        return position < length.to(k_cache.device)[:, None]
    return (position < length).expand(k_cache.shape[0], -1)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::decode`` on the CPU; see `igpt_kernels.attention.decode_attention`."""
    if lengths is None:
        return flash_forward(q, k_cache[:, :, :length], v_cache[:, :, :length], False, scale)
    if q.numel() == 0 or k_cache.shape[2] == 0:
        return flash_forward(q, k_cache, v_cache, False, scale)
    visible = visible_keys(k_cache, lengths)
    # A masked weight is 0, but 0 x NaN is NaN: what lies unused at the end of a cache must not reach the result.
    hidden = ~visible[:, None, :, None]
    q, k, v = _dense_rows(q, k_cache.masked_fill(hidden, 0.0), v_cache.masked_fill(hidden, 0.0))
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)[:, None, None, :]
    out, lse = _cpu_forward(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    blind = ~visible.any(-1)[:, None, None]
    return _in_heads_layout(out.masked_fill(blind[..., None], 0.0)), lse.masked_fill(blind, -torch.inf).contiguous()


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """`igpt_kernels.attention.flash_attention` by scaled_dot_product_attention, for devices without an operator of ours."""
    queries, keys = q.shape[2], k.shape[2]
    if q.numel() == 0 or keys == 0:
        # Multiplying keeps an empty or all-masked result inside the autograd graph, with zero gradients.
        return q * 0
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if queries > keys:
        # Rows that see nothing are 0; not every kernel of torch's agrees (float64 gives NaN).
        square = F.scaled_dot_product_attention(q[:, :, -keys:], k, v, is_causal=True, scale=scale)
        return torch.cat([q[:, :, :-keys] * 0, square], 2)
    # torch's is_causal counts from the upper left corner when lengths differ (pytorch/pytorch#108108); ours is lower right.
    guard_square(f"a {queries} x {keys} mask", queries * keys, q.device)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *, scale: float) -> Tensor:
    """`igpt_kernels.attention.decode_attention` by scaled_dot_product_attention, for devices without an operator of ours."""
    if isinstance(length, int):
        return flash_attention(q, k_cache[:, :, :length], v_cache[:, :, :length], causal=False, scale=scale)
    if q.numel() == 0 or k_cache.shape[2] == 0:
        return q * 0
    visible = visible_keys(k_cache, length)
    hidden = ~visible[:, None, :, None]
    v_cache, k_cache = v_cache.masked_fill(hidden, 0.0), k_cache.masked_fill(hidden, 0.0)
    # An empty sequence gets all of its (zeroed) values: a row without any is NaN with some of torch's kernels.
    mask = (visible | ~visible.any(-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)
