"""The kernels of the norm in Triton's interpreter, on the CPU, against the oracle in float64.

Runs in a process of its own with TRITON_INTERPRET=1 (tests/igpt_kernels/_triton/test_interpreter.py starts it). The
interpreter has four persistent programs where a GPU has hundreds, so that 5 tiles of rows already make one of them walk.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from igpt_kernels import testing, tuning
from igpt_kernels._triton.norm import launch_rms_norm_backward, launch_rms_norm_forward
from igpt_kernels.reference import rms_norm_reference
from igpt_kernels.tuning import Config
from tests import kit
from tests.kit import matrix

DTYPES = kit.DTYPES
WIDTHS = [1, 2, 7, 16, 31, 32, 33, 48, 64, 65, 96, 100, 128, 200, 255, 256, 257]


def tile(width: int, block_m: int) -> Config:
    return Config(block_m, 1 << (width - 1).bit_length(), 4, 1)


class Norm(torch.autograd.Function):
    """The two launchers as one differentiable function of x, residual and weight: the norm, and the sum with a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, config):  # type: ignore[no-untyped-def]
        out, summed, rstd = launch_rms_norm_forward(x, residual, weight, eps=eps, config=config)
        ctx.save_for_backward(x if summed is None else summed, weight, rstd)
        ctx.how = config, x.dtype, None if residual is None else residual.dtype
        return (out, rstd) if summed is None else (out, rstd, summed)

    @staticmethod
    def backward(ctx, grad, _, grad_summed=None):  # type: ignore[no-untyped-def]
        config, *dtypes = ctx.how
        s = ctx.saved_tensors[0]
        narrow = next((dtype for dtype in dtypes if dtype not in (None, s.dtype)), None)
        ds, low, dweight = launch_rms_norm_backward(grad, grad_summed, *ctx.saved_tensors, narrow=narrow, config=config)
        dx, dresidual = (None if dtype is None else low if dtype == narrow else ds for dtype in dtypes)
        return dx, dresidual, dweight, None, None


def check_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5, config: Config | None = None, seed: int = 9
) -> None:
    grads = [matrix(*x.shape, x.dtype, seed + i) for i in range(1 if residual is None else 2)]

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> list[Tensor]:
        out, _, *summed = Norm.apply(x, residual, weight, eps, config)
        return [out, *summed]

    found = kit.compare_norm(ours, x, weight, residual, eps=eps, grads=grads, guarded=2)
    assert all(out.is_contiguous() for out in found.outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: torch.dtype) -> None:
    check_norm(matrix(11, width, dtype, 0, "offset"), matrix(1, width, dtype, 1)[0], config=tile(width, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 32, 33, 100, 256])
def test_with_a_residual(width: int, dtype: torch.dtype) -> None:
    x, residual = matrix(13, width, dtype, 0), matrix(13, width, dtype, 2, "heads_last")
    check_norm(x, matrix(1, width, dtype, 1)[0], residual, config=tile(width, 2))


@pytest.mark.parametrize("block_m", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 33, 40])
def test_rows(rows: int, block_m: int) -> None:
    x, residual = (matrix(rows, 24, torch.float32, seed) for seed in (0, 2))
    check_norm(x, matrix(1, 24, torch.float32, 1)[0], residual, config=tile(24, block_m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("beside", testing.MEMORY_FORMATS)
def test_strides(memory: str, beside: str, dtype: torch.dtype) -> None:
    x, residual = matrix(9, 40, dtype, 0, memory), matrix(9, 40, dtype, 2, beside)
    weight = matrix(1, 40, dtype, 1, "stepped")[0]
    check_norm(x, weight, residual, config=tile(40, 2))
    check_norm(x, weight, config=tile(40, 2))


MIXED = [(x, residual, weight) for x in DTYPES for residual in (None, *DTYPES) for weight in DTYPES]


@pytest.mark.parametrize(("of_x", "of_residual", "of_weight"), MIXED, ids=str)
def test_mixed_dtypes(of_x: torch.dtype, of_residual: torch.dtype | None, of_weight: torch.dtype) -> None:
    """Float32 master weights and a float32 residual stream beside half-precision branches, and all other mixtures."""
    x, weight = matrix(9, 48, of_x, 0), matrix(1, 48, of_weight, 1)[0]
    residual = None if of_residual is None else matrix(9, 48, of_residual, 2)
    check_norm(x, weight, residual, config=tile(48, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_the_model_does(dtype: torch.dtype) -> None:
    """Bit for bit, but where the sum of squares falls on the other side of a rounding."""
    x, weight = matrix(64, 128, dtype, 0), matrix(1, 128, torch.float32, 1)[0].to(dtype)
    out, _, _ = launch_rms_norm_forward(x, None, weight, eps=1e-5, config=tile(128, 4))
    want = rms_norm_reference(x, weight)
    if dtype == torch.float32:
        torch.testing.assert_close(out, want, rtol=4e-7, atol=1e-7)
    else:
        assert (out == want).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_that_of_the_sum_as_it_is_stored(dtype: torch.dtype) -> None:
    """The next layer norms the stored sum again for its own branch; a sum that was not rounded would be another row."""
    x, residual = (matrix(64, 128, dtype, seed) for seed in (0, 1))
    weight = matrix(1, 128, torch.float32, 2)[0]
    out, summed, rstd = launch_rms_norm_forward(x, residual, weight, eps=1e-5, config=tile(128, 4))
    assert summed is not None
    again, _, again_rstd = launch_rms_norm_forward(summed, None, weight, eps=1e-5, config=tile(128, 4))
    assert torch.equal(out, again)
    assert torch.equal(rstd, again_rstd)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.3])
def test_eps(eps: float) -> None:
    x = matrix(9, 33, torch.float32, 0) * 1e-3
    check_norm(x, matrix(1, 33, torch.float32, 1)[0], eps=eps, config=tile(33, 2))
    zero = torch.zeros(3, 33)
    out, _, rstd = launch_rms_norm_forward(zero, None, torch.ones(33), eps=1e-5, config=tile(33, 2))
    assert (out == 0).all()
    torch.testing.assert_close(rstd, torch.full((3,), 1e-5**-0.5))


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_small_and_large_rows(scale: float) -> None:
    """A float16 of 60,000 squared does not fit in one."""
    for dtype in DTYPES:
        x = (matrix(7, 64, torch.float32, 0) * scale * 15).clamp(-6e4, 6e4).to(dtype)
        out, _, _ = launch_rms_norm_forward(x, None, torch.ones(64, dtype=dtype), eps=1e-5, config=tile(64, 2))
        exact, eager = (
            rms_norm_reference(x.double(), torch.ones(64).double()),
            rms_norm_reference(x, torch.ones(64, dtype=dtype)),
        )
        testing.error_ratio(out, exact, eager, factor=2)


def test_passes_nan_and_infinity_on_in_their_row_alone() -> None:
    x = matrix(8, 32, torch.float32, 0)
    x[2, 5], x[6, 0] = math.nan, math.inf
    out, _, rstd = launch_rms_norm_forward(x, None, torch.ones(32), eps=1e-5, config=tile(32, 4))
    assert out.isnan().any(1).nonzero().flatten().tolist() == [2, 6]
    ds, _, _ = launch_rms_norm_backward(torch.ones(8, 32), None, x, torch.ones(32), rstd, config=tile(32, 4))
    assert torch.isfinite(ds).all(1).logical_not().nonzero().flatten().tolist() == [2, 6]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20), (3, 0, 2, 5)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    width = shape[-1]
    weight = torch.rand(width, generator=torch.Generator().manual_seed(1)) + 1
    out, summed, rstd = launch_rms_norm_forward(x, x, weight, eps=1e-5, config=tile(width, 2))
    want = rms_norm_reference(x, weight, residual=x)
    torch.testing.assert_close((out, summed), want)
    assert rstd.shape == shape[:-1]
    ds, _, dweight = launch_rms_norm_backward(x, x, x, weight, rstd, config=tile(width, 2))
    assert (ds.shape, dweight.shape) == (x.shape, weight.shape)
    assert x.numel() or (dweight == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 65, 256, 512, 1000, 1024, 1536, 2048, 4096, 6144, 8192])
