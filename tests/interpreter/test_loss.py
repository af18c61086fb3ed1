"""The kernels of the loss in Triton's interpreter, on the CPU, against the oracle in float64.

Runs in a process of its own with TRITON_INTERPRET=1 (tests/igpt_kernels/_triton/test_interpreter.py starts it).
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from igpt_kernels import backends, linear_cross_entropy, testing
from igpt_kernels._triton import loss as triton_loss
from igpt_kernels._triton.loss import (
    launch_cross_entropy_backward,
    launch_cross_entropy_forward,
    launch_cross_entropy_scale_,
    launch_cross_entropy_scaled,
    launch_cross_entropy_sum,
)
from igpt_kernels.reference import linear_cross_entropy_reference
from igpt_kernels.tuning import Config
from tests import kit
from tests.kit import IGNORED, matrix
from tests.kit import classes as targets

SMALL = Config(16, 16, 4, 1)
WIDE = Config(32, 64, 4, 1)
DTYPES = kit.DTYPES
BACK = {"ignore_index": IGNORED, "z_loss": 0.0, "config": Config(16, 64, 4, 1)}


def rows_of(config: Config, vocab: int) -> Config:
    """A tile of whole rows, as many as `config` has, for the kernel that makes gradients."""
    return Config(config.block_m, max(16, 1 << (vocab - 1).bit_length()), 4, 1)


class Loss(torch.autograd.Function):
    """Every row's loss: the forward and the backward launcher as one differentiable function."""

    @staticmethod
    def forward(ctx, hidden, weight, target, z_loss, ignore_index, config, chunk):  # type: ignore[no-untyped-def]
        how = {"ignore_index": ignore_index, "z_loss": z_loss}
        loss, lse = launch_cross_entropy_forward(hidden, weight, target, **how, config=config)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.how = how | {"chunk": chunk, "config": rows_of(config, weight.shape[0])}
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        return *launch_cross_entropy_backward(grad, *ctx.saved_tensors, **ctx.how), None, None, None, None, None


class Sum(torch.autograd.Function):
    """The sum or mean, whose gradients are made beside it and scaled in place."""

    @staticmethod
    def forward(ctx, hidden, weight, target, z_loss, ignore_index, mean, config, chunk):  # type: ignore[no-untyped-def]
        how = {"ignore_index": ignore_index, "z_loss": z_loss, "mean": mean, "chunk": chunk}
        loss, *ctx.made = launch_cross_entropy_sum(hidden, weight, target, **how, config=rows_of(config, weight.shape[0]))
        ctx.count = (target != ignore_index).sum() if mean and hidden.dtype == torch.float16 else 1
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dhidden, dweight = ctx.made
        launch_cross_entropy_scale_(dhidden, grad / ctx.count)
        return dhidden, launch_cross_entropy_scaled(dweight, grad / ctx.count, dhidden.dtype), *(None,) * 6


def compare(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = IGNORED,
    config: Config = SMALL,
    chunk: int = 40,
    grad: Tensor | None = None,
) -> None:
    """Both ways within their budgets, with nothing written outside of the outputs."""
    how = {"z_loss": z_loss, "ignore_index": ignore_index}

    def rows(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return Loss.apply(hidden, weight, target, z_loss, ignore_index, config, chunk)

    found = kit.compare_loss(rows, hidden, weight, target, grad=grad, guarded=4, **how)
    assert (found.outputs[0][target == ignore_index] == 0).all()
    assert (found.gradients[0][target == ignore_index] == 0).all()
    for reduction in ("sum", "mean") if (target != ignore_index).any() else ():

        def number(hidden: Tensor, weight: Tensor, mean: bool = reduction == "mean") -> Tensor:
            return Sum.apply(hidden, weight, target, z_loss, ignore_index, mean, config, chunk)

        found = kit.compare_loss(number, hidden, weight, target, reduction=reduction, guarded=4, **how)
        assert (found.gradients[0][target == ignore_index] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 81])
@pytest.mark.parametrize("vocab", [2, 3, 15, 16, 17, 33, 64])
def test_sizes(rows: int, vocab: int, dtype: torch.dtype) -> None:
    compare(matrix(rows, 24, dtype, 1), matrix(vocab, 24, dtype, 2), targets(rows, vocab, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 31, 32, 33, 64, 65, 128, 200])
def test_widths(width: int, dtype: torch.dtype) -> None:
    compare(matrix(20, width, dtype, 1), matrix(19, width, dtype, 2), targets(20, 19, 3), config=WIDE)


