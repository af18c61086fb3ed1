"""The registered operators of the loss: schemas, fakes, derivatives, compilation, checkpointing, autocast, costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from igpt_kernels import linear_cross_entropy, testing
from igpt_kernels._ops import loss as loss_ops
from igpt_kernels.reference import linear_cross_entropy_reference
from tests import kit, operators

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
NEEDS = [(True, True), (True, False), (False, True)]


def leaves(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", width: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = testing.make_input((1, 1, rows, width), dtype=dtype, seed=1, memory=layout)[0, 0].requires_grad_()
    weight = testing.make_input((1, 1, vocab, width), dtype=dtype, seed=2, memory=layout)[0, 0].requires_grad_()
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(3))
    if rows > 3:
        target[3] = -100
    return hidden, weight, target


CASES = [((9, 7), layout, torch.float32) for layout in testing.MEMORY_FORMATS]
CASES += [((9, 7), "contiguous", dtype) for dtype in DTYPES[1:]] + [((1, 2), "contiguous", torch.float32)]
CASES += [((0, 3), "contiguous", torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "shape", "layout", "dtype"),
    [(name, *case) for name in ("torch", "ext") for case in CASES if name == "torch" or case[2] != torch.float64],
    ids=str,
)
def test_opcheck(backend: str, shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    hidden, weight, target = leaves(*shape, dtype, layout)
    # opcheck takes no NaN, which the mean of no rows is. It sees that gradients with a factor (1/M in float16) are consumed.
    means = (False, True) if shape[0] and dtype != torch.float16 else (False,)
    torch.library.opcheck(loss_ops.cross_entropy_rows, (hidden, weight, target, -100, 0.1, backend))
    for mean in means:
        torch.library.opcheck(loss_ops.cross_entropy_sum, (hidden, weight, target, -100, 0.1, mean, True, True, backend))
    hidden, weight = hidden.detach(), weight.detach()
    loss, lse = loss_ops.cross_entropy_rows(hidden, weight, target, -100, 0.1, backend)
    for needed in NEEDS:
        torch.library.opcheck(
            loss_ops.cross_entropy_rows_backward, (loss, hidden, weight, target, lse, -100, 0.1, *needed, backend)
        )
        arguments = (hidden, weight, target, -100, 0.1, means[-1], *needed, backend)
        total, dhidden, dweight = loss_ops.cross_entropy_sum(*arguments)
        torch.library.opcheck(loss_ops.cross_entropy_sum, arguments)
        for gradient in (dhidden, dweight):
            torch.library.opcheck(loss_ops.cross_entropy_scaled, (gradient, total, dtype, backend))
            torch.library.opcheck(loss_ops.cross_entropy_scale_, (gradient, total, backend))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck(z_loss: float) -> None:
    hidden, weight, target = leaves(6, 4, torch.float64, width=3)
    assert torch.autograd.gradcheck(
        lambda h, w: loss_ops.cross_entropy_rows(h, w, target, -100, z_loss, "torch")[0], (hidden, weight)
    )
    for mean in (False, True):
        assert torch.autograd.gradcheck(
            lambda h, w, mean=mean: loss_ops.cross_entropy_sum(h, w, target, -100, z_loss, mean, True, True, "torch")[0],
            (hidden, weight),
        )


def test_both_ways_agree() -> None:
    hidden, weight, target = leaves(50, 9, torch.float64)
    rows = loss_ops.cross_entropy_rows(hidden, weight, target, -100, 0.1, "torch")[0].sum()
    total = loss_ops.cross_entropy_sum(hidden, weight, target, -100, 0.1, False, True, True, "torch")[0]
    assert torch.equal(rows, total)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (rows, total)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needed", NEEDS)
def test_only_what_is_needed_is_computed(needed: tuple[bool, bool], reduction: str) -> None:
    hidden, weight, target = leaves(50, 9)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, reduction=reduction).sum(), (hidden, weight))
    some = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needed, strict=True)]
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*some, target, reduction=reduction).sum().backward()
    assert counter.get_total_flops() == (1 + sum(needed)) * 2 * 50 * 9 * 16
    for x, want, need in zip(some, wanted, needed, strict=True):
        assert x.grad is None if not need else torch.equal(x.grad, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients_nothing_but_the_loss_is_computed(reduction: str) -> None:
    hidden, weight, target = leaves(50, 9)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, target, reduction=reduction), loss)
    assert counter.get_total_flops() == 2 * 50 * 9 * 16


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_is_a_clear_error_and_saved_tensors_serve_twice(reduction: str) -> None:
    hidden, weight, target = leaves(20, 7)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).square().sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [x.clone() for x in first]
    again = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    eager, exact = (
        kit.run(
            lambda h, w: 3 * linear_cross_entropy_reference(h, w, target, reduction=reduction).square().sum(),
            [x.to(dtype) for x in (hidden, weight)],
            [torch.ones(())],
        ).gradients
        for dtype in (torch.float32, torch.float64)
    )
    for b, true, low in zip(again, exact, eager, strict=True):
        testing.error_ratio(b, true, low, factor=testing.GRADIENT_FACTOR, floor=3 * float(loss.detach()))
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        dhidden.sum().backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_over_gradients_raises_whatever_came_from_above(dtype: torch.dtype, reduction: str) -> None:
    """With a plain 1 from above nothing but the inputs ties the gradients to what they depend on."""
    for place in (0, 1):
        hidden, weight, target = leaves(20, 7, dtype)
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, (hidden, weight)[place], create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"linear_cross_entropy has no second derivative.*backend='reference'"):
            (loss + gradient.float().pow(2).sum()).backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_gradients(reduction: str) -> None:
    hidden, weight, target = leaves(20, 7)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    grads = torch.randn(3, *loss.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(loss, (hidden, weight), grads, is_grads_batched=True, retain_graph=True)
    for number in range(3):
        one = torch.autograd.grad(loss, (hidden, weight), grads[number], retain_graph=True)
        for batch, want in zip(got, one, strict=True):
            torch.testing.assert_close(batch[number], want)


def test_gradients_of_the_sum_are_scaled_in_place_and_made_again() -> None:
    hidden, weight, target = leaves(20, 7)
    total, made, _ = loss_ops.cross_entropy_sum(hidden, weight, target, -100, 0.0, False, True, True, "torch")
    before = made.clone()
    (first,) = torch.autograd.grad(2 * total, hidden, retain_graph=True)
    assert first.data_ptr() == made.data_ptr()
    torch.testing.assert_close(first, 2 * before)
    (second,) = torch.autograd.grad(total, hidden)
    assert second.data_ptr() != made.data_ptr()
    assert torch.equal(second, before)
    assert torch.equal(first, made)


def test_what_stands_beside_the_loss_is_not_differentiable() -> None:
    hidden, weight, target = leaves(20, 7)
    assert not loss_ops.cross_entropy_rows(hidden, weight, target, -100, 0.0, "torch")[1].requires_grad
    assert not any(
        x.requires_grad for x in loss_ops.cross_entropy_sum(hidden, weight, target, -100, 0.0, False, True, True, "torch")[1:]
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_without_breaks_and_once_for_all_lengths(reduction: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction)

    operators.check_compiled(loss, [leaves(rows, 7) for rows in (33, 50)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_that_nobody_read_makes_its_row_nan(reduction: str) -> None:
    """While torch.compile traces no value is read, as on a GPU; nothing beyond the tensors is, either."""
    hidden, weight, target = leaves(20, 7)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    clean = compiled(hidden, weight, target)
    wanted = torch.autograd.grad(clean.sum(), hidden)[0]
    keep = torch.arange(20) != 11
    for wrong in (-1, 7, 2**62):
        target[11] = wrong
        out = compiled(hidden, weight, target)
        (got,) = torch.autograd.grad(out.sum(), hidden)
        assert out.isnan().sum() == 1
        if reduction == "none":
            assert torch.equal(out[keep], clean[keep])
        assert got[11].isnan().all()
        assert torch.equal(got[keep], wanted[keep])
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool, reduction: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, reduction=reduction)

    operators.check_checkpointing(loss, leaves(17, 9), reentrant=reentrant)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_takes_its_dtype(reduction: str) -> None:
    hidden, weight, target = leaves(40, 9)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    wanted = linear_cross_entropy(*half, target, reduction=reduction)
    wanted.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight.double().float(), target, reduction=reduction)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, wanted)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    for got, x in zip(grads, half, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, x.grad.float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_inside_autocast_keeps_its_dtype(reduction: str) -> None:
    hidden, weight, target = leaves(40, 9)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, reduction=reduction).sum(), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_training_step_goes_down_as_with_torch() -> None:
    hidden, _, target = leaves(200, 9)
    curves = []
    for loss in (
        lambda h, w: linear_cross_entropy(h, w, target),
        lambda h, w: F.cross_entropy(h @ w.t(), target),
    ):
        weight = torch.zeros(9, 16, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.5)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            value = loss(hidden.detach(), weight)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < 0.9 * curves[0][0]