def test_with_every_shipped_configuration(width: int, dtype: torch.dtype) -> None:
    check_norm(matrix(3, width, dtype, 0), matrix(1, width, dtype, 1)[0], matrix(3, width, dtype, 2))


def test_a_row_that_does_not_fit_its_tile_is_an_error() -> None:
    x = torch.ones(2, 40)
    with pytest.raises(ValueError, match=r"block_n must be at least the width 40, got 32"):
        launch_rms_norm_forward(x, None, x[0], eps=1e-5, config=Config(2, 32, 4, 1))
    with pytest.raises(ValueError, match=r"block_n must be at least the width 40, got 32"):
        launch_rms_norm_backward(x, None, x, x[0], torch.ones(2), config=Config(2, 32, 4, 1))


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    rows, width = rng.randint(1, 50), rng.randint(1, 300)
    dtype, memory, beside = rng.choice(DTYPES), rng.choice(testing.MEMORY_FORMATS), rng.choice(testing.MEMORY_FORMATS)
    x, y = matrix(rows, width, dtype, seed, memory), matrix(rows, width, rng.choice([dtype, torch.float32]), seed + 1, beside)
    weight = matrix(1, width, rng.choice([dtype, torch.float32]), seed + 2)[0]
    check_norm(x, weight, rng.choice([None, y]), config=tile(width, rng.choice([1, 2, 4, 8])), seed=seed)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2³⁰ elements apart, in memory larger than any machine has: the pages between are never touched."""
    size, step = (3 << 30) + 64, 1 << 30
    try:
        flat = torch.empty(size, dtype=torch.float16)
    except RuntimeError as error:
        pytest.fail(f"no address space for {size * 2 / 2**30:.0f} GiB: {error}")
    x = flat.as_strided((4, 48), (step, 1))
    x.copy_(matrix(4, 48, torch.float16, 0))
    weight = matrix(1, 48, torch.float16, 1)[0]
    check_norm(x, weight, x, config=tile(48, 2))
    rstd = launch_rms_norm_forward(x, None, weight, eps=1e-5, config=tile(48, 2))[2]
    far = launch_rms_norm_backward(x, x, x, weight, rstd, config=tile(48, 2))
    near = launch_rms_norm_backward(*[x.contiguous()] * 3, weight, rstd, config=tile(48, 2))
    for a, b in zip(far, near, strict=True):
        assert a is b or torch.equal(a, b)


def test_the_same_bits_in_every_run() -> None:
    x, weight = matrix(50, 96, torch.bfloat16, 0), matrix(1, 96, torch.bfloat16, 1)[0]
    rstd = launch_rms_norm_forward(x, None, weight, eps=1e-5, config=tile(96, 2))[2]
    first, *others = (launch_rms_norm_backward(x, x, x, weight, rstd, config=tile(96, 2))[2] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_tables_list_tiles_that_hold_their_rows() -> None:
    for table in ("default", "sm_80", "sm_90", "sm_100", "amd"):
        for kernel in ("rms_norm_forward", "rms_norm_backward"):
            for bits in (16, 32):
                for width in range(1, tuning.WIDEST + 1):
                    assert tuning.nearest(tuning.table(table), kernel, bits, width).block_n >= width
