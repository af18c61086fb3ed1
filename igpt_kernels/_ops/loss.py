"""The registered operators of the loss. Kernels are imported only when one is launched.

Two ways to the gradients. `cross_entropy_rows` gives every row's loss and computes the logits again in its backward pass;
`cross_entropy_sum` gives their sum or mean and makes the gradients beside it. `igpt_kernels.loss` says when which is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_kernels._ops.shared import dispatch, once, register
from igpt_kernels._ops.transforms import below_autograd, call
from igpt_kernels._torch import loss as torch_loss
from igpt_kernels.tensors import accumulation_dtype, is_plain, is_readable


def _rows_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[:1], dtype=dtype), hidden.new_empty(hidden.shape[:1], dtype=dtype)


def _gradients_fake(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    width = hidden.shape[1]
    dhidden = hidden.new_empty(hidden.shape[0] if need_hidden else 0, width)
    return dhidden, weight.new_empty(weight.shape[0] if need_weight else 0, width)


def _rows_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, lse: Tensor, ignore_index: int, z_loss: float,
    need_hidden: bool, need_weight: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _gradients_fake(hidden, weight, need_hidden, need_weight)


def _sum_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float, mean: bool, need_hidden: bool,
    need_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(hidden.dtype)
    dhidden, dweight = _gradients_fake(hidden, weight, need_hidden, need_weight)
    return hidden.new_empty((), dtype=dtype), dhidden, dweight.to(torch_loss.sum_dtype(hidden.dtype, backend))


def _scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _scale_fake(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """Changes values only."""


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, *how = inputs
    ctx.save_for_backward(hidden, weight, target, output[1])
    ctx.how = tuple(how)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    *numbers, backend = ctx.how
    needs = (need_hidden, need_weight)
    dhidden, dweight = call(cross_entropy_rows_backward, grad, *ctx.saved_tensors, *numbers, *needs, backend)
    return dhidden if need_hidden else None, dweight if need_weight else None, None, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, *how = inputs
    ctx.save_for_backward(hidden, weight, target)
    ctx.how = tuple(how)
    ctx.made = output[1:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros of the size of dhidden


def _sum_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients of the forward pass, scaled in place: a second dhidden would take as much memory as the logits.

    The buffers are consumed; a second backward (retain_graph=True) recomputes them. So does the first one of a graph that was
    traced where fewer gradients were wanted.
    """
    if grad is None:
        return (None,) * 9
    ignore_index, z_loss, mean, made_hidden, made_weight, backend = ctx.how
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    made, ctx.made = ctx.made, None
    if made is None or need_hidden > made_hidden or need_weight > made_weight:
        with torch.no_grad():
            how = ignore_index, z_loss, mean, need_hidden, need_weight, backend
            made = cross_entropy_sum(*ctx.saved_tensors, *how)[1:]
    dhidden, dweight = made
    dtype, factor = dhidden.dtype, grad
    if mean and not torch_loss.mean_is_folded(dtype):
        factor = grad / torch_loss.rows_that_count(ctx.saved_tensors[2], ignore_index, grad.dtype, mean)
    recorded = torch.is_grad_enabled()  # create_graph=True
    # Nor in place where torch.compile traces, and where a batch of gradients shares dhidden (is_grads_batched).
    in_place = not recorded and is_plain(grad)
    unchanged = in_place and is_readable(factor) and float(factor) == 1.0  # of loss.backward(), and nothing is launched

    def scale(gradient: Tensor) -> Tensor:
        if not in_place or gradient.dtype != dtype:
            return cross_entropy_scaled(gradient, factor, dtype, backend)  # type: ignore[no-any-return]
        if not unchanged:
            below_autograd(cross_entropy_scale_, gradient, factor, backend)
        return gradient

    dhidden, dweight = scale(dhidden), scale(dweight)
    if recorded:
        dhidden, dweight = (once("linear_cross_entropy", x, ctx.saved_tensors[:2]) for x in (dhidden, dweight))
    return dhidden if need_hidden else None, dweight if need_weight else None, *(None,) * 7


def _product(hidden: torch.Size, weight: torch.Size) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


def _rows_flops(hidden: torch.Size, weight: torch.Size, *rest: object, **shapes: object) -> int:
    """2·M·C·V: one product."""
    return _product(hidden, weight)


def _rows_backward_flops(
    grad: torch.Size, hidden: torch.Size, weight: torch.Size, target: torch.Size, lse: torch.Size, ignore_index: int,
    z_loss: float, need_hidden: bool, need_weight: bool, backend: str, **shapes: object,
) -> int:  # fmt: skip
    """2·M·C·V for each gradient. The recomputation of the logits is not counted."""
    return (need_hidden + need_weight) * _product(hidden, weight)


def _sum_flops(
    hidden: torch.Size, weight: torch.Size, target: torch.Size, ignore_index: int, z_loss: float, mean: bool,
    need_hidden: bool, need_weight: bool, backend: str, **shapes: object,
) -> int:  # fmt: skip
    """2·M·C·V for the logits, and as much for each gradient, all of it in the forward pass."""
    return (1 + need_hidden + need_weight) * _product(hidden, weight)


cross_entropy_rows = register(
    "cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, int ignore_index, float z_loss, str backend)"
    " -> (Tensor loss, Tensor lse)",
    dispatch("linear_cross_entropy", "rows"),
    _rows_fake,
    save=_save_rows,
    backward=_rows_gradients,
    flops=_rows_flops,
)
cross_entropy_rows_backward = register(
    "cross_entropy_rows_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor lse, int ignore_index,"
    " float z_loss, bool need_hidden, bool need_weight, str backend) -> (Tensor dhidden, Tensor dweight)",
    dispatch("linear_cross_entropy", "rows_backward"),
    _rows_backward_fake,
    second="linear_cross_entropy",
    flops=_rows_backward_flops,
)
cross_entropy_sum = register(
    "cross_entropy_sum(Tensor hidden, Tensor weight, Tensor target, int ignore_index, float z_loss, bool mean,"
    " bool need_hidden, bool need_weight, str backend) -> (Tensor loss, Tensor dhidden, Tensor dweight)",
    dispatch("linear_cross_entropy", "sum"),
    _sum_fake,
    save=_save_sum,
    backward=_sum_gradients,
    flops=_sum_flops,
)
cross_entropy_scaled = register(
    "cross_entropy_scaled(Tensor gradient, Tensor factor, ScalarType dtype, str backend) -> Tensor",
    dispatch("linear_cross_entropy", "scaled"),
    _scaled_fake,
    second="linear_cross_entropy",
)
cross_entropy_scale_ = register(
    "cross_entropy_scale_(Tensor(a!) gradient, Tensor factor, str backend) -> ()",
    dispatch("linear_cross_entropy", "scale_"),
    _scale_fake,
)
