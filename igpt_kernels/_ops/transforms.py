"""How a registered operator is called: in eager mode, and under the transforms of torch.func (grad, vmap, and so on).

torch.library's autograd is not seen by those (torch 2.11 and 2.13: "must override the setup_context staticmethod"). So each
operator that can be differentiated has a `torch.autograd.Function` of the same forward and backward, with a rule for vmap.
Forward-mode derivatives come from the reference: `igpt_kernels.tensors.needs_plain_operations` says so.

Eager calls take such a function too. torch.library's own reads the schema anew each time, which takes 50 µs. And where
nothing looks at operators, eager calls take the implementation: through torch's dispatcher and back takes 7 µs more. Those are
times of a loop. Between products that fill the caches, the same Python takes five times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igpt_kernels.tensors import is_plain_cpu

Rule = Callable[[Any, int, Sequence[int | None], Sequence[Any]], Any]
"""(operator, size of the batch, dimension of it in each argument, arguments) -> results, the batch in their dimension 0."""

_implementations: dict[str, Callable[..., Any]] = {}
_functions: dict[str, Any] = {}
_eager_functions: dict[str, Any] = {}


def call(operator: Any, *arguments: Any) -> Any:
    """Call a registered operator that has a derivative: the operator itself wherever something else may handle it."""
    if torch._C._are_functorch_transforms_active():
        return _functions[operator.__name__].apply(*arguments)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if _is_handled(tensors):
        return operator(*arguments)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _eager_functions[operator.__name__].apply(*arguments)
    return _run(operator, arguments)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call a registered operator for its results alone: the operator itself wherever something else may handle it."""
    if _is_handled([x for x in arguments if isinstance(x, Tensor)]):
        return operator(*arguments)
    return _run(operator, arguments)


def _run(operator: Any, arguments: Sequence[Any]) -> Any:
    """The results, without derivatives: of the implementation where tensors are on the CPU and no profiler looks.

    A kernel that others register for the operator is not called there.
    """
    short = not torch.autograd.profiler._is_profiler_enabled and all(
        is_plain_cpu(x) for x in arguments if isinstance(x, Tensor)
    )
    with torch._C._AutoDispatchBelowAutograd():
        return _implementations[operator.__name__](*arguments) if short else operator(*arguments)


def _is_handled(tensors: Sequence[Tensor]) -> bool:
    """Whether a tracer, a mode, or a class of a tensor may do something else in place of an operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)
    )


def implemented(operator: Any, run: Callable[..., Any]) -> None:
    """Note the implementation of an operator, for `below_autograd`."""
    _implementations[operator.__name__] = run


def differentiable(operator: Any, save: Callable[..., None], backward: Callable[..., Any], rule: Rule) -> None:
    """Make the functions of an operator: for transforms, and for eager calls."""

    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        results = rule(operator, info.batch_size, in_dims, arguments)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    def eager(ctx: Any, *arguments: Any) -> Any:
        results = _run(operator, arguments)
        save(ctx, arguments, results)
        return results

    name, bases, both = operator.__name__, (torch.autograd.Function,), {"backward": staticmethod(backward)}
    rules = {"forward": staticmethod(operator), "setup_context": staticmethod(save), "vmap": staticmethod(vmap)}
    _functions[name] = type(name, bases, both | rules)
    # Without setup_context: torch reads the signature of a forward beside one at each call (11 µs).
    _eager_functions[name] = type(name, bases, both | {"forward": staticmethod(eager)})


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
