"""The kernels of norm and activation on a GPU: what neither interpreter nor compiler can show. `make gpu` runs these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from igpt_kernels import quick_gelu, rms_norm, testing
from igpt_kernels.reference import quick_gelu_reference, rms_norm_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 31, 32, 33, 64, 100, 256, 512, 1000, 1024, 1536, 2048, 4096, 6144, 8191, 8192]


def matrix(rows: int, width: int, dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    """[rows, width] with NaN around it."""
    return testing.make_input((1, 1, rows, width), dtype=dtype, seed=seed, layout=layout, device="cuda")[0, 0]


def run(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    given = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return [out.detach() for out in outputs], list(torch.autograd.grad(outputs, leaves, given))


def check(
    ours: Callable[..., Sequence[Tensor]], oracle: Callable[..., Sequence[Tensor]], inputs: list[Tensor], grads: list[Tensor]
) -> None:
    """Outputs and gradients within the budgets of eager at the same dtypes, with every new tensor poisoned."""
    with testing.poisoned_memory():
        actual = run(ours, inputs, grads)
    eager = run(oracle, inputs, grads)
    exact = run(oracle, [x.double() for x in inputs], [grad.double() for grad in grads])
    floor = 4 * max(float(grad.double().abs().max()) for grad in grads)  # a row of one value has a gradient that cancels
    for name, factor, least, place in (("output", 2, 0.0, 0), ("gradient", 3, floor, 1)):
        for index, (mine, low, true) in enumerate(zip(actual[place], eager[place], exact[place], strict=True)):
            assert mine.dtype == low.dtype
            testing.error_ratio(mine, true, low, factor=factor, floor=least, name=f"{name} {index}")


def check_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    grads = [matrix(*x.shape, x.dtype, 9 + i) for i in range(1 if residual is None else 2)]  # type: ignore[misc]

    def call(function: Callable[..., object], **options: object) -> Callable[..., Sequence[Tensor]]:
        def outputs(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Sequence[Tensor]:
            found = function(x, weight, residual=residual, **options)
            return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]

        return outputs

    inputs = [x, weight] if residual is None else [x, weight, residual]
    check(call(rms_norm, backend="triton"), call(rms_norm_reference, eps=1e-5), inputs, grads)


def check_gelu(x: Tensor, bias: Tensor | None = None) -> None:
    check(
        lambda x, bias=None: [quick_gelu(x, bias=bias, backend="triton")],
        lambda x, bias=None: [quick_gelu_reference(x, bias=bias)],
        [x] if bias is None else [x, bias],
        [matrix(*x.shape, x.dtype, 9)],  # type: ignore[misc]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 1023])
def test_widths(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = matrix(rows, width, dtype, 1), matrix(rows, width, dtype, 2)
    weight = matrix(1, width, dtype, 3)[0]
    check_norm(x, weight)
    check_norm(x, weight, residual)
    check_gelu(x)
    check_gelu(x, weight)


@pytest.mark.parametrize("rows", [4096, 65536])
@pytest.mark.parametrize("width", [512, 1024, 1536, 2048, 6144])
def test_rows_of_image_gpt(width: int, rows: int) -> None:
    x, residual = matrix(rows, width, torch.bfloat16, 1), matrix(rows, width, torch.bfloat16, 2)
    weight = matrix(1, width, torch.bfloat16, 3)[0]
    check_norm(x, weight, residual)
    check_gelu(x, weight)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides(layout: str) -> None:
    x, residual = (matrix(333, 96, torch.float16, seed, layout) for seed in (1, 2))
    weight = matrix(2, 96, torch.float16, 3, "stepped")[1]
    check_norm(x, weight, residual)
    check_gelu(x, weight)


def test_mixed_dtypes_as_under_autocast() -> None:
    x, residual = matrix(500, 512, torch.bfloat16, 1), matrix(500, 512, torch.float32, 2)
    weight = matrix(1, 512, torch.float32, 3)[0]
    check_norm(x, weight)
    check_norm(x, weight, residual)
    check_gelu(x, weight)


def test_the_same_bits_a_thousand_times() -> None:
    x, residual = (matrix(4096, 512, torch.bfloat16, seed).requires_grad_() for seed in (1, 2))
    weight = matrix(1, 512, torch.bfloat16, 3)[0].requires_grad_()
    grads = [matrix(4096, 512, torch.bfloat16, seed) for seed in (4, 5)]
    first: list[Tensor] | None = None
    for _ in range(1000):
        normed, summed = rms_norm(x, weight, residual=residual, backend="triton")
        active = quick_gelu(x, bias=weight, backend="triton")
        found = [normed, summed, active, *torch.autograd.grad((normed, summed), (x, residual, weight), grads)]
        found += torch.autograd.grad(active, (x, weight), grads[0])
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    """Rows whose last ones are beyond 32-bit offsets."""
    rows = 2**31 // 512 + 1000
    x = torch.zeros(rows, 512, dtype=torch.bfloat16, device="cuda")
    x[-1000:] = matrix(1000, 512, torch.bfloat16, 1)
    weight = matrix(1, 512, torch.bfloat16, 3)[0]
    assert torch.equal(rms_norm(x, weight, backend="triton")[-1000:], rms_norm(x[-1000:].clone(), weight, backend="triton"))
    assert torch.equal(quick_gelu(x, backend="triton")[-1000:], quick_gelu(x[-1000:].clone(), backend="triton"))


def test_no_copies_are_kept_for_the_backward_pass() -> None:
    """Forward of norm and activation at 64 MiB: the output, and a number a row."""
    x = torch.randn(65536, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.ones(512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for call in (lambda: rms_norm(x, weight, backend="triton"), lambda: quick_gelu(x, bias=weight, backend="triton")):
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = call()
        assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + 65536 * 4 + 4096
        del out


def test_compiled_and_on_a_side_stream() -> None:
    x = matrix(1000, 512, torch.bfloat16, 1).requires_grad_()
    weight = matrix(1, 512, torch.bfloat16, 3)[0].requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = rms_norm(x, weight, residual=x, backend="triton")
        return (quick_gelu(normed, bias=weight, backend="triton") + summed).float().square().sum()

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight), (x, weight))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = torch.autograd.grad(loss(x, weight), (x, weight))
    torch.cuda.current_stream().wait_stream(stream)
    for a, b, c in zip(got, want, beside, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)
