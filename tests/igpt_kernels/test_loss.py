"""Cross-entropy of a linear layer by torch and C++ against the oracle in float64, and the oracle against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_kernels import backends, linear_cross_entropy, testing
from igpt_kernels._torch import loss as torch_loss
from igpt_kernels.reference import linear_cross_entropy_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
BACKENDS = ["torch", "ext"]
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype, *, layout: str = "contiguous", ignored: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = testing.make_input((1, 1, rows, width), dtype=dtype, seed=seed, memory=layout)[0, 0]
    weight = testing.make_input((1, 1, vocab, width), dtype=dtype, seed=seed + 1, memory=layout)[0, 0]
    generator = torch.Generator().manual_seed(seed + 2)
    target = torch.randint(vocab, (rows,), generator=generator)
    return hidden, weight, target.masked_fill(torch.rand(rows, generator=generator) < ignored, -100)


def result(call: Callable[..., Tensor], hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Loss, dhidden and dweight, detached."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))]


def compare(hidden: Tensor, weight: Tensor, target: Tensor, backend: str, **how: object) -> None:
    """Loss and gradients within the budget of eager at the same dtype."""
    shape = target.shape if how.get("reduction") == "none" else ()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, backend=backend, **how)  # type: ignore[arg-type]

    def oracle(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, target, **how)  # type: ignore[arg-type]

    mine = result(ours, hidden, weight, grad)
    exact = result(oracle, hidden.double(), weight.double(), grad)
    eager = result(oracle, hidden, weight, grad)
    largest = float((hidden.double() @ weight.double().t()).abs().max())
    assert [x.dtype for x in mine] == [torch.float32, hidden.dtype, hidden.dtype]
    for factor, floor, name, got, true, low in zip(
        (2, 3, 3), (largest, 1.0, 1.0), ("loss", "dhidden", "dweight"), mine, exact, eager, strict=True
    ):
        testing.error_ratio(got, true, low, factor=factor, floor=floor * max(1.0, float(grad.abs().max())), name=name)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(1, 1, 2), (2, 7, 2), (65, 24, 17), (200, 32, 512), (40, 100, 1000), (9, 8, 1), (70, 16, 200)]
)
def test_error_is_within_the_budget_of_eager(
    rows: int, width: int, vocab: int, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    hidden, weight, target = inputs(rows, width, vocab, dtype, ignored=0.2 if rows > 2 else 0.0)
    compare(hidden, weight, target, backend, reduction=reduction)


@on_backends
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", testing.MEMORY_FORMATS)
def test_strides(layout: str, reduction: str, backend: str) -> None:
    hidden, weight, target = inputs(33, 20, 9, torch.float32, layout=layout)
    compare(hidden, weight, torch.stack([target, target + 1], 1)[:, 0], backend, reduction=reduction)
    compare(hidden.t().contiguous().t(), weight.t().contiguous().t(), target, backend, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("step", [1, 7, 50, 51])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_some_rows_at_a_time(
    dtype: torch.dtype, step: int, z_loss: float, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of C++, which has its own number of rows: tests/igpt_kernels/_cpu/test_loss.py."""
    monkeypatch.setattr(torch_loss, "rows_at_once", lambda columns, device: step)
    hidden, weight, target = inputs(50, 12, 9, dtype)
    compare(hidden, weight, target, "torch", z_loss=z_loss, reduction=reduction)


def test_rows_at_once() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert torch_loss.rows_at_once(512, cpu) == 2048
    assert torch_loss.rows_at_once(512, gpu) == 32768
    assert torch_loss.rows_at_once(10**6, cpu) == 64


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_over_rows_in_groups(dtype: torch.dtype, splits: int) -> None:
    """Rows that no group takes are not left out; row strides as the launcher has them."""
    a, b = (testing.make_input((1, 1, 50, n), dtype=dtype, seed=n, memory="offset")[0, 0] for n in (9, 12))
    got = torch_loss.product_over_rows(a, b, splits, dtype)
    torch.testing.assert_close(got, a.t() @ b)


