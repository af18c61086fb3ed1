"""The registered operators of dense attention. Kernels are imported only when one is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_kernels._ops.shared import dispatch, register
from igpt_kernels._ops.transforms import call, in_batch
from igpt_kernels.tensors import empty_heads, empty_lse


def attention_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs (i, j) that are visible: all, or with j <= i + keys - queries."""
    if not causal:
        return queries * keys
    seeing = min(queries, keys)
    return seeing * (seeing + 1) // 2 + max(0, keys - queries) * seeing


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep q, k, v, out, lse, and in ``ctx.how`` every argument behind them."""
    q, k, v, *how = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.how = tuple(how)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = call(flash_backward, grad, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, None, None, None


def _forward_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, causal: bool, scale: float, backend: str, **shapes: object
) -> int:
    """4·B·H·pairs·D: two products of two operations each."""
    return 4 * q[0] * q[1] * q[3] * attention_pairs(q[2], k[2], causal)


def _backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: torch.Size, lse: torch.Size,
    causal: bool, scale: float, backend: str, **shapes: object,
) -> int:  # fmt: skip
    """10·B·H·pairs·D, five products. Recomputation is not counted."""
    return 10 * q[0] * q[1] * q[3] * attention_pairs(q[2], k[2], causal)


flash_forward = register(
    "flash_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, str backend) -> (Tensor out, Tensor lse)",
    dispatch("flash_attention", "forward"),
    _forward_fake,
    save=save_attention,
    backward=_gradients,
    flops=_forward_flops,
    rule=in_batch,
)
flash_backward = register(
    "flash_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    dispatch("flash_attention", "backward"),
    _backward_fake,
    second="flash attention",
    flops=_backward_flops,
    rule=in_batch,
)