@pytest.mark.parametrize("hidden_layout", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("weight_layout", testing.MEMORY_FORMATS)
def test_strides(hidden_layout: str, weight_layout: str) -> None:
    hidden = matrix(21, 40, torch.float32, 1, hidden_layout)
    weight = matrix(18, 40, torch.float32, 2, weight_layout)
    target = torch.stack([targets(21, 18, 3), torch.full((21,), 10**9)], 1)[:, 0]
    compare(hidden, weight, target, grad=torch.ones(()).expand(21))
    # Rows and columns exchanged: the values of a row are apart, as in a transposed tensor.
    compare(hidden.t().contiguous().t(), weight.t().contiguous().t(), target, grad=torch.randn(21, 2)[:, 1])


@pytest.mark.parametrize("config", [SMALL, WIDE, Config(64, 16, 4, 1), Config(16, 128, 4, 1)], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3, 0.5])
def test_z_loss(config: Config, z_loss: float) -> None:
    compare(
        matrix(35, 16, torch.float32, 1), matrix(40, 16, torch.float32, 2), targets(35, 40, 3), z_loss=z_loss, config=config
    )


@pytest.mark.parametrize("chunk", [1, 5, 16, 35, 36, 1000])
def test_chunks(chunk: int) -> None:
    compare(matrix(36, 16, torch.bfloat16, 1), matrix(20, 16, torch.bfloat16, 2), targets(36, 20, 3), chunk=chunk)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 10**6, -(10**12)])
def test_any_ignore_index(ignore_index: int) -> None:
    target = targets(30, 7, 3, ignored=0.0)
    target[::3] = ignore_index
    compare(matrix(30, 16, torch.float32, 1), matrix(7, 16, torch.float32, 2), target, ignore_index=ignore_index)


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed)
    rows, vocab, width = rng.randint(1, 70), rng.randint(2, 90), rng.randint(1, 90)
    dtype = rng.choice(DTYPES)
    compare(
        matrix(rows, width, dtype, seed, rng.choice(testing.MEMORY_FORMATS)) * rng.choice([0.1, 1.0]),
        matrix(vocab, width, dtype, seed + 100, rng.choice(testing.MEMORY_FORMATS)),
        targets(rows, vocab, seed, ignored=rng.choice([0.0, 0.5])),
        z_loss=rng.choice([0.0, 1e-3]),
        config=Config(rng.choice([16, 32]), rng.choice([16, 32, 64]), 4, 1),
        chunk=rng.randint(1, 80),
    )


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.eye(4, 16) * 1e4, torch.eye(20, 16)
    target = torch.tensor([0, 1, 2, 4])
    loss, lse = launch_cross_entropy_forward(hidden, weight, target, ignore_index=IGNORED, z_loss=0.0, config=SMALL)
    assert torch.equal(loss, torch.tensor([0.0, 0.0, 0.0, 1e4]))
    assert torch.equal(lse, torch.full((4,), 1e4))
    total, dhidden, dweight = launch_cross_entropy_sum(hidden, weight, target, mean=False, **BACK)
    assert total == 1e4
    wanted = torch.zeros(4, 16)
    wanted[3, 3], wanted[3, 4] = 1.0, -1.0
    assert torch.equal(dhidden, wanted)
    assert torch.equal(dweight[:5, 3], torch.tensor([0.0, 0.0, 0.0, 1e4, -1e4]))


def test_classes_switched_off() -> None:
    """Logits of -inf in all of the first tile, and in some of a later one."""
    hidden, weight = torch.ones(3, 1), torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    weight[:20] = -math.inf
    weight[30] = -math.inf
    target = torch.tensor([25, 39, IGNORED])
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    loss, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, target, reduction="none"))
    total, _, dweight = launch_cross_entropy_sum(hidden, weight, target, mean=False, **BACK)
    torch.testing.assert_close(total, loss.sum())
    assert not dweight.isnan().any()
    assert (dweight[:20] == 0).all()
    dhidden, _ = launch_cross_entropy_backward(torch.zeros(3), hidden, weight, target, lse, **BACK)
    assert dhidden.isnan().all()  # 0 times the weights of -inf, as in eager


def test_nothing_to_do() -> None:
    hidden, weight, target = torch.zeros(0, 8), torch.ones(5, 8), torch.zeros(0, dtype=torch.int64)
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    loss, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    assert loss.shape == lse.shape == (0,)
    dhidden, dweight = launch_cross_entropy_backward(loss, hidden, weight, target, lse, **BACK)
    assert dhidden.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros(5, 8))


def test_no_row_counts() -> None:
    """Then the mean has the gradient inf, and rows of NaN have been hidden by the caller."""
    hidden, weight = torch.full((20, 16), math.nan), matrix(9, 16, torch.float32, 2)
    hidden[::2] = 1.0
    target = torch.full((20,), IGNORED)
    how = {"ignore_index": IGNORED, "z_loss": 0.1, "config": SMALL}
    loss, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    assert (loss == 0).all()
    grad = torch.full((20,), math.inf)
    dhidden, _ = launch_cross_entropy_backward(grad, hidden, weight, target, lse, **BACK)
    assert (dhidden == 0).all()
    _, dweight = launch_cross_entropy_backward(grad, hidden[::2], weight, target[::2], lse[::2].contiguous(), **BACK)
    assert (dweight == 0).all()


