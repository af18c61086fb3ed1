"""The loss with C++ between its products. What all backends must do is in tests/igpt_kernels/test_loss.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from igpt_kernels import backends, linear_cross_entropy
from igpt_kernels._cpu.loss import cross_entropy_rows, cross_entropy_rows_backward, cross_entropy_sum
from igpt_kernels._torch import loss as torch_loss
from tests.igpt_kernels.test_loss import inputs


@pytest.mark.parametrize("rows", [1, 40, 5000])
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 64, 65, 512, 700])
def test_agrees_with_torch(vocab: int, rows: int) -> None:
    """The same products, so only the pass between them can differ."""
    hidden, weight, target = inputs(rows, 12, vocab, torch.float32)
    got = cross_entropy_sum(hidden, weight, target, -100, 0.01, True, True, True)
    want = torch_loss.cross_entropy_sum(hidden, weight, target, -100, 0.01, True, True, True)
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-5, atol=2e-6 / math.sqrt(rows), equal_nan=True)
    for mine, true in zip(
        cross_entropy_rows(hidden, weight, target, -100, 0.01),
        torch_loss.cross_entropy_rows(hidden, weight, target, -100, 0.01),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_target_that_is_no_class_is_nan(dtype: torch.dtype) -> None:
    """Where nothing checks it (torch.compile). Nothing beyond the row is read or written."""
    hidden, weight, target = inputs(9, 12, 17, dtype, ignored=0.0)
    target[2], target[5], target[7] = 17, -1, -(2**40)
    loss, lse = cross_entropy_rows(hidden, weight, target, -100, 0.0)
    assert loss.isnan().nonzero().flatten().tolist() == lse.isnan().nonzero().flatten().tolist() == [2, 5, 7]
    _, dhidden, _ = cross_entropy_sum(hidden, weight, target, -100, 0.0, False, True, False)
    assert dhidden.isnan().all(1).nonzero().flatten().tolist() == [2, 5, 7]
    assert not dhidden[[0, 1, 3, 4, 6, 8]].isnan().any()


@pytest.mark.parametrize(
    ("place", "value", "label"),
    [(3, 3e38, 3), (3, -torch.inf, 5), (slice(None), -1e30, 0), (7, 88.0, 7), (0, 0.0, 1)],
    ids=["the largest", "-inf", "all small", "88", "zeros"],
)
def test_large_and_small_logits(place: int | slice, value: float, label: int) -> None:
    weight, target = torch.zeros(40, 1), torch.tensor([label])
    weight[place] = value
    want = F.cross_entropy(weight.double().t(), target)
    loss, _, dweight = cross_entropy_sum(torch.ones(1, 1), weight, target, -100, 0.0, True, True, True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(dweight).all()
    if value == -torch.inf:
        assert dweight[3] == 0  # no weight, and no gradient


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest allocation within a call, and of all that are alive at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(sizes), max(itertools.accumulate(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "vocab"), [(4, 512), (512, 4)])
def test_memory_is_that_of_some_rows(width: int, vocab: int, dtype: torch.dtype) -> None:
    """4 MiB of logits, 8 in bfloat16; in float16 as much of hidden and its gradient in float32. No mode sees calls of C++."""
    rows, size = 40_000, dtype.itemsize
    hidden, weight, target = inputs(rows, width, vocab, dtype)
    cross_entropy_rows(hidden, weight, target, -100, 0.0)  # loads the library
    part = 8 << 20 if dtype == torch.bfloat16 else 4 << 20
    gradients = rows * width * size + 2 * vocab * width * 4
    some = part * (1 if width == 4 else 2 if dtype == torch.float16 else 0) + (part // 128 if width == 512 else 0)
    vectors = 2 * rows * 4

    def both() -> None:
        lse = cross_entropy_rows(hidden, weight, target, -100, 0.0)[1]
        cross_entropy_rows_backward(torch.ones(rows), hidden, weight, target, lse, -100, 0.0, True, True)

    for call in (both, lambda: cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True)):
        largest, most = allocated(call)
        assert largest <= max(part, rows * width * size)
        assert most <= gradients + some + 3 * vectors + (1 << 17)
    largest, most = allocated(lambda: cross_entropy_sum(hidden, weight, target, -100, 0.0, True, False, False))
    assert most <= some + (1 << 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_several_parts(dtype: torch.dtype) -> None:
    """Each part has its own labels and factors. Sums over parts are float32: the first and the last cancel here."""
    rows, vocab = 3 << (13 if dtype == torch.bfloat16 else 11), 512
    hidden = torch.ones(rows, 4).to(dtype)
    hidden[rows // 3 :] /= 1024
    hidden[-rows // 3 :] = -1.0
    target = torch.zeros(rows, dtype=torch.int64)
    _, _, dweight = cross_entropy_sum(hidden, torch.zeros(vocab, 4).to(dtype), target, -100, 0.0, False, True, True)
    want = rows / 3 / 1024 * (1 / vocab - (torch.arange(vocab) == 0).double())
    torch.testing.assert_close(dweight.double(), want[:, None].expand(vocab, 4), rtol=1e-2, atol=0.0)

    hidden, weight, target = inputs(rows, 4, vocab, dtype)
    grad = torch.rand(rows)
    lse = cross_entropy_rows(hidden, weight, target, -100, 0.01)[1]
    how = grad, hidden, weight, target, lse, -100, 0.01, True, True
    exact = torch_loss.cross_entropy_rows_backward(*(x.double() if x.is_floating_point() else x for x in how[:5]), *how[5:])  # type: ignore[union-attr]
    for mine, true in zip(cross_entropy_rows_backward(*how), exact, strict=True):
        error = (mine.double() - true).norm() / true.norm()
        assert error <= max(1e-5, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("need_hidden", "need_weight"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_is_made(need_hidden: bool, need_weight: bool, dtype: torch.dtype) -> None:
    hidden, weight, target = inputs(9, 12, 17, dtype)
    how = hidden, weight, target, -100, 0.01
    want = cross_entropy_sum(*how, True, True, True)
    loss, dhidden, dweight = cross_entropy_sum(*how, True, need_hidden, need_weight)
    assert torch.equal(loss, want[0])
    assert torch.equal(dhidden, want[1] if need_hidden else want[1][:0])
    assert torch.equal(dweight, want[2] if need_weight else want[2][:0])


def test_gradients_of_bfloat16_are_rounded_to_it_at_once() -> None:
    """A factor may come later, and bfloat16 holds every sum. Float16 does not, so its sum stays float32."""
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)):
        hidden, weight, target = inputs(9, 12, 17, dtype)
        assert cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True)[2].dtype == kept
        assert torch_loss.sum_dtype(dtype, "ext") == kept


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_a_gradient_from_above_multiplies(factor: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, target = inputs(60, 12, 17, dtype)
        leaves = [x.requires_grad_() for x in (hidden, weight)]
        once, scaled = (
            torch.autograd.grad(linear_cross_entropy(*leaves, target, backend="ext") * each, leaves) for each in (1.0, factor)
        )
        for a, b in zip(once, scaled, strict=True):
            torch.testing.assert_close(
                b, a * factor, rtol=2 * torch.finfo(dtype).eps, atol=1e-7 if dtype != torch.float16 else 1e-6
            )


def test_defaults_of_torch_do_not_matter() -> None:
    hidden, weight, target = inputs(9, 12, 17, torch.float32)
    want = cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True)
        rows = cross_entropy_rows(hidden, weight, target, -100, 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {(x.dtype, x.device.type) for x in rows} == {(torch.float32, "cpu")}


def test_auto_takes_it_and_float64_does_not() -> None:
    hidden, weight, target = inputs(9, 12, 17, torch.bfloat16)
    assert backends.select("linear_cross_entropy", "auto", (hidden, weight), 17) == "ext"
    assert backends.select("linear_cross_entropy", "auto", (hidden.double(), weight.double()), 17) == "torch"
    with pytest.raises(backends.BackendUnavailable, match=r"ext: dtype torch.float64 is not one of"):
        linear_cross_entropy(hidden.double(), weight.double(), target, backend="ext")
