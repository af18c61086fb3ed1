"""What several implementations share: dtype of sums, memory order of outputs, keys not visible, sign of the scale."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of `dtype` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_heads(like: Tensor, tokens: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An output [B,H,T,D] in memory [B,T,H,D], so that joining the heads behind attention is a view.

    Args:
        like: gives B, H, D, the device, and what the others leave out.
        tokens: T.
        dtype: of the output.
    """
    batch, heads, own, head_dim = like.shape
    rows = own if tokens is None else tokens
    size, stride = (batch, heads, rows, head_dim), (rows * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(size, stride, dtype=dtype or like.dtype, device=like.device)


def zero_heads(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`empty_heads`, filled with 0."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_zeros(batch, tokens, heads, head_dim, dtype=dtype or like.dtype).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """An empty log-sum-exp [B,H,T] of queries [B,H,T,D]."""
    return q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def zero_not_visible(x: Tensor, visible: Tensor) -> Tensor:
    """Keys or values [B,H,T,D] with 0 where `visible`, bool [B or 1,H or 1,1,T], is false.

    A weight of 0 is not enough: what lies unused in a cache may be NaN, and 0 x NaN is NaN.
    """
    return x.masked_fill(~visible.transpose(-1, -2), 0.0)


def nonnegative_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a scale above 0 with the same scores: kernels take the maximum before they scale, which must keep the order."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)