def test_groups_give_every_multiprocessor_a_tile() -> None:
    assert torch_loss.splits_of(32768, 512 * 512, 132) == 8
    assert torch_loss.splits_of(32768, 512 * 1536, 132) == 2
    assert torch_loss.splits_of(1000, 512 * 512, 132) == 3  # 256 rows or more
    assert torch_loss.splits_of(100, 512 * 512, 132) == torch_loss.splits_of(32768, 2048 * 2048, 132) == 1


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 99])
def test_is_what_torch_computes(ignore_index: int, reduction: str, backend: str) -> None:
    hidden, weight, target = inputs(50, 12, 9, torch.float64, ignored=0.0)
    target[::4] = ignore_index
    how = {"ignore_index": ignore_index, "reduction": reduction}
    grad = torch.randn(target.shape if reduction == "none" else (), dtype=torch.float64)
    got = result(lambda h, w: linear_cross_entropy(h, w, target, backend=backend, **how), hidden, weight, grad)  # type: ignore[arg-type]
    want = result(lambda h, w: F.cross_entropy(h @ w.t(), target, **how), hidden, weight, grad)  # type: ignore[arg-type]
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_without_a_z_loss_its_square_does_not_count(backend: str) -> None:
    """Logits of 1e25 are those of a model that diverges. Their square is infinite, and 0 times that NaN."""
    hidden, weight, target = inputs(9, 4, 5, torch.float32)
    weight *= 1e25
    found = result(lambda h, w: linear_cross_entropy(h, w, target, backend=backend), hidden, weight, torch.ones(()))
    want = result(lambda h, w: F.cross_entropy(h @ w.t(), target), hidden, weight, torch.ones(()))
    for mine, true in zip(found, want, strict=True):
        torch.testing.assert_close(mine, true)


def test_oracle_is_the_equation_written_out() -> None:
    hidden, weight, target = inputs(6, 4, 5, torch.float64, ignored=0.0)
    target[2] = -100
    losses = []
    for row, label in zip(hidden, target.tolist(), strict=True):
        logits = [float(row @ w) for w in weight]
        lse = math.log(sum(math.exp(x) for x in logits))
        losses.append(lse - logits[label] + 0.1 * lse**2 if label != -100 else 0.0)
    got = [linear_cross_entropy_reference(hidden, weight, target, z_loss=0.1, reduction=r) for r in ("none", "sum", "mean")]
    torch.testing.assert_close(got[0], torch.tensor(losses, dtype=torch.float64))
    assert float(got[1]) == pytest.approx(sum(losses))
    assert float(got[2]) == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 1, 3)])
def test_any_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, 8, generator=generator), torch.randn(6, 8, generator=generator)
    target = torch.randint(6, shape, generator=generator)
    rows = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    assert rows.shape == shape
    torch.testing.assert_close(rows.mean(), linear_cross_entropy(hidden, weight, target, backend=backend))
    torch.testing.assert_close(
        rows, F.cross_entropy((hidden @ weight.t()).reshape(-1, 6), target.reshape(-1), reduction="none").view(shape)
    )


