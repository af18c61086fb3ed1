"""RMSNorm through the public function: values, strides, memory, errors, and its registered operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import igpt_kernels
from igpt_kernels import rms_norm, testing
from igpt_kernels._ops import norm as norm_ops
from igpt_kernels._torch import rows as torch_rows
from igpt_kernels.backends import BackendUnavailable
from igpt_kernels.reference import rms_norm_reference
from tests import kit, operators

DTYPES, ALL_DTYPES = kit.DTYPES, kit.ALL_DTYPES


def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> object:
    return rms_norm(x, weight, residual=residual, backend="torch")


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows are taken a few at a time, as long tensors are on the CPU."""
    if request.param:
        monkeypatch.setattr(torch_rows, "_PIECE", 100)
    return request.param


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, memory: str = "contiguous") -> list[Tensor]:
    found = [
        kit.matrix(*shape, dtype, seed, memory) if len(shape) == 2 else kit.vector(*shape, dtype, seed)
        for seed, shape in enumerate(shapes)
    ]
    return [x.detach().requires_grad_() for x in found]


def test_the_oracle_is_the_equation() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 33), (33,)))
    root = (x.square().sum(1) / 33 + 0.01).sqrt()
    torch.testing.assert_close(rms_norm_reference(x, weight, eps=0.01), x / root[:, None] * weight)
    normed, total = rms_norm_reference(x, weight, eps=0.01, residual=2 * x)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(normed, rms_norm_reference(3 * x, weight, eps=0.01))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 100, 512, 1000])
@pytest.mark.parametrize("rows", [1, 37])
def test_widths(rows: int, width: int, dtype: torch.dtype, pieces: bool) -> None:
    x, residual = (kit.matrix(rows, width, dtype, seed) for seed in range(2))
    weight = kit.vector(width, dtype, 5)
    kit.compare_norm(norm, x, weight)
    kit.compare_norm(norm, x, weight, residual)


@pytest.mark.parametrize("kinds", list(itertools.product(testing.MEMORY_FORMATS, repeat=2)), ids="-".join)
def test_strides(kinds: tuple[str, str], pieces: bool) -> None:
    x, residual = (kit.matrix(21, 24, torch.float32, seed, kind) for seed, kind in enumerate(kinds))
    weight = kit.matrix(2, 24, torch.float32, 5, "stepped")[1]
    grads = [kit.matrix(21, 24, torch.float32, 6 + seed, kind) for seed, kind in enumerate(reversed(kinds))]
    kit.compare_norm(norm, x, weight, residual, grads=grads)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape, dtype=torch.float64).float()
    kit.compare_norm(norm, x, torch.randn(shape[-1]), x + 1, grads=[grad, grad])


@pytest.mark.parametrize(
    "dtypes",
    [d for d in itertools.product(DTYPES, repeat=3) if torch.float16 not in d or torch.bfloat16 not in d],
    ids=str,
)
def test_mixed_dtypes_promote_as_the_model_does(dtypes: tuple[torch.dtype, ...]) -> None:
    x, residual = (kit.matrix(9, 40, dtype, seed) for seed, dtype in enumerate(dtypes[:2]))
    grads = [kit.matrix(9, 40, torch.float32, 4 + i) for i in range(2)]
    kit.compare_norm(norm, x, kit.vector(40, dtypes[2], 3), residual, grads=grads)


def test_norm_is_what_the_model_computes() -> None:
    from igpt.model.image_gpt import plain_norm

    for dtype in ALL_DTYPES:
        x, weight = kit.matrix(9, 48, dtype, 1), kit.vector(48, dtype, 2)
        assert torch.equal(rms_norm(x, weight, backend="reference"), plain_norm(x, weight))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.3])
def test_eps(eps: float) -> None:
    x, weight = kit.matrix(9, 40, torch.float32, 1), kit.vector(40, torch.float32, 2)

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> object:
        return rms_norm(x, weight, eps=eps, backend="torch")

    kit.compare_norm(ours, x, weight, eps=eps)


def test_rows_of_zeros_and_rows_that_are_not_numbers() -> None:
    x, weight = torch.randn(5, 8), torch.ones(8)
    x[1], x[3, 2] = 0.0, math.nan
    for backend in ("torch", "reference"):
        out = rms_norm(x, weight, backend=backend)
        assert (out[1] == 0).all()
        assert out[3].isnan().all()
        assert out[[0, 1, 2, 4]].isfinite().all()


