"""Attention by torch's scaled_dot_product_attention: any device, linear memory where torch has a fused kernel."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


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


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """See `igpt_kernels.attention.flash_attention`; arguments are checked there."""
    queries, keys = q.shape[2], k.shape[2]
    if q.numel() == 0 or keys == 0:
        # Multiplying keeps an empty or all-masked result inside the autograd graph, with zero gradients.
        return q * 0
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    # torch's is_causal counts from the upper left corner when lengths differ (pytorch/pytorch#108108); ours is lower right.
    free = free_memory(q.device)
    if free is not None and queries * keys > free // 4:
        raise MemoryError(
            f"a {queries} x {keys} mask takes {queries * keys / 2**30:.1f} GiB, over a quarter of the "
            f"{free / 2**30:.1f} GiB free; pass fewer queries at a time"
        )
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *, scale: float) -> Tensor:
    """See `igpt_kernels.attention.decode_attention`; arguments are checked there."""
    if isinstance(length, int):
        return flash_attention(q, k_cache[:, :, :length], v_cache[:, :, :length], causal=False, scale=scale)
    if q.numel() == 0 or k_cache.shape[2] == 0:
        return q * 0
    visible = torch.arange(k_cache.shape[2], device=q.device) < length.to(q.device)[:, None]
    # A masked weight is 0, but 0 x NaN is NaN: what lies unused at the end of a cache must not reach the result.
    v_cache = v_cache.masked_fill(~visible[:, None, :, None], 0.0)
    k_cache = k_cache.masked_fill(~visible[:, None, :, None], 0.0)
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=visible[:, None, None, :], scale=scale)
