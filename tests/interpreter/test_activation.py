"""The kernels of the activation in Triton's interpreter, on the CPU, against the oracle in float64; see test_norm.py."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from igpt_kernels import testing
from igpt_kernels._triton.activation import launch_quick_gelu_backward, launch_quick_gelu_forward
from igpt_kernels.reference import quick_gelu_reference
from igpt_kernels.tuning import Config
from tests import kit
from tests.kit import matrix

DTYPES = kit.DTYPES
WIDTHS = [1, 2, 7, 16, 31, 32, 33, 48, 64, 65, 96, 100, 128, 200, 255, 256, 257]


class Gelu(torch.autograd.Function):
    """The two launchers as one differentiable function."""

    @staticmethod
    def forward(ctx, x, bias, config):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, bias)
        ctx.how = config
        return launch_quick_gelu_forward(x, bias, config=config)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *launch_quick_gelu_backward(grad, *ctx.saved_tensors, config=ctx.how), None


def check_gelu(x: Tensor, bias: Tensor | None = None, *, grad: Tensor | None = None, config: Config | None = None) -> None:
    found = kit.compare_gelu(lambda x, bias: Gelu.apply(x, bias, config), x, bias, grad=grad, guarded=2)
    assert found.outputs[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, biased: bool, dtype: torch.dtype) -> None:
    x = matrix(11, width, dtype, 0, "offset")
    check_gelu(x, matrix(1, width, dtype, 1)[0] if biased else None, config=Config(2, 32, 4, 1))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("shape", [(1, 16), (2, 64), (4, 16), (8, 32)], ids=str)
def test_rows(rows: int, shape: tuple[int, int]) -> None:
    x = matrix(rows, 40, torch.float32, 0)
    check_gelu(x, matrix(1, 40, torch.float32, 1)[0], config=Config(*shape, 4, 1))
    check_gelu(x, config=Config(*shape, 4, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("beside", testing.MEMORY_FORMATS)
def test_strides(memory: str, beside: str, dtype: torch.dtype) -> None:
    x, grad = matrix(9, 40, dtype, 0, memory), matrix(9, 40, dtype, 2, beside)
    check_gelu(x, matrix(1, 40, dtype, 1, "stepped")[0], grad=grad, config=Config(2, 32, 4, 1))
    check_gelu(x, grad=grad, config=Config(2, 32, 4, 1))


@pytest.mark.parametrize(("of_x", "of_bias"), [(x, bias) for x in DTYPES for bias in DTYPES], ids=str)
def test_mixed_dtypes(of_x: torch.dtype, of_bias: torch.dtype) -> None:
    check_gelu(matrix(9, 48, of_x, 0), matrix(1, 48, of_bias, 1)[0], config=Config(4, 32, 4, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_ends(dtype: torch.dtype) -> None:
    """Where the exponential overflows the activation is 0, where it vanishes the identity; slopes 0 and 1."""
    x = torch.tensor([[-1e4, -300.0, -60.0, -0.0, 0.0, 60.0, 300.0, 1e4, math.nan]]).to(dtype)
    config = Config(1, 16, 4, 1)
    y = launch_quick_gelu_forward(x, None, config=config)
    dx, _ = launch_quick_gelu_backward(torch.ones_like(x), x, None, config=config)
    assert float(y[0, :5].abs().max()) < 1e-30
    assert torch.equal(y[0, 5:8], x[0, 5:8])
    torch.testing.assert_close(dx[0, :8], torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1], dtype=dtype))
    assert y[0, 8].isnan()
    assert dx[0, 8].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 512, 1000, 2048, 6144, 9000])
def test_with_every_shipped_configuration(width: int, dtype: torch.dtype) -> None:
    x = matrix(6, width, dtype, 0)
    check_gelu(x, matrix(1, width, dtype, 1)[0])
    check_gelu(x)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = torch.rand(shape[-1], generator=torch.Generator().manual_seed(1)) + 1
    out = launch_quick_gelu_forward(x, bias, config=Config(2, 16, 4, 1))
    torch.testing.assert_close(out, quick_gelu_reference(x, bias=bias))
    dx, dbias = launch_quick_gelu_backward(x, x, bias, config=Config(2, 16, 4, 1))
    assert dbias is not None
    assert (dx.shape, dbias.shape) == (x.shape, bias.shape)
    assert x.numel() or (dbias == 0).all()


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    rows, width = rng.randint(1, 50), rng.randint(1, 300)
    dtype, memory = rng.choice(DTYPES), rng.choice(testing.MEMORY_FORMATS)
    bias = matrix(1, width, rng.choice([dtype, torch.float32]), seed + 2)[0]
    config = Config(rng.choice([1, 2, 8]), rng.choice([16, 64]), 4, 1)
    check_gelu(matrix(rows, width, dtype, seed, memory), rng.choice([None, bias]), config=config)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2³⁰ elements apart, in memory larger than any machine has: the pages between are never touched."""
    flat = torch.empty((3 << 30) + 64, dtype=torch.float16)
    x = flat.as_strided((4, 48), (1 << 30, 1))
    x.copy_(matrix(4, 48, torch.float16, 0))
    check_gelu(x, matrix(1, 48, torch.float16, 1)[0], grad=x, config=Config(2, 32, 4, 1))


def test_the_same_bits_in_every_run() -> None:
    x, bias = matrix(50, 96, torch.bfloat16, 0), matrix(1, 96, torch.bfloat16, 1)[0]
    first, *others = (launch_quick_gelu_backward(x, x, bias, config=Config(2, 32, 4, 1))[1] for _ in range(3))
    assert first is not None
    assert all(torch.equal(first, other) for other in others)