def test_gradcheck() -> None:
    x, residual, weight = leaves((3, 5), (3, 5), (5,))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, backend="torch"), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, backend="torch"), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, backend="torch")[1], (x, weight, residual))
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, backend="reference"), (x, weight))


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
        x, residual, weight = leaves(shape, shape, shape[1:], dtype=dtype, memory=memory)
        if not grads:
            x, residual, weight = x.detach(), residual.detach(), weight.detach()
        torch.library.opcheck(norm_ops.rms_norm_forward, (x, weight, 1e-5, "torch"))
        torch.library.opcheck(norm_ops.add_rms_norm_forward, (x, residual, weight, 1e-5, "torch"))
        s, grad, scale = x.detach(), residual.detach(), weight.detach()
        rstd = s.new_ones(shape[:1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for more, narrow in ((None, None), (grad, torch.bfloat16)):
            torch.library.opcheck(norm_ops.rms_norm_backward, (grad, more, s, scale, rstd, narrow, "torch"))


def test_opcheck_of_a_permuted_view() -> None:
    """Fakes must give the strides of what is really allocated."""
    x = torch.randn(3, 4, 8).transpose(0, 1).requires_grad_()
    weight = torch.randn(8, requires_grad=True)
    torch.library.opcheck(norm_ops.rms_norm_forward, (x, weight, 1e-5, "torch"))
    torch.library.opcheck(norm_ops.add_rms_norm_forward, (x, x, weight, 1e-5, "torch"))


def test_second_derivative_is_a_clear_error() -> None:
    x, weight = leaves((3, 5), (5,))
    (slope,) = torch.autograd.grad(rms_norm(x, weight, backend="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        slope.sum().backward()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, residual, weight = leaves((3, 5), (3, 5), (5,))
    normed, total = rms_norm(x, weight, residual=residual, backend="torch")
    assert torch.equal(torch.autograd.grad(total.sum(), x, retain_graph=True)[0], torch.ones(3, 5, dtype=torch.float64))
    alone = rms_norm((x + residual).detach().requires_grad_(), weight, backend="torch")
    torch.testing.assert_close(torch.autograd.grad(normed.sum(), weight), torch.autograd.grad(alone.sum(), weight))


def test_compile_without_breaks_and_once_for_all_lengths() -> None:
    def twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual=2 * x, backend="torch")

    operators.check_compiled(twice, [leaves((rows, 16), (16,), dtype=torch.float32) for rows in (7, 12)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    operators.check_checkpointing(norm, leaves((3, 5), (5,)), reentrant=reentrant)


def test_the_same_bits_in_every_run() -> None:
    x, weight, residual = leaves((300, 64), (64,), (300, 64), dtype=torch.float32)
    operators.check_same_bits(norm, [x, weight, residual])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_kept_than_the_input(dtype: torch.dtype) -> None:
    from igpt.model.image_gpt import plain_norm

    x, weight = leaves((64, 32), (32,), dtype=dtype)
    assert operators.kept_bytes(norm, [x, weight]) == 64 * 4
    assert operators.kept_bytes(plain_norm, [x, weight]) > 64 * 32 * dtype.itemsize


def test_backends_are_chosen_and_explained() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    table = dict(igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu", width=8))
    assert table["triton"]
    assert not table["torch"]
    assert dict(igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cuda", width=8193))["triton"]
    with pytest.raises(BackendUnavailable, match="device cpu is not one of cuda"):
        rms_norm(x, weight, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        rms_norm(x, weight, backend="sdpa")
    with pytest.raises(TypeError, match="width must be given"):
        igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu")
    with pytest.raises(TypeError, match="head_dim must be None"):
        igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu", head_dim=64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rms_norm([1.0], torch.ones(1)), TypeError, "x must be a torch.Tensor, got list"),  # type: ignore[call-overload]
        (lambda: rms_norm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3)), TypeError, "x must have dtype .*got int64"),
        (lambda: rms_norm(torch.ones(()), torch.ones(1)), ValueError, "x "),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight .*\(3,\).*\(4,\)"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3, dtype=torch.float64)), TypeError, "weight .*float64"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), residual=torch.ones(3, 2)), ValueError, "residual .*"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), eps=-1.0), ValueError, "eps .*-1"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), eps=math.nan), ValueError, "eps .*nan"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), eps=10**400), ValueError, "eps must be a finite number"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
