"""The kernels of the loss on a GPU: what neither interpreter nor compiler can show. `make gpu` runs these."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igpt_kernels import linear_cross_entropy, testing
from igpt_kernels._ops import loss as loss_ops
from igpt_kernels.reference import linear_cross_entropy_reference
from tests import kit, operators

pytestmark = pytest.mark.gpu

DTYPES = kit.DTYPES
REDUCTIONS = ["mean", "sum", "none"]
VOCABS = [2, 3, 16, 64, 65, 128, 129, 256, 512, 1000, 8192]  # every entry of the tables serves one


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype, memory: str = "contiguous", ignored: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = kit.matrix(rows, width, dtype, 1, memory, "cuda"), kit.matrix(vocab, width, dtype, 2, memory, "cuda")
    return hidden, weight.mul_(1 / math.sqrt(width)), kit.classes(rows, vocab, 3, ignored=ignored, device="cuda")


def result(call: Callable[..., Tensor], hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Loss, dhidden and dweight, detached."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))]


def compare(hidden: Tensor, weight: Tensor, target: Tensor, *, reduction: str = "none", z_loss: float = 0.0) -> None:
    """Loss and gradients within the budget of eager at the same dtype, with every new tensor poisoned."""

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction, z_loss=z_loss, backend="triton")

    kit.compare_loss(ours, hidden, weight, target, reduction=reduction, z_loss=z_loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_shipped_configuration(reduction: str, vocab: int, dtype: torch.dtype) -> None:
    compare(*inputs(333, 192, vocab, dtype), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("width", [512, 1024, 1536])
def test_sizes_of_models(width: int, reduction: str, dtype: torch.dtype) -> None:
    compare(*inputs(4096, width, 512, dtype), reduction=reduction, z_loss=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 2047, 32767, 32768, 32769, 70001])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows(reduction: str, rows: int) -> None:
    """Parts of 32,768 rows, and dweight in groups of rows that do not divide them."""
    compare(*inputs(rows, 128, 512, torch.bfloat16, ignored=0.1 if rows > 2 else 0.0), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 31, 33, 63, 64, 65, 100, 130, 1000])
def test_widths(width: int, dtype: torch.dtype) -> None:
    compare(*inputs(300, width, 512, dtype))


@pytest.mark.parametrize("memory", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(memory: str, dtype: torch.dtype) -> None:
    hidden, weight, target = inputs(500, 96, 130, dtype, memory)
    compare(hidden, weight, torch.stack([target, target.new_full((500,), 10**12)], 1)[:, 0])
    compare(hidden.t().contiguous().t(), weight.t().contiguous().t(), target)


def test_no_rows_and_none_that_count() -> None:
    for rows in (0, 100):
        hidden, weight, target = inputs(rows, 64, 512, torch.bfloat16, ignored=1.1)
        loss, dhidden, dweight = result(
            lambda h, w, t=target: linear_cross_entropy(h, w, t, backend="triton"),
            hidden,
            weight,
            torch.ones((), device="cuda"),
        )
        assert loss.isnan()
        assert (dhidden == 0).all()
        assert (dweight == 0).all()


def test_not_a_number_stays_in_its_row() -> None:
    hidden, weight, target = inputs(1000, 512, 512, torch.bfloat16, ignored=0.0)
    grad = torch.ones(1000, device="cuda")

    def run(hidden: Tensor, target: Tensor) -> list[Tensor]:
        return result(lambda h, w: linear_cross_entropy(h, w, target, reduction="none", backend="triton"), hidden, weight, grad)

    clean = run(hidden, target)
    dirty, wrong = hidden.clone(), target.clone()
    dirty[500, 3] = math.nan
    wrong[500] = 512
    keep = torch.arange(1000, device="cuda") != 500
    for loss, dhidden, _ in (run(dirty, target), run(hidden, wrong)):
        assert loss[500].isnan()
        assert dhidden[500].isnan().all()
        assert torch.equal(loss[keep], clean[0][keep])
        assert torch.equal(dhidden[keep], clean[1][keep])


@pytest.mark.parametrize("wrong", [-1, 512, 2**31, 2**32, -(2**62), 2**62])
def test_no_target_reads_beyond_the_tensors(wrong: int) -> None:
    hidden, weight, target = inputs(1000, 64, 512, torch.float32)
    target.fill_(wrong)
    loss, dhidden, dweight = result(
        lambda h, w: linear_cross_entropy(h, w, target, reduction="none"), hidden, weight, torch.ones(1000, device="cuda")
    )
    torch.cuda.synchronize()
    assert all(x.isnan().all() for x in (loss, dhidden, dweight))


def test_the_same_bits_in_every_run() -> None:
    hidden, weight, target = inputs(40000, 512, 512, torch.bfloat16)
    grad = torch.ones((), device="cuda")
    first: list[Tensor] | None = None
    for _ in range(200):
        run = result(lambda h, w: linear_cross_entropy(h, w, target), hidden, weight, grad)
        first = run if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def test_memory_is_a_fixed_workspace() -> None:
    """Beyond inputs and gradients: 32 MiB of logits, groups of dweight, a few values a row, and the library's own workspace."""
    peaks = {}
    for rows in (1 << 16, 1 << 18):
        hidden, weight, target = inputs(rows, 512, 512, torch.bfloat16)
        leaves = [x.requires_grad_() for x in (hidden, weight)]
        torch.autograd.grad(linear_cross_entropy(*leaves, target, backend="triton"), leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(linear_cross_entropy(*leaves, target, backend="triton"), leaves)
        torch.cuda.synchronize()
        peaks[rows] = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
        assert peaks[rows] <= (32 << 20) + (8 + 4) * weight.numel() * 4 + 32 * rows
        del grads, leaves, hidden
    eager = 4 * (1 << 18) * 512 * 2  # logits, their logarithms, and the gradients of both
    assert peaks[1 << 18] < 0.06 * eager


def test_more_than_two_to_the_31_elements() -> None:
    """4.3 million rows of 512: the last ones are beyond 32-bit offsets. Takes 9 GB."""
    rows, last = (1 << 22) + (1 << 16), 1000
    hidden = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
    assert hidden.numel() > 2**31
    hidden.zero_()[-last:].normal_()
    weight = torch.randn(512, 512, dtype=torch.bfloat16, device="cuda") / 20
    target = torch.randint(512, (rows,), device="cuda")
    loss, lse = loss_ops.cross_entropy_rows(hidden, weight, target, -100, 0.0, "triton")
    alone, _ = loss_ops.cross_entropy_rows(hidden[-last:].clone(), weight, target[-last:], -100, 0.0, "triton")
    assert torch.equal(loss[-last:], alone)
    torch.testing.assert_close(loss[:last], torch.full((last,), math.log(512), device="cuda"))
    ones = torch.ones((), device="cuda").expand(rows)
    dhidden, _ = loss_ops.cross_entropy_rows_backward(ones, hidden, weight, target, lse, -100, 0.0, True, False, "triton")

    def oracle(hidden: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight.to(hidden.dtype), target[-last:], reduction="none")

    small, one = hidden[-last:].clone(), ones[-last:]
    eager, exact = (kit.run(oracle, [x], [one.to(x.dtype)]).gradients[0] for x in (small, small.double()))
    testing.error_ratio(dhidden[-last:], exact, eager, factor=testing.GRADIENT_FACTOR, floor=1.0, name="dhidden")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_step_matches_eager(reduction: str) -> None:
    hidden, weight, target = inputs(3000, 512, 512, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_takes_its_dtype() -> None:
    hidden, weight, target = inputs(3000, 512, 512, torch.float32)
    wanted = linear_cross_entropy(hidden.half(), weight.half(), target)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_side_stream_and_graph() -> None:
    hidden, weight, target = inputs(20000, 512, 512, torch.bfloat16)
    grad = torch.ones((), device="cuda").expand(20000)

    def step() -> list[Tensor]:
        tensors = (hidden, weight, target)
        loss, lse = loss_ops.cross_entropy_rows(*tensors, -100, 0.0, "triton")
        rows = loss_ops.cross_entropy_rows_backward(grad, *tensors, lse, -100, 0.0, True, True, "triton")
        return [loss, *rows, *loss_ops.cross_entropy_sum(*tensors, -100, 0.0, True, True, True, "triton")]

    operators.check_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    hidden.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b)


def test_float16_where_torch_sums_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no product with a float32 result then. The others are less exact, so nothing is compared."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True)
    hidden, weight, target = inputs(3000, 64, 300, torch.float16)
    _, _, dweight = loss_ops.cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True, "triton")
    assert dweight.isfinite().all()
    assert dweight.dtype == torch.float32


