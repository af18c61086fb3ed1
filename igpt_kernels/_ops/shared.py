"""How an operator is registered: schema, implementation, fake kernel, autograd and FLOP formula in one call.

Every operator that has several backends takes the name of one as its last argument, ``str backend``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from igpt_kernels import backends
from igpt_kernels._native import load
from igpt_kernels._ops import transforms

_library = Library("igpt_kernels", "FRAGMENT")
load.status()  # now: torch.compile reads whether the extension is there, and cannot trace how it is loaded


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    second: str = "",
    flops: Callable[..., int] | None = None,
    rule: transforms.Rule = transforms.one_by_one,
) -> Any:
    """Define ``igpt_kernels::<schema>`` and give the operator.

    Args:
        schema: name, arguments and results in torch's notation.
        run: the implementation, on every device.
        fake: results without data, for torch.compile.
        save: what the derivative keeps, ``setup_context`` of torch.library.register_autograd.
        backward: the derivative. Without it, differentiating raises: `second` names the operation in the message.
        second: name of the operation whose first derivative this operator is.
        flops: operations by shapes, for torch.utils.flop_counter; None where no matrices are multiplied.
        rule: how torch.vmap calls it, see `igpt_kernels._ops.transforms`.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"igpt_kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.igpt_kernels, name)
    transforms.implemented(operator, run)
    if backward is None and second:
        save, backward = _save_nothing, _no_second_derivative(second)
    if save is not None and backward is not None:
        torch.library.register_autograd(f"igpt_kernels::{name}", backward, setup_context=save, lib=_library)
        transforms.differentiable(operator, save, backward, rule)
    if flops is not None:
        register_flop_formula(operator)(flops)
    return operator


def dispatch(op: str, step: str) -> Callable[..., Any]:
    """An implementation that hands all arguments but the last, the backend, to that backend's function."""

    def run(*arguments: Any) -> Any:
        return backends.step(op, arguments[-1], step)(*arguments[:-1])

    return run


class _Once(torch.autograd.Function):
    """The first argument, which depends on the others by a derivative that cannot be taken."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *of: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_second_derivative(ctx.op)(ctx, *grads)


def once(op: str, gradient: Tensor, of: Sequence[Tensor]) -> Tensor:
    """`gradient` as a function of the tensors `of` that cannot be differentiated: a backward pass through it raises.

    For a gradient that was made before autograd recorded. Without this its own derivative would be 0, without a word.
    """
    return _Once.apply(op, gradient, *of)  # type: ignore[no-any-return, no-untyped-call]


def _save_nothing(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """A second derivative is an error, so nothing is kept for it."""


def _no_second_derivative(op: str) -> Callable[..., Any]:
    def refuse(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError(f"{op} has no second derivative; use backend='reference' where one is needed")

    return refuse
