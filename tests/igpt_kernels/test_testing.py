"""The tools that test kernels find what they are for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import igpt_kernels
from igpt_kernels import reference, testing
from tests import kit


def test_budget_is_that_of_eager_plus_one_rounding() -> None:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eager = exact.float() + 1e-3
    assert testing.error_ratio(exact.float(), exact, eager, factor=2) == 0
    assert testing.error_ratio(exact.float() + 1.9e-3, exact, eager, factor=2) == pytest.approx(0.95, rel=1e-2)
    with pytest.raises(AssertionError, match=r"dq is .* at \(1,\).*1 of 2 values"):
        testing.error_ratio(exact.float() + torch.tensor([0, 2.1e-3]), exact, eager, factor=2, name="dq")
    testing.error_ratio(exact.float() + 2e-7, exact, exact.float(), factor=2)
    with pytest.raises(AssertionError):
        testing.error_ratio(exact.float() + 1e-6, exact, exact.float(), factor=2)
    testing.error_ratio(exact.float() + 1e-6, exact, exact.float(), factor=2, floor=20.0)
    assert testing.error_ratio(exact.float() + torch.tensor([0, 1.9e-3]), exact, eager, factor=2) == pytest.approx(
        0.95, rel=1e-2
    )
    with pytest.raises(AssertionError, match="1 of 1 values"):
        testing.error_ratio(exact.float()[:1] + 1e-6, exact[:1], exact.float()[:1], factor=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_fails_first(value: float) -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"1 of 3 values not finite, first at \(2,\)"):
        testing.error_ratio(torch.tensor([0, 0, value]), exact, exact + 1e9, factor=2)
    with pytest.raises(AssertionError, match="shape"):
        testing.error_ratio(torch.zeros(2), exact, exact, factor=2)


def test_inputs_are_the_same_values_in_other_memory() -> None:
    values = [testing.make_input((2, 3, 5, 4), dtype=torch.float32, seed=7, memory=layout) for layout in testing.MEMORY_FORMATS]
    assert all(torch.equal(values[0], value) for value in values)
    assert len({(value.stride(), value.storage_offset()) for value in values}) == len(values)
    for value in values[2:]:
        storage = torch.empty(0).set_(value.untyped_storage())  # type: ignore[call-overload]
        assert storage.isnan().sum() == storage.numel() - value.numel()
    with pytest.raises(ValueError, match="sideways"):
        testing.make_input((1, 1, 1, 1), dtype=torch.float32, seed=0, memory="sideways")


@pytest.mark.parametrize("before", [(False, False, True), (True, True, False)], ids=str)
def test_poisoned_memory_is_not_a_number(before: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the settings of torch are afterwards what they were."""
    enabled, warn_only, fill = before
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    try:
        with testing.poisoned_memory():
            assert torch.empty(1000).isnan().all()
            assert torch.empty_like(torch.ones(5, dtype=torch.bfloat16)).isnan().all()
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert torch.utils.deterministic.fill_uninitialized_memory == fill  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)


def test_guards_notice_a_write_outside() -> None:
    with testing.GuardBands() as guards:
        inside = torch.empty(2, 3, dtype=torch.float32)
    inside.fill_(1.0)
    assert guards.check() == 1
    inside.as_strided((1,), (1,), inside.storage_offset() + 6).fill_(0.0)
    with pytest.raises(AssertionError, match="1 values behind"):
        guards.check()
    inside.as_strided((1,), (1,), inside.storage_offset() + 6).fill_(guards.SENTINEL)
    assert guards.check() == 1
    inside.as_strided((2,), (1,), inside.storage_offset() - 2).fill_(0.0)
    with pytest.raises(AssertionError, match="2 values before"):
        guards.check()
    assert torch.empty(3).shape == (3,)
    with testing.GuardBands() as guards:
        heads = torch.empty_strided((2, 3, 4), (12, 1, 3), dtype=torch.float32)
    assert (heads.shape, heads.stride(), guards.check()) == ((2, 3, 4), (12, 1, 3), 1)
    assert heads.isnan().all()
    heads.as_strided((1,), (1,), heads.storage_offset() + 24).fill_(0.0)
    with pytest.raises(AssertionError, match="1 values behind"):
        guards.check()
    assert not torch.empty_strided((1,), (1,)).untyped_storage().nbytes() > 4


