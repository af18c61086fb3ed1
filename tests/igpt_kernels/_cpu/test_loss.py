"""The loss with C++ between its products. What all backends must do is in tests/igpt_kernels/test_loss.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from igpt_kernels import backends, linear_cross_entropy
from igpt_kernels._cpu.loss import cross_entropy_rows, cross_entropy_sum
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


def test_large_and_small_logits() -> None:
    logits = torch.zeros(5, 40)
    logits[0, 3], logits[1, 3], logits[2], logits[3, 7] = 3e38, -torch.inf, -1e30, 88.0
    target = torch.tensor([3, 5, 0, 7, 1])
    want = F.cross_entropy(logits.double(), target, reduction="none")
    loss, lse = torch.empty(5), torch.empty(5)
    torch.ops.igpt_kernels.cpu_cross_entropy(logits, target, None, 1.0, -100, 0.0, loss, lse)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert logits[1, 3] == 0  # no weight, and no gradient
    assert torch.isfinite(logits).all()


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