def test_gradients_are_scaled_in_place_and_made_again() -> None:
    """A factor of 1 leaves the buffer as it is; another multiplies it; a second backward makes it anew."""
    hidden, weight, target = inputs(3000, 512, 512, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    arguments = (*leaves, target, -100, 0.0, True, True, True, "triton")
    total, made, _ = loss_ops.cross_entropy_sum(*arguments)
    before = made.clone()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert first[0].data_ptr() == made.data_ptr()
    assert torch.equal(first[0], before)
    second = torch.autograd.grad(4 * total, leaves)
    for one, four in zip(first, second, strict=True):
        assert torch.equal(4 * one, four)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_torch_backend_on_a_gpu(reduction: str) -> None:
    hidden, weight, target = inputs(20000, 64, 512, torch.float64)
    grad = torch.ones(20000 if reduction == "none" else (), dtype=torch.float64, device="cuda")
    got, want = (
        result(lambda h, w, b=b: linear_cross_entropy(h, w, target, reduction=reduction, backend=b), hidden, weight, grad)
        for b in ("torch", "reference")
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_that_a_scaler_made_large(backend: str) -> None:
    """float16 with a gradient of 2¹⁶, which it cannot hold, over so many rows that 1/M alone would be nothing."""
    hidden, weight, target = inputs(20000, 64, 300, torch.float16)
    grad = torch.tensor(65536.0, device="cuda")
    mine = result(lambda h, w: linear_cross_entropy(h, w, target, backend=backend), hidden, weight, grad)
    eager, exact = (
        result(lambda h, w: linear_cross_entropy_reference(h, w, target), hidden.to(dtype), weight.to(dtype), grad)
        for dtype in (torch.float16, torch.float64)
    )
    for name, got, true, low in zip(("dhidden", "dweight"), mine[1:], exact[1:], eager[1:], strict=True):
        testing.error_ratio(got, true, low, factor=testing.GRADIENT_FACTOR, floor=float(true.abs().max()), name=name)
