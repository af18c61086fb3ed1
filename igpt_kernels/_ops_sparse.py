"""The registered operators of block-sparse attention. Torch only; kernels come late.

A layout enters as a string, `SparseLayout.key`, or one for each head joined by semicolons: arguments of operators are tensors
and plain values, and torch.compile then guards the pattern like any other constant.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from igpt_kernels._ops_attention import _heads, _lse_like, _no_second_derivative, _save_nothing, decode_gradients
from igpt_kernels._torch import sparse as torch_sparse
from igpt_kernels.layouts import registered

_library = Library("igpt_kernels", "FRAGMENT")
_library.define(
    "sparse_forward(Tensor q, Tensor k, Tensor v, str layout, float scale, bool triton) -> (Tensor out, Tensor lse)"
)
_library.define(
    "sparse_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str layout, float scale, bool triton)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.define(
    "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, SymInt length, str layout, float scale,"
    " bool triton) -> (Tensor out, Tensor lse)"
)

sparse_forward = torch.ops.igpt_kernels.sparse_forward
sparse_backward = torch.ops.igpt_kernels.sparse_backward
sparse_decode = torch.ops.igpt_kernels.sparse_decode


@functools.lru_cache(maxsize=256)
def _members(layout: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    members: dict[str, list[int]] = {}
    for head, key in enumerate(layout.split(";")):
        members.setdefault(key, []).append(head)
    return tuple((key, tuple(heads)) for key, heads in members.items())


def groups_of(layout: str, heads: int) -> tuple[tuple[str, Sequence[int]], ...]:
    """Each distinct layout of the argument, with the heads that use it."""
    return _members(layout) if ";" in layout else ((layout, range(heads)),)


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, triton: bool) -> tuple[Tensor, Tensor]:
    groups = groups_of(layout, q.shape[1])
    if triton:
        from igpt_kernels._triton.sparse_forward import launch_sparse_forward

        return launch_sparse_forward(q, k, v, groups, scale=scale)
    return torch_sparse.sparse_forward(q, k, v, groups, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: str, scale: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = groups_of(layout, q.shape[1])
    if triton:
        from igpt_kernels._triton.sparse_backward import launch_sparse_backward

        return launch_sparse_backward(grad, q, k, v, out, lse, groups, scale=scale)
    return torch_sparse.sparse_backward(grad, q, k, v, out, lse, groups, scale)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, layout: str, scale: float, triton: bool
) -> tuple[Tensor, Tensor]:
    groups = groups_of(layout, q.shape[1])
    if triton:
        from igpt_kernels._triton.sparse_decode import launch_sparse_decode

        return launch_sparse_decode(q, k_cache, v_cache, length if lengths is None else lengths, groups, scale=scale)
    return torch_sparse.sparse_decode(q, k_cache, v_cache, lengths, length, groups, scale)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, triton: bool) -> tuple[Tensor, Tensor]:
    return _heads(q), _lse_like(q)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: str, scale: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(q), _heads(k), _heads(v)


def _decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, layout: str, scale: float, triton: bool
) -> tuple[Tensor, Tensor]:
    return _heads(q), _lse_like(q)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *how = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)  # type: ignore[arg-type]
    ctx.how = tuple(how)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = sparse_backward(grad, *ctx.saved_tensors, *ctx.how)  # type: ignore[attr-defined]
    return dq, dk, dv, None, None, None


def _save_decode(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k_cache, v_cache, lengths, *how = inputs
    ctx.save_for_backward(q, k_cache, v_cache, lengths)  # type: ignore[arg-type]
    ctx.how = tuple(how)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])


def _decode_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k_cache, v_cache, lengths = ctx.saved_tensors  # type: ignore[attr-defined]
    length, layout, scale, _triton = ctx.how  # type: ignore[attr-defined]
    batch, heads, longest = k_cache.shape[:3]
    seen = length if lengths is None else lengths
    if ";" not in layout:
        visible = torch_sparse.visible_keys(layout, seen, longest, batch, q.device)[:, None, None]
    else:
        visible = torch.empty(batch, heads, 1, longest, dtype=torch.bool, device=q.device)
        for key, members in groups_of(layout, heads):
            visible[:, list(members), 0] = torch_sparse.visible_keys(key, seen, longest, batch, q.device)[:, None]
    return *decode_gradients(grad, q, k_cache, v_cache, visible, scale), None, None, None, None, None


for _name, _run, _fake, _keep, _derivative in (
    ("sparse_forward", _forward, _forward_fake, _save, _gradients),
    ("sparse_backward", _backward, _backward_fake, _save_nothing, _no_second_derivative),
    ("sparse_decode", _decode, _decode_fake, _save_decode, _decode_gradients),
):
    # One function for every device: the argument says whether kernels are launched.
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"igpt_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"igpt_kernels::{_name}", _derivative, setup_context=_keep, lib=_library)


def _pairs(layout: str, heads: int) -> int:
    """Visible pairs over all heads."""
    return sum(registered(key).pairs * len(members) for key, members in groups_of(layout, heads))


@register_flop_formula(sparse_forward)
def sparse_forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, layout: str, *how: object, **shapes: object) -> int:
    """4·B·D·pairs over all heads: visible pairs, not those of touched tiles."""
    return 4 * q[0] * q[3] * _pairs(layout, q[1])


@register_flop_formula(sparse_backward)
def sparse_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: torch.Size, lse: torch.Size, layout: str,
    *how: object, **shapes: object,
) -> int:  # fmt: skip
    """10·B·D·pairs over all heads."""
    return 10 * q[0] * q[3] * _pairs(layout, q[1])


@register_flop_formula(sparse_decode)
def sparse_decode_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, lengths: torch.Size | None, length: int, layout: str,
    *how: object, **shapes: object,
) -> int:  # fmt: skip
    """4·B·D·keys over all heads; with a tensor of lengths, whose values a formula cannot read, of the last query."""
    total = 0
    for key, members in groups_of(layout, q[1]):
        last = registered(key).tokens if lengths is not None else length
        total += len(members) * (len(registered(key).keys_of(last - 1)) if last else 0)
    return 4 * q[0] * q[3] * total
