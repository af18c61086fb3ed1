"""QuickGELU through the public function: values, strides, memory, errors, and its registered operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import igpt_kernels
from igpt_kernels import quick_gelu, testing
from igpt_kernels._ops import activation as activation_ops
from igpt_kernels._torch import rows as torch_rows
from igpt_kernels.backends import BackendUnavailable
from igpt_kernels.reference import quick_gelu_reference
from tests import kit, operators

DTYPES, ALL_DTYPES = kit.DTYPES, kit.ALL_DTYPES


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return quick_gelu(x, bias=bias, backend="torch")


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows are taken a few at a time, as long tensors are on the CPU."""
    if request.param:
        monkeypatch.setattr(torch_rows, "_PIECE", 100)
    return request.param


def test_the_oracle_is_the_equation() -> None:
    x, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 33), (33,)))
    torch.testing.assert_close(quick_gelu_reference(x), x / (1 + (-1.702 * x).exp()))
    torch.testing.assert_close(quick_gelu_reference(x, bias=bias), quick_gelu_reference(x + bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 100, 512, 1000])
@pytest.mark.parametrize("rows", [1, 37])
def test_widths(rows: int, width: int, dtype: torch.dtype, pieces: bool) -> None:
    x = kit.matrix(rows, width, dtype, 1)
    kit.compare_gelu(gelu, x)
    kit.compare_gelu(gelu, x, kit.vector(width, dtype, 5))


@pytest.mark.parametrize("kinds", list(itertools.product(testing.MEMORY_FORMATS, repeat=2)), ids="-".join)
def test_strides(kinds: tuple[str, str], pieces: bool) -> None:
    x, grad = (kit.matrix(21, 24, torch.float32, seed, kind) for seed, kind in enumerate(kinds))
    kit.compare_gelu(gelu, x, kit.matrix(2, 24, torch.float32, 5, "stepped")[1], grad=grad)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape, dtype=torch.float64).float()
    kit.compare_gelu(gelu, x, torch.randn(shape[-1]), grad=grad)


@pytest.mark.parametrize(
    "dtypes",
    [d for d in itertools.product(DTYPES, repeat=2) if torch.float16 not in d or torch.bfloat16 not in d],
    ids=str,
)
def test_mixed_dtypes_keep_the_dtype_of_x(dtypes: tuple[torch.dtype, ...]) -> None:
    x, bias = kit.matrix(9, 40, dtypes[0], 1), kit.vector(40, dtypes[1], 3)
    kit.compare_gelu(gelu, x, bias, grad=kit.matrix(9, 40, torch.float32, 4))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_activation_is_what_the_model_computes(dtype: torch.dtype) -> None:
    from igpt.model.image_gpt import quick_gelu as of_the_model

    kit.compare(of_the_model, quick_gelu_reference, [kit.matrix(9, 48, dtype, 1)], [kit.matrix(9, 48, dtype, 2)])


def test_ends_of_the_range() -> None:
    ends = torch.tensor([[-math.inf, -1e4, -100.0, 0.0, 100.0, 1e4, math.inf]], requires_grad=True)
    out = quick_gelu(ends[:, 1:6], backend="torch")
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
    (slope,) = torch.autograd.grad(out.sum(), ends)
    torch.testing.assert_close(slope[0, 1:6], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def leaves(*shape: int, dtype: torch.dtype = torch.float64, memory: str = "contiguous") -> tuple[Tensor, Tensor]:
    x, bias = kit.matrix(*shape, dtype, 0, memory), kit.vector(shape[1], dtype, 1)
    return x.detach().requires_grad_(), bias.detach().requires_grad_()


def test_gradcheck() -> None:
    x, bias = leaves(3, 5)
    assert torch.autograd.gradcheck(gelu, (x,))
    assert torch.autograd.gradcheck(gelu, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: quick_gelu(x, bias=b, backend="reference"), (x, bias))


@pytest.mark.slow
# Each memory format and each dtype once: opcheck takes a third of a second a call.
@pytest.mark.parametrize(
    ("dtype", "memory"),
    [*((torch.float32, memory) for memory in testing.MEMORY_FORMATS), *((dtype, "contiguous") for dtype in ALL_DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(grads: bool, dtype: torch.dtype, memory: str) -> None:
    for shape in ((3, 5), (1, 1), (4, 16), (0, 8)):
        x, bias = leaves(*shape, dtype=dtype, memory=memory)
        if not grads:
            x, bias = x.detach(), bias.detach()
        torch.library.opcheck(activation_ops.quick_gelu_forward, (x, bias, "torch"))
        torch.library.opcheck(activation_ops.quick_gelu_forward, (x, None, "torch"))
        for added in (None, bias.detach()):
            torch.library.opcheck(activation_ops.quick_gelu_backward, (x.detach() + 1, x.detach(), added, "torch"))


def test_opcheck_of_a_permuted_view() -> None:
    """Fakes must give the strides of what is really allocated."""
    bias = torch.randn(8, requires_grad=True)
    for x in (torch.randn(3, 4, 8).transpose(0, 1), torch.randn(4, 8, 3).transpose(1, 2)):
        torch.library.opcheck(activation_ops.quick_gelu_forward, (x.requires_grad_(), bias, "torch"))


def test_second_derivative_is_a_clear_error() -> None:
    x, bias = leaves(3, 5)
    (slope,) = torch.autograd.grad(gelu(x, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        slope.sum().backward()


def test_compile_without_breaks_and_once_for_all_lengths() -> None:
    operators.check_compiled(gelu, [leaves(rows, 16, dtype=torch.float32) for rows in (7, 12)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    operators.check_checkpointing(gelu, leaves(3, 5), reentrant=reentrant)


def test_the_same_bits_in_every_run() -> None:
    operators.check_same_bits(gelu, leaves(300, 64, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_kept_than_the_input(dtype: torch.dtype) -> None:
    x, bias = leaves(64, 32, dtype=dtype)
    assert operators.kept_bytes(gelu, [x, bias]) == 0
    assert operators.kept_bytes(lambda x, bias: quick_gelu_reference(x, bias=bias), [x, bias]) > 64 * 32 * dtype.itemsize


def test_backends_are_chosen_and_explained() -> None:
    table = dict(igpt_kernels.explain("quick_gelu", dtype=torch.float32, device="cpu", width=8))
    assert table["triton"]
    assert not table["torch"]
    with pytest.raises(BackendUnavailable, match="device cpu is not one of cuda"):
        quick_gelu(torch.randn(3, 8), backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        quick_gelu(torch.randn(3, 8), backend="sdpa")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quick_gelu([1.0]), TypeError, "x must be a torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: quick_gelu(torch.ones(2, 3), bias=torch.ones(2)), ValueError, "bias "),
        (lambda: quick_gelu(torch.ones(2, 3), bias=torch.ones(3, device="meta")), ValueError, "bias .*meta"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
