"""The checks of `tests.operators` must be able to fail: each is given an operation with the fault that it looks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import operators


class Rounded(torch.autograd.Function):
    """x² whose gradient differs between calls, by what is added to `Rounded.error`."""

    error = 0.0

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        Rounded.error += 1e-3
        return grad * (2 * ctx.saved_tensors[0] + Rounded.error)  # type: ignore[attr-defined]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_several_outputs_and_other_arguments() -> None:
    x, y = leaf(3, 4), leaf(3, 4)
    dx, dy = operators.gradients(lambda x, factor, y: (x * factor, y), [x, 3, y])
    torch.testing.assert_close(dx, 18 * x)
    torch.testing.assert_close(dy, 2 * y)


def test_gradients_that_differ_between_runs_are_seen() -> None:
    operators.check_same_bits(torch.square, [leaf(3)])
    with pytest.raises(AssertionError):
        operators.check_same_bits(Rounded.apply, [leaf(3)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_that_differ_under_checkpointing_are_seen(reentrant: bool) -> None:
    operators.check_checkpointing(torch.square, [leaf(3)], reentrant=reentrant)
    with pytest.raises(AssertionError):
        operators.check_checkpointing(Rounded.apply, [leaf(3)], reentrant=reentrant)


def test_a_graph_for_each_length_is_seen() -> None:
    operators.check_compiled(torch.square, [[leaf(7)], [leaf(12)]])
    with pytest.raises(AssertionError):
        operators.check_compiled(torch.square, [[leaf(7)], [leaf(12)]], dynamic=False)


def test_wrong_gradients_of_the_compiled_function_are_seen() -> None:
    def other(x: Tensor) -> Tensor:
        return x * (2 if torch.compiler.is_compiling() else 1)

    with pytest.raises(AssertionError, match="not close"):
        operators.check_compiled(other, [[leaf(7)]])


def test_a_graph_break_is_seen() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.square()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        operators.check_compiled(broken, [[leaf(7)]])


def test_what_is_kept_is_counted_once() -> None:
    x = leaf(5, 4)
    assert operators.kept_bytes(torch.square, [x]) == 0  # x itself
    assert operators.kept_bytes(torch.exp, [x]) == 5 * 4 * 4  # the result
    assert operators.kept_bytes(lambda x: torch.exp(x).square(), [x]) == 5 * 4 * 4
