"""Operators under the transforms of torch.func: grad, vjp, jacrev, vmap, and these inside one another.

torch.library's autograd is not seen by them (torch 2.11 and 2.13: "must override the setup_context staticmethod"). So each
operator that can be differentiated has a `torch.autograd.Function` of the same forward and backward, with a rule for vmap.
`call` takes it where a transform is active, and the operator everywhere else. Forward-mode derivatives come from the
reference: `igpt_kernels.tensors.needs_plain_operations` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Any, int, Sequence[int | None], Sequence[Any]], Any]
"""(operator, size of the batch, dimension of it in each argument, arguments) -> results, the batch in their dimension 0."""

_functions: dict[str, Any] = {}


def call(operator: Any, *arguments: Any) -> Any:
    """Call a registered operator; under a transform of torch.func, the function that `differentiable` made of it."""
    if torch._C._are_functorch_transforms_active():
        return _functions[operator.__name__].apply(*arguments)
    return operator(*arguments)


def differentiable(operator: Any, save: Callable[..., None], backward: Callable[..., Any], rule: Rule) -> None:
    """Make the `torch.autograd.Function` of an operator."""

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        results = rule(operator, info.batch_size, in_dims, arguments)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    methods = {"forward": operator, "setup_context": save, "backward": backward, "vmap": vmap}
    name = operator.__name__
    members = {method: staticmethod(function) for method, function in methods.items()}
    _functions[name] = type(name, (torch.autograd.Function,), members)


def one_by_one(operator: Any, size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    """The rule for every operator: a call for each entry of the batch."""
    calls = [
        call(operator, *(x if dim is None else x.select(dim, index) for x, dim in zip(arguments, in_dims, strict=True)))
        for index in range(size)
    ]
    return torch.stack(calls) if isinstance(calls[0], Tensor) else tuple(map(torch.stack, zip(*calls, strict=True)))


def in_batch(operator: Any, size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    """The rule where all tensors, results too, begin with a dimension B that does not mix: one call of size·B."""
    folded = [
        _leading(x, dim, size).flatten(0, 1) if isinstance(x, Tensor) else x for x, dim in zip(arguments, in_dims, strict=True)
    ]
    results = call(operator, *folded)
    return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results)


def in_rows(operator: Any, size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> Any:
    """The rule for [..., C] beside parameters [C]: one call where only the former are a batch.

    The first argument is [..., C], and so is every other of its rank; the results have its rows.
    """
    rank = arguments[0].dim() - (in_dims[0] is not None)
    rows = [isinstance(x, Tensor) and x.dim() - (dim is not None) == rank for x, dim in zip(arguments, in_dims, strict=True)]
    parameters = [dim for dim, is_row in zip(in_dims, rows, strict=True) if not is_row]
    if rank < 2 or any(dim is not None for dim in parameters):
        return one_by_one(operator, size, in_dims, arguments)
    return call(
        operator,
        *(_leading(x, dim, size) if is_row else x for x, dim, is_row in zip(arguments, in_dims, rows, strict=True)),
    )


class _OverLeading(torch.autograd.Function):
    """``function(x)``, which has no derivative and treats every leading dimension alike."""

    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        assert in_dims[0] is not None
        return _OverLeading.apply(x.movedim(in_dims[0], 0), function), 0  # type: ignore[no-untyped-call]


def over_leading(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` of integers, also under torch.vmap. It must count its dimensions from the last one."""
    if torch._C._are_functorch_transforms_active():
        return _OverLeading.apply(x, function)  # type: ignore[no-any-return,no-untyped-call]
    return function(x)


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with the dimension of the batch first; repeated where it has none."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