def test_not_a_number_stays_in_its_row() -> None:
    hidden, weight, target = matrix(40, 16, torch.float32, 1), matrix(20, 16, torch.float32, 2), targets(40, 20, 3, ignored=0.0)
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    keep = torch.arange(40) != 21
    clean, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    wanted, _ = launch_cross_entropy_backward(torch.ones(40), hidden, weight, target, lse, **BACK)
    hidden[21, 3] = math.nan
    dirty, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    got, _ = launch_cross_entropy_backward(torch.ones(40), hidden, weight, target, lse, **BACK)
    assert dirty[21].isnan()
    assert got[21].isnan().all()
    assert torch.equal(dirty[keep], clean[keep])
    assert torch.equal(got[keep], wanted[keep])


@pytest.mark.parametrize("wrong", [-1, 20, 2**31, 2**32, -(2**32) + 3, 2**63 - 1, -(2**63)])
def test_a_target_that_is_no_class_makes_its_row_nan(wrong: int) -> None:
    hidden, weight, target = matrix(18, 16, torch.float32, 1), matrix(20, 16, torch.float32, 2), targets(18, 20, 3, ignored=0.0)
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    clean, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    wanted, _ = launch_cross_entropy_backward(torch.ones(18), hidden, weight, target, lse, **BACK)
    target[5] = wrong
    loss, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    got, _ = launch_cross_entropy_backward(torch.ones(18), hidden, weight, target, lse, **BACK)
    keep = torch.arange(18) != 5
    assert loss[5].isnan()
    assert got[5].isnan().all()
    assert torch.equal(loss[keep], clean[keep])
    assert torch.equal(got[keep], wanted[keep])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_with_rows_that_are_no_number(dtype: torch.dtype, mean: bool) -> None:
    """A NaN in a row that does not count is not seen; in one that counts, and for a target that is no class, it stays there."""
    hidden, weight, target = matrix(40, 16, dtype, 1), matrix(20, 16, dtype, 2), targets(40, 20, 3, ignored=0.0)
    target[7] = IGNORED
    loss, wanted, _ = launch_cross_entropy_sum(hidden, weight, target, mean=mean, chunk=16, **BACK)
    hidden[7] = math.nan
    again, got, dweight = launch_cross_entropy_sum(hidden, weight, target, mean=mean, chunk=16, need_weight=False, **BACK)
    assert torch.equal(again, loss)
    assert torch.equal(got, wanted)
    assert dweight.shape == (0, 16)
    keep = torch.arange(40) != 30
    for row, label in ((math.nan, int(target[30])), (float(hidden[30, 2]), 20), (float(hidden[30, 2]), -(2**40))):
        hidden[30, 2], target[30] = row, label
        again, got, _ = launch_cross_entropy_sum(hidden, weight, target, mean=mean, chunk=16, **BACK)
        assert again.isnan()
        assert got[30].isnan().all()
        assert torch.equal(got[keep], wanted[keep])
        hidden[30] = matrix(40, 16, dtype, 1)[30]


def test_a_mean_over_no_row() -> None:
    hidden, weight = torch.full((20, 16), math.nan), matrix(9, 16, torch.float32, 2)
    target = torch.full((20,), IGNORED)
    loss, dhidden, _ = launch_cross_entropy_sum(hidden, weight, target, mean=True, **BACK)
    assert loss.isnan()
    assert (dhidden == 0).all()
    loss, dhidden, dweight = launch_cross_entropy_sum(hidden[:0], weight, target[:0], mean=True, **BACK)
    assert loss.isnan()
    assert dhidden.shape == (0, 16)
    assert (dweight == 0).all()


