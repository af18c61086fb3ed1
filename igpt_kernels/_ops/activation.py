"""The registered operators of QuickGELU. No operation counts: torch's counter counts products of matrices only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from igpt_kernels import backends
from igpt_kernels._ops.shared import dispatch, register
from igpt_kernels._ops.transforms import call, in_rows


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dx, dbias = backends.step("quick_gelu", backend, "backward")(grad, x, bias)
    return dx, x.new_empty(0) if dbias is None else dbias


def _forward_fake(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, backend = inputs
    ctx.save_for_backward(x, bias)
    ctx.backend = backend


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = call(quick_gelu_backward, grad, x, bias, ctx.backend)
    return dx, None if bias is None else dbias, None


quick_gelu_forward = register(
    "quick_gelu_forward(Tensor x, Tensor? bias, str backend) -> Tensor",
    dispatch("quick_gelu", "forward"),
    _forward_fake,
    save=_save,
    backward=_gradients,
    rule=in_rows,
)
quick_gelu_backward = register(
    "quick_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str backend) -> (Tensor dx, Tensor dbias)",
    _backward,
    _backward_fake,
    second="quick_gelu",
)
