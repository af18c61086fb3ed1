"""The kernels of the norm on a GPU: what neither interpreter nor compiler can show. `make gpu` runs these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igpt_kernels import rms_norm, testing
from tests import kit, operators

pytestmark = pytest.mark.gpu

DTYPES = kit.DTYPES
WIDTHS = [1, 31, 32, 33, 64, 100, 256, 512, 1000, 1024, 1536, 2048, 4096, 6144, 8191, 8192]


def matrix(rows: int, width: int, dtype: torch.dtype, seed: int, memory: str = "contiguous") -> Tensor:
    return kit.matrix(rows, width, dtype, seed, memory, "cuda")


def check_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> object:
        return rms_norm(x, weight, residual=residual, backend="triton")

    kit.compare_norm(ours, x, weight, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 1023])
def test_widths(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = matrix(rows, width, dtype, 1), matrix(rows, width, dtype, 2)
    weight = matrix(1, width, dtype, 3)[0]
    check_norm(x, weight)
    check_norm(x, weight, residual)


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("rows", [4096, 65536])
@pytest.mark.parametrize("width", [512, 1024, 1536, 2048, 6144])
def test_rows_of_image_gpt(width: int, rows: int) -> None:
    x, residual = matrix(rows, width, torch.bfloat16, 1), matrix(rows, width, torch.bfloat16, 2)
    weight = matrix(1, width, torch.bfloat16, 3)[0]
    check_norm(x, weight, residual)


@pytest.mark.parametrize("memory", testing.MEMORY_FORMATS)
def test_strides(memory: str) -> None:
    x, residual = (matrix(333, 96, torch.float16, seed, memory) for seed in (1, 2))
    weight = matrix(2, 96, torch.float16, 3, "stepped")[1]
    check_norm(x, weight, residual)


def test_mixed_dtypes_as_under_autocast() -> None:
    x, residual = matrix(500, 512, torch.bfloat16, 1), matrix(500, 512, torch.float32, 2)
    weight = matrix(1, 512, torch.float32, 3)[0]
    check_norm(x, weight)
    check_norm(x, weight, residual)


def test_the_same_bits_a_thousand_times() -> None:
    x, residual = (matrix(4096, 512, torch.bfloat16, seed).requires_grad_() for seed in (1, 2))
    weight = matrix(1, 512, torch.bfloat16, 3)[0].requires_grad_()
    grads = [matrix(4096, 512, torch.bfloat16, seed) for seed in (4, 5)]
    first: list[Tensor] | None = None
    for _ in range(1000):
        normed, summed = rms_norm(x, weight, residual=residual, backend="triton")
        found = [normed, summed, *torch.autograd.grad((normed, summed), (x, residual, weight), grads)]
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    """Rows whose last ones are beyond 32-bit offsets."""
    rows = 2**31 // 512 + 1000
    x = torch.zeros(rows, 512, dtype=torch.bfloat16, device="cuda")
    x[-1000:] = matrix(1000, 512, torch.bfloat16, 1)
    weight = matrix(1, 512, torch.bfloat16, 3)[0]
    assert torch.equal(rms_norm(x, weight, backend="triton")[-1000:], rms_norm(x[-1000:].clone(), weight, backend="triton"))


def test_no_copies_are_kept_for_the_backward_pass() -> None:
    """Forward at 64 MiB: the output, and a number a row."""
    x = torch.randn(65536, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.ones(512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    rms_norm(x, weight, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = rms_norm(x, weight, backend="triton")
    assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + 65536 * 4 + 4096


def test_compiled_and_on_a_side_stream() -> None:
    x = matrix(1000, 512, torch.bfloat16, 1).requires_grad_()
    weight = matrix(1, 512, torch.bfloat16, 3)[0].requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = rms_norm(x, weight, residual=x, backend="triton")
        return (normed + summed).float().square().sum()

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight), (x, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    operators.check_side_stream(lambda: torch.autograd.grad(loss(x, weight), (x, weight)))
