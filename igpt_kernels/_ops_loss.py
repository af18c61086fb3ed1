"""The registered operators of the loss: schemas, shapes without data, derivatives, costs. Torch only; kernels come late.

Two ways to the gradients. `cross_entropy_rows` gives every row's loss and computes the logits again in its backward pass;
`cross_entropy_sum` gives their sum and makes the gradients beside it. `igpt_kernels.fused` says when which is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from igpt_kernels._torch import loss as torch_loss

_library = Library("igpt_kernels", "FRAGMENT")
_library.define(
    "cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, int ignore_index, float z_loss, bool triton)"
    " -> (Tensor loss, Tensor lse)"
)
_library.define(
    "cross_entropy_rows_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor lse, int ignore_index,"
    " float z_loss, bool triton, bool need_hidden, bool need_weight) -> (Tensor dhidden, Tensor dweight)"
)
_library.define(
    "cross_entropy_sum(Tensor hidden, Tensor weight, Tensor target, int ignore_index, float z_loss, bool need_hidden,"
    " bool need_weight) -> (Tensor loss, Tensor dhidden, Tensor dweight)"
)
_library.define("cross_entropy_scaled(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")
_library.define("cross_entropy_scale_(Tensor(a!) gradient, Tensor factor) -> ()")

cross_entropy_rows = torch.ops.igpt_kernels.cross_entropy_rows
cross_entropy_rows_backward = torch.ops.igpt_kernels.cross_entropy_rows_backward
cross_entropy_sum = torch.ops.igpt_kernels.cross_entropy_sum
cross_entropy_scaled = torch.ops.igpt_kernels.cross_entropy_scaled
cross_entropy_scale_ = torch.ops.igpt_kernels.cross_entropy_scale_


def _rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float, triton: bool
) -> tuple[Tensor, Tensor]:
    if not triton:
        return torch_loss.cross_entropy_rows(hidden, weight, target, ignore_index, z_loss)
    from igpt_kernels._triton.linear_cross_entropy import launch_cross_entropy_forward

    return launch_cross_entropy_forward(hidden, weight, target, ignore_index=ignore_index, z_loss=z_loss)


def _rows_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float,
    triton: bool, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not triton:
        return torch_loss.cross_entropy_rows_backward(
            grad, hidden, weight, target, lse, ignore_index, z_loss, need_hidden, need_weight
        )
    from igpt_kernels._triton.linear_cross_entropy import launch_cross_entropy_backward

    return launch_cross_entropy_backward(
        grad, hidden, weight, target, lse, ignore_index=ignore_index, z_loss=z_loss, need_hidden=need_hidden,
        need_weight=need_weight,
    )  # fmt: skip


def _rows_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float, triton: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch_loss.wide_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[:1], dtype=dtype), hidden.new_empty(hidden.shape[:1], dtype=dtype)


def _gradients_fake(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    width = hidden.shape[1]
    dhidden = hidden.new_empty(hidden.shape[0] if need_hidden else 0, width)
    return dhidden, weight.new_empty(weight.shape[0] if need_weight else 0, width)


def _rows_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float,
    triton: bool, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _gradients_fake(hidden, weight, need_hidden, need_weight)


def _sum_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch_loss.wide_dtype(hidden.dtype)
    dhidden, dweight = _gradients_fake(hidden, weight, need_hidden, need_weight)
    return hidden.new_empty((), dtype=dtype), dhidden, dweight.to(dtype)


def _scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _scale_fake(gradient: Tensor, factor: Tensor) -> None:
    """Changes values only."""


def _save_rows(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, *how = inputs
    ctx.save_for_backward(hidden, weight, target, output[1])  # type: ignore[arg-type]
    ctx.how = tuple(how)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    dhidden, dweight = cross_entropy_rows_backward(grad, *ctx.saved_tensors, *ctx.how, need_hidden, need_weight)  # type: ignore[attr-defined]
    return dhidden if need_hidden else None, dweight if need_weight else None, None, None, None, None


def _save_sum(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, target, *how = inputs
    ctx.save_for_backward(hidden, weight, target)  # type: ignore[arg-type]
    ctx.how = tuple(how)  # type: ignore[attr-defined]
    ctx.made = output[1:]  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of dhidden


def _sum_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass, scaled in place: a second dhidden would take as much memory as the logits.

    They are given away with that; who calls backward again (retain_graph) has them made again.
    """
    if grad is None:
        return (None,) * 7
    need_hidden, need_weight = ctx.how[2:]  # type: ignore[attr-defined]
    made, ctx.made = ctx.made, None  # type: ignore[attr-defined]
    with torch.no_grad():
        dhidden, dweight = cross_entropy_sum(*ctx.saved_tensors, *ctx.how)[1:] if made is None else made  # type: ignore[attr-defined]
    dtype = dhidden.dtype
    # Where a graph is made of this: one to differentiate again, which is an error, or one that torch.compile traces.
    if torch.is_grad_enabled() or type(grad) is not Tensor:
        dhidden = cross_entropy_scaled(dhidden, grad, dtype)
    else:
        cross_entropy_scale_(dhidden, grad)
    dweight = cross_entropy_scaled(dweight, grad, dtype)
    return dhidden if need_hidden else None, dweight if need_weight else None, None, None, None, None, None


def _save_nothing(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """A second derivative is an error, so nothing is kept for it."""


def _no_second_derivative(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("linear_cross_entropy has no second derivative; use backend='reference' where one is needed")


for _name, _run, _fake, _save, _backward in (
    ("cross_entropy_rows", _rows, _rows_fake, _save_rows, _rows_gradients),
    ("cross_entropy_rows_backward", _rows_backward, _rows_backward_fake, _save_nothing, _no_second_derivative),
    ("cross_entropy_sum", torch_loss.cross_entropy_sum, _sum_fake, _save_sum, _sum_gradients),
    ("cross_entropy_scaled", torch_loss.cross_entropy_scaled, _scaled_fake, _save_nothing, _no_second_derivative),
):
    # One function for every device: an argument says whether kernels are launched.
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"igpt_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"igpt_kernels::{_name}", _backward, setup_context=_save, lib=_library)

_library.impl("cross_entropy_scale_", torch_loss.cross_entropy_scale_, "CompositeExplicitAutograd")
torch.library.register_fake("igpt_kernels::cross_entropy_scale_", _scale_fake, lib=_library)


def _product(hidden: torch.Size, weight: torch.Size) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(cross_entropy_rows)
def cross_entropy_rows_flops(hidden: torch.Size, weight: torch.Size, *rest: object, **shapes: object) -> int:
    """2·M·C·V: one product."""
    return _product(hidden, weight)


@register_flop_formula(cross_entropy_rows_backward)
def cross_entropy_rows_backward_flops(
    grad: torch.Size, hidden: torch.Size, weight: torch.Size, target: torch.Size, lse: torch.Size, ignore_index: int,
    z_loss: float, triton: bool, need_hidden: bool, need_weight: bool, **shapes: object,
) -> int:  # fmt: skip
    """2·M·C·V for each gradient; that the logits are computed again is our own affair."""
    return (need_hidden + need_weight) * _product(hidden, weight)


@register_flop_formula(cross_entropy_sum)
def cross_entropy_sum_flops(
    hidden: torch.Size, weight: torch.Size, target: torch.Size, ignore_index: int, z_loss: float, need_hidden: bool,
    need_weight: bool, **shapes: object,
) -> int:  # fmt: skip
    """2·M·C·V for the logits, and as much for each gradient, all of it in the forward pass."""
    return (1 + need_hidden + need_weight) * _product(hidden, weight)