def test_rows_that_are_no_view() -> None:
    hidden = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, target = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(18).view(3, 6) % 6
    loss = linear_cross_entropy(hidden[:, :-1], weight, target)
    torch.testing.assert_close(loss, F.cross_entropy((hidden[:, :-1] @ weight.t()).flatten(0, 1), target.flatten()))
    loss.backward()
    assert hidden.grad is not None
    assert (hidden.grad[:, -1] == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction: str, backend: str) -> None:
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), reduction=reduction, backend=backend)
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    dhidden, dweight = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert dhidden.shape == (0, 8)
    assert (dweight == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(reduction: str, backend: str) -> None:
    """The mean is NaN, as torch has it, and its gradients are 0, as torch has them."""
    hidden, weight, target = inputs(70, 8, 5, torch.float32, ignored=1.1)
    loss, dhidden, dweight = result(
        lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, backend=backend, z_loss=0.1),
        hidden,
        weight,
        torch.ones(70) if reduction == "none" else torch.ones(()),
    )
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert (dhidden == 0).all()
    assert (dweight == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_not_a_number_stays_in_its_row(reduction: str, backend: str) -> None:
    hidden, weight, target = inputs(40, 8, 5, torch.float32, ignored=0.0)
    grad = torch.ones(40) if reduction == "none" else torch.ones(())
    target[3] = -100

    def run(hidden: Tensor) -> list[Tensor]:
        return result(
            lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, backend=backend), hidden, weight, grad
        )

    clean = run(hidden)
    hidden[3] = math.nan  # does not count: neither its loss nor its gradient is NaN
    loss, dhidden, _ = run(hidden)
    assert torch.equal(loss, clean[0])
    assert torch.equal(dhidden, clean[1])
    hidden[20, 2] = math.nan
    loss, dhidden, _ = run(hidden)
    keep = torch.arange(40) != 20
    assert loss.isnan().sum() == 1
    assert dhidden[20].isnan().all()
    if reduction == "none":
        assert torch.equal(loss[keep], clean[0][keep])
    assert torch.equal(dhidden[keep], clean[1][keep])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_in_float64(reduction: str) -> None:
    hidden, weight, target = inputs(6, 3, 4, torch.float64)
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction, z_loss=0.1)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(
        lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, z_loss=0.1, backend="reference"), leaves
    )


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that an operation made; one like `result` is not looked at."""

    def __init__(self, result: Tensor | None = None) -> None:
        super().__init__()
        self.values, self.result = 0, None if result is None else (result.shape, result.dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and (x.shape, x.dtype) != self.result:
                self.values = max(self.values, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "vocab"), [(4, 512), (512, 2)])
def test_memory_does_not_grow_with_rows_times_classes(width: int, vocab: int, dtype: torch.dtype) -> None:
    """That of C++, whose calls no mode sees: tests/igpt_kernels/_cpu/test_loss.py."""
    rows = 20_000
    hidden, weight, target = inputs(rows, width, vocab, dtype)
    with Largest(hidden) as seen:  # dhidden is like it
        _, lse = torch_loss.cross_entropy_rows(hidden, weight, target, -100, 0.0)
        torch_loss.cross_entropy_rows_backward(torch.ones(rows), hidden, weight, target, lse, -100, 0.0, True, True)
        _, dhidden, dweight = torch_loss.cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True)
        torch_loss.cross_entropy_scale_(dhidden, torch.full((), 2.0))
        torch_loss.cross_entropy_scaled(dweight, torch.ones(()), torch.float32)
    assert seen.values == 1 << 20
    if vocab > width:
        with Largest() as seen:
            linear_cross_entropy_reference(hidden, weight, target)
        assert seen.values == rows * vocab


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_one_reads_no_gradient(dtype: torch.dtype) -> None:
    """What comes from above a loss that is the last number is 1: a pass over dhidden would be for nothing."""
    gradient = torch.randn(50, 8).to(dtype)
    for factor, largest in ((1.0, 1), (2.0, gradient.numel())):
        with Largest() as seen:
            torch_loss.cross_entropy_scale_(gradient, torch.tensor(factor))
        assert seen.values == largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.33370001, 65536.0, 2.0**-20, math.inf, math.nan])
def test_a_factor_is_not_rounded_to_half_dtypes(factor: float, dtype: torch.dtype) -> None:
    """Each value is multiplied in float32 and rounded once, in one pass over the gradient; 0 stays 0."""
    for rows in (1, 3, 700):
        gradient = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows)).to(dtype)
        gradient[0, :2] = 0.0
        want = (gradient.float() * factor).to(dtype).masked_fill(gradient == 0, 0.0)
        with Largest(gradient) as seen:
            torch_loss.cross_entropy_scale_(gradient, torch.tensor(factor))
        torch.testing.assert_close(gradient, want, rtol=0, atol=0, equal_nan=True)
        assert seen.values <= 1 or not math.isfinite(factor)


@on_backends
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_in_every_run(reduction: str, backend: str) -> None:
    hidden, weight, target = inputs(300, 24, 17, torch.bfloat16)
    grad = torch.ones(300) if reduction == "none" else torch.ones(())
    runs = [
        result(lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, backend=backend), hidden, weight, grad)
        for _ in range(5)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@on_backends
@pytest.mark.parametrize("reduction", [pytest.param("mean", marks=pytest.mark.slow), "sum", "none"])
def test_gradients_that_a_scaler_made_large(reduction: str, backend: str) -> None:
    """float16 with a gradient of 2¹⁶, which it cannot hold, over so many rows that 1/M alone would be nothing."""
    rows = 100_000 if reduction == "mean" else 5000
    hidden, weight, target = inputs(rows, 16, 300, torch.float16)
    grad = torch.full((rows,), 2.0) if reduction == "none" else torch.tensor(65536.0 if reduction == "mean" else 2.0)
    mine = result(lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction, backend=backend), hidden, weight, grad)
    exact = result(
        lambda h, w: linear_cross_entropy_reference(h, w, target, reduction=reduction), hidden.double(), weight.double(), grad
    )
    for got, true in zip(mine[1:], exact[1:], strict=True):
        torch.testing.assert_close(got.double(), true, rtol=2e-2, atol=2e-3 * float(true.abs().max()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, t: linear_cross_entropy(h.numpy(), w, t), TypeError, "hidden must be a torch.Tensor, got ndarray"),
        (lambda h, w, t: linear_cross_entropy(h.long(), w, t), TypeError, "hidden must have dtype.*int64"),
        (lambda h, w, t: linear_cross_entropy(h, w.half(), t), TypeError, "weight must have the dtype of hidden"),
        (lambda h, w, t: linear_cross_entropy(h, w[0], t), ValueError, "weight must have 2 dimensions"),
        (lambda h, w, t: linear_cross_entropy(h, w[:, :3], t), ValueError, r"weight must be \[V,C\] with hidden's C = 8"),
        (lambda h, w, t: linear_cross_entropy(h, w[:0], t), ValueError, r"weight must be \[V,C\]"),
        (lambda h, w, t: linear_cross_entropy(h[:, :0], w, t), ValueError, "hidden must be .*C at least 1"),
        (lambda h, w, t: linear_cross_entropy(h, w, t.float()), TypeError, "target must have dtype int64.*; got float32"),
        (lambda h, w, t: linear_cross_entropy(h, w, t[:4]), ValueError, r"target must have the shape \(5,\).*got \(4,\)"),
        (lambda h, w, t: linear_cross_entropy(h, w.to("meta"), t), ValueError, "weight must be on the device of hidden"),
        (lambda h, w, t: linear_cross_entropy(h, w, t.to("meta")), ValueError, "target must be on the device of hidden"),
        (lambda h, w, t: linear_cross_entropy(h, w, t + 6), ValueError, "target must be from 0 to 5 or ignore_index -100, got"),
        (
            lambda h, w, t: linear_cross_entropy(h, w, t + 2),
            ValueError,
            "target must be from 0 to 5 or ignore_index -100, got 6",
        ),
        (lambda h, w, t: linear_cross_entropy(h, w, t - 1), ValueError, "target must be from 0 to 5 .*got -1"),
        (lambda h, w, t: linear_cross_entropy(h, w, t - 99), ValueError, "target must be from 0 to 5.*got -99"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, ignore_index=0.5), TypeError, "ignore_index must be an int, got 0.5"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, ignore_index=2**63), ValueError, "ignore_index must fit into int64"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, z_loss=10**400), ValueError, "z_loss must be a finite number"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, reduction="max"), ValueError, "mean, sum or none; got 'max'"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, z_loss=-1.0), ValueError, "z_loss must be .* got -1.0"),
        (lambda h, w, t: linear_cross_entropy(h, w, t, z_loss=math.nan), ValueError, "z_loss must be .* got nan"),
        (
            lambda h, w, t: linear_cross_entropy(h, w, t, backend="liger"),
            ValueError,
            "auto, triton, ext, torch, reference.*liger",
        ),
        (lambda h, w, t: linear_cross_entropy(h, w, t, backend="triton"), backends.BackendUnavailable, "device cpu"),
    ],
)
def test_bad_arguments_are_named(change: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        change(torch.ones(5, 8), torch.ones(6, 8), torch.arange(5))  # type: ignore[operator]


def test_explain_knows_the_vocabulary() -> None:
    def triton(vocab: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        return dict(backends.explain("linear_cross_entropy", dtype=dtype, device="cuda:9", vocab=vocab))["triton"]

    assert triton(2) == triton(512) == triton(8192) == []
    assert triton(8193) == ["vocab 8193 is above 8192"]
    assert triton(1) == ["vocab 1 is below 2"]
    assert "float64" in triton(512, torch.float64)[0]
