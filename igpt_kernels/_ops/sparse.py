"""The registered operators of block-sparse attention. Kernels are imported only when one is launched.

A layout enters as a string, `SparseLayout.key`, or one for each head joined by semicolons: arguments of operators are tensors
and plain values, and torch.compile then guards the pattern like any other constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_kernels import backends
from igpt_kernels._ops.attention import save_attention
from igpt_kernels._ops.shared import register
from igpt_kernels._ops.transforms import call, in_batch
from igpt_kernels.layouts import groups_of, keys_in, registered
from igpt_kernels.tensors import empty_heads, empty_lse


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    run = backends.step("block_sparse_attention", backend, "forward")
    result: tuple[Tensor, Tensor] = run(q, k, v, groups_of(layout, q.shape[1]), scale)
    return result


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: str, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.step("block_sparse_attention", backend, "backward")
    result: tuple[Tensor, Tensor, Tensor] = run(grad, q, k, v, out, lse, groups_of(layout, q.shape[1]), scale)
    return result


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: str, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_attention(ctx, inputs, output)
    # The backward pass knows the layouts by their keys; held here, those of functions are still alive then.
    ctx.layouts = [registered(key) for key in keys_in(inputs[3])]


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = call(sparse_backward, grad, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, None, None, None


def _pairs(layout: str, heads: int) -> int:
    """Visible pairs over all heads."""
    return sum(registered(key).pairs * len(members) for key, members in groups_of(layout, heads))


def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, layout: str, *how: object, **shapes: object) -> int:
    """4·B·D·pairs over all heads: visible pairs, not those of touched tiles."""
    return 4 * q[0] * q[3] * _pairs(layout, q[1])


def _backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: torch.Size, lse: torch.Size, layout: str,
    *how: object, **shapes: object,
) -> int:  # fmt: skip
    """10·B·D·pairs over all heads."""
    return 10 * q[0] * q[3] * _pairs(layout, q[1])


sparse_forward = register(
    "sparse_forward(Tensor q, Tensor k, Tensor v, str layout, float scale, str backend) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    save=_save,
    backward=_gradients,
    flops=_forward_flops,
    rule=in_batch,
)
sparse_backward = register(
    "sparse_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str layout, float scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
    second="block-sparse attention",
    flops=_backward_flops,
    rule=in_batch,
)