@pytest.mark.parametrize("place", ["exact", "eager"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_oracle_that_is_not_finite_is_no_budget(place: str, value: float) -> None:
    """Otherwise the budget were NaN or infinite, and nothing would exceed it."""
    tensors = {"actual": torch.ones(3), "exact": torch.ones(3), "eager": torch.ones(3)}
    tensors[place] = torch.tensor([1.0, value, 1.0])
    with pytest.raises(AssertionError, match=r"of 3 values not finite, first at \(1,\)"):
        testing.error_ratio(**tensors, factor=2)


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows times a weight, and the sum of each row but the first, which has none."""
    return x * weight, x.detach().sum(-1).index_fill(0, torch.tensor([0]), -math.inf)


def steeper(x: Tensor) -> Tensor:
    """The same values with gradients that are larger by a hundred thousandth."""
    return x + 1e-5 * (x - x.detach())


WRONG: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], str]] = {
    "a value": (lambda x, w: (product(x, w)[0] * (1 + 1e-5), product(x, w)[1]), "output 0 is"),
    "a value of what has no gradient": (lambda x, w: (product(x, w)[0], product(x, w)[1] * (1 + 1e-5)), "output 1 is"),
    "a number for no key": (lambda x, w: (product(x, w)[0], x.detach().sum(-1)), "output 1"),
    "no key for a number": (lambda x, w: (product(x, w)[0], torch.full((len(x),), -math.inf)), "output 1"),
    "a dtype": (lambda x, w: (product(x, w)[0].double(), product(x, w)[1]), "output 0"),
    "the first gradient": (lambda x, w: product(steeper(x), w), "gradient 0 is"),
    "the last gradient": (lambda x, w: product(x, steeper(w)), "gradient 1 is"),
    "memory that was not written": (lambda x, w: (product(x, w)[0] + 0 * torch.empty(x.shape), product(x, w)[1]), "not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_comparison_notices_what_is_wrong(what: str) -> None:
    wrong, words = WRONG[what]
    inputs, grads = [kit.matrix(5, 8, torch.float32, 0), kit.vector(8, torch.float32, 1)], [kit.matrix(5, 8, torch.float32, 2)]
    kit.compare(product, product, inputs, grads)
    with pytest.raises(AssertionError, match=words):
        kit.compare(wrong, product, inputs, grads)


def test_a_comparison_with_guards_wants_new_tensors_and_no_write_outside() -> None:
    inputs, grads = [kit.matrix(5, 8, torch.float32, 0), kit.vector(8, torch.float32, 1)], [kit.matrix(5, 8, torch.float32, 2)]

    def ours(x: Tensor, weight: Tensor, beyond: int = 0) -> Tensor:
        new = torch.empty(8, dtype=torch.float32)
        new.as_strided((8 + beyond,), (1,)).fill_(1.0)
        return x * weight * new

    def oracle(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    kit.compare(ours, oracle, inputs, grads, guarded=1)
    with pytest.raises(AssertionError):
        kit.compare(ours, oracle, inputs, grads, guarded=2)
    with pytest.raises(AssertionError, match="1 values behind a tensor"):
        kit.compare(lambda x, weight: ours(x, weight, beyond=1), oracle, inputs, grads, guarded=1)


def test_a_row_that_sees_no_key_is_exactly_zero() -> None:
    tensors = kit.qkv((1, 1, 4, 8), torch.float32)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril(-1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention_reference(q, k, v, causal=False, scale=0.5, mask=mask)

    def nearly(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ours(q, k, v)
        return out.masked_fill((lse == -math.inf)[..., None], 1e-9), lse

    kit.compare_attention(ours, tensors, scale=0.5, mask=mask)
    with pytest.raises(AssertionError):
        kit.compare_attention(nearly, tensors, scale=0.5, mask=mask)
    with pytest.raises(AssertionError, match=r"is .* over the budget"):
        kit.compare_attention(ours, tensors, scale=0.5001, mask=mask)


def exact(out: Tensor) -> Tensor:
    return out


def larger(out: Tensor) -> Tensor:
    """Values that are larger by a thousandth, with the same gradients."""
    return out + 1e-3 * out.detach()


def steeper_by_a_thousandth(out: Tensor) -> Tensor:
    return out + 1e-3 * (out - out.detach())


def comparisons(change: Callable[[Tensor], Tensor]) -> Iterator[Callable[[], object]]:
    """Each comparison of the kit, of an oracle with `change` on its output."""
    x, weight, target = kit.matrix(6, 8, torch.float32, 0), kit.matrix(5, 8, torch.float32, 1), kit.classes(6, 5, 2)
    q, k, v = kit.qkv((2, 2, 6, 8), torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return change(reference.linear_cross_entropy_reference(hidden, weight, target, reduction="none"))

    yield lambda: kit.compare_norm(lambda x, weight, _: change(reference.rms_norm_reference(x, weight)), x, weight[0])  # type: ignore[arg-type]
    yield lambda: kit.compare_gelu(lambda x, bias: change(reference.quick_gelu_reference(x, bias=bias)), x)
    yield lambda: kit.compare_loss(loss, x, weight, target)
    yield lambda: kit.compare_attention(
        lambda q, k, v: change(reference.attention_reference(q, k, v, causal=True, scale=0.3)[0]),
        [q, k, v],
        scale=0.3,
        causal=True,
    )


@pytest.mark.parametrize("number", range(4))
def test_each_comparison_has_a_budget_that_a_thousandth_exceeds(number: int) -> None:
    list(comparisons(exact))[number]()
    with pytest.raises(AssertionError, match=r"output 0 is .* over the budget"):
        list(comparisons(larger))[number]()
    with pytest.raises(AssertionError, match=r"gradient 0 is .* over the budget"):
        list(comparisons(steeper_by_a_thousandth))[number]()


def test_decoding_has_a_budget_that_a_thousandth_exceeds() -> None:
    q, k, v = kit.qkv((2, 2, 6, 8), torch.float32)
    out = igpt_kernels.decode_attention(q[:, :, :1], k, v, 4, backend="torch")
    kit.compare_decode(out, q[:, :, :1], k, v, 4)
    with pytest.raises(AssertionError, match=r"decode is .* over the budget"):
        kit.compare_decode(larger(out), q[:, :, :1], k, v, 4)


def test_terms_that_cancel_are_as_large_as_the_vectors_make_them() -> None:
    """The largest of the scores, times those of the gradient and of the values; a score is taken to be 8 at least."""
    q, k, v, grad = (torch.full((2, 4), size / 2) for size in (3.0, 5.0, 7.0, 2.0))  # rows of 4 equal values: of that norm
    assert testing.cancelling_terms(q, k, v, grad, 1.0) == 15 * 7 * 2
    assert testing.cancelling_terms(q, k, v, grad, 0.1) == 8 * 2


def test_no_logit_is_larger_than_the_largest() -> None:
    hidden, weight = torch.full((3, 4), 1.5, requires_grad=True), torch.full((5, 4), -2.0)
    assert testing.largest_logit(hidden, weight) == 12.0 == float((hidden @ weight.t()).abs().max())
    assert testing.largest_logit(hidden[:0], weight) == testing.largest_logit(hidden[:, :0], weight[:, :0]) == 0.0


def test_an_attention_may_be_twice_as_wrong_as_eager_and_its_gradients_three_times() -> None:
    names = [field.name for field in dataclasses.fields(testing.AttentionResult)]

    def result(**errors: float) -> testing.AttentionResult:
        return testing.AttentionResult(**{name: torch.ones(3, dtype=torch.float64) + errors.get(name, 0.0) for name in names})

    exact, eager = result(), result(**dict.fromkeys(names, 1e-3))
    for name, most in (("out", 2), ("dq", 3), ("dk", 3), ("dv", 3)):
        used = testing.check_attention(result(**{name: most * 0.99e-3}), exact, eager)
        assert used == pytest.approx(0.99, rel=1e-3)
        with pytest.raises(AssertionError, match=f"{name} is"):
            testing.check_attention(result(**{name: most * 1.01e-3}), exact, eager)