@pytest.mark.parametrize(("vocab", "rows"), [(2, 1 << 16), (17, 1 << 15), (64, 1 << 14), (65, (1 << 20) // 80)])
def test_parts_are_measured_by_the_rows_that_are_kept(vocab: int, rows: int) -> None:
    """Rows of logits are filled up to a multiple of 16, which few classes would make eight times as many."""
    hidden, weight = torch.empty(1 << 17, 4, device="cpu"), torch.empty(vocab, 4)
    gradients = triton_loss._Gradients(hidden, weight, False, False, None, None)
    assert gradients.logits.shape == (rows, vocab)


def test_a_tile_must_hold_every_class() -> None:
    how = BACK | {"config": Config(16, 16, 4, 1)}
    with pytest.raises(ValueError, match=r"config\.block_n must be at least the number of classes 17, got 16"):
        launch_cross_entropy_sum(torch.ones(4, 8), torch.ones(17, 8), torch.zeros(4, dtype=torch.int64), mean=True, **how)


@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, 1 / 3, math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (128, 32), (17, 1000)])
def test_scaled(size: tuple[int, int], dtype: torch.dtype, factor: float) -> None:
    """One rounding of the product in float32; what is 0 stays 0; a factor of 1 leaves the bits."""
    x = matrix(*size, dtype, 1)
    x[x.abs() < 0.1] = 0.0
    wanted = (x.float() * factor).masked_fill(x == 0, 0.0)
    for out in (dtype, torch.float32):
        with testing.GuardBands() as guards:
            got = launch_cross_entropy_scaled(x, torch.tensor(factor), out)
        assert guards.check() == 1
        torch.testing.assert_close(got, wanted.to(out), rtol=0, atol=0, equal_nan=True)
    again = x.clone()
    launch_cross_entropy_scale_(again, torch.tensor(factor))
    torch.testing.assert_close(again, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)
    launch_cross_entropy_scale_(x[:0], torch.tensor(factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_one_stores_nothing(dtype: torch.dtype) -> None:
    """A store would make 0 of -0."""
    x = torch.full((3, 3), -0.0, dtype=dtype)
    launch_cross_entropy_scale_(x, torch.tensor(1.0))
    assert x.signbit().all()
    launch_cross_entropy_scale_(x, torch.tensor(2.0))
    assert not x.signbit().any()


def test_a_factor_that_float16_does_not_hold() -> None:
    x = torch.full((3, 3), 2.0**-12, dtype=torch.float16)
    launch_cross_entropy_scale_(x, torch.tensor(2.0**20))
    assert (x == 256).all()


def test_only_what_is_needed() -> None:
    hidden, weight, target = matrix(20, 16, torch.float32, 1), matrix(9, 16, torch.float32, 2), targets(20, 9, 3)
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    _, lse = launch_cross_entropy_forward(hidden, weight, target, **how)
    both = launch_cross_entropy_backward(torch.ones(20), hidden, weight, target, lse, **BACK)
    for need_hidden, need_weight in ((True, False), (False, True), (False, False)):
        some = launch_cross_entropy_backward(
            torch.ones(20), hidden, weight, target, lse, need_hidden=need_hidden, need_weight=need_weight, **BACK
        )
        for needed, got, want in zip((need_hidden, need_weight), some, both, strict=True):
            assert torch.equal(got, want if needed else want[:0])


def test_offsets_beyond_32_bits() -> None:
    """Rows 2³¹ elements apart and more, in memory never touched: a 32-bit product would read (or write) elsewhere."""
    step = 2**31 // 8 + 8
    small, weight, target = matrix(17, 16, torch.float16, 1), matrix(17, 16, torch.float16, 2), targets(17, 17, 3)
    how = {"ignore_index": IGNORED, "z_loss": 0.0, "config": SMALL}
    storage = torch.empty(17 * step + 16, dtype=torch.float16)
    far = storage.as_strided((17, 16), (step, 1))
    loss, lse = launch_cross_entropy_forward(small, weight, target, **how)
    wanted = launch_cross_entropy_backward(torch.ones(17), small, weight, target, lse, **BACK)
    for x, y in ((far, weight), (small, far)):
        far.copy_(small if x is far else weight)
        assert torch.equal(launch_cross_entropy_forward(x, y, target, **how)[0], loss)
        got = launch_cross_entropy_backward(torch.ones(17), x, y, target, lse, **BACK)
        for mine, true in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, true)
    # And columns: 17 of them 2³¹ elements apart.
    sideways = storage.as_strided((16, 17), (1, step)).copy_(small.t())
    target = target[:16].clamp(max=15)
    got = launch_cross_entropy_forward(sideways, sideways, target, **how)
    wanted = launch_cross_entropy_forward(small.t(), small.t(), target, **how)
    assert all(torch.equal(mine, true) for mine, true in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width", [64, 100])
def test_from_the_public_function_to_the_kernels(
    width: int, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would run, with the shipped configurations: checks, operators, derivatives, launchers, kernels."""
    monkeypatch.setattr(backends, "choose", lambda backend, table, op: "triton")
    hidden = matrix(150, width, dtype, 1, "offset").view(3, 50, width)
    weight, target = matrix(70, width, dtype, 2) / 8, targets(150, 70, 3).view(3, 50)
    grad = torch.randn(target.shape if reduction == "none" else (), generator=torch.Generator().manual_seed(4))
    runs = []
    for call, wide in (
        (linear_cross_entropy, False),
        (linear_cross_entropy_reference, True),
        (linear_cross_entropy_reference, False),
    ):
        leaves = [x.to(torch.float64 if wide else dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = call(*leaves, target, reduction=reduction, z_loss=1e-3)
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))])
    for mine, true, low in zip(*runs, strict=True):
        testing.error_ratio(mine, true, low, factor=3, floor=4.0)
