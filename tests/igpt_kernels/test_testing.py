"""The tools that test kernels find what they are for."""

from __future__ import annotations

import math

import pytest
import torch

from igpt_kernels import testing


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


def test_poisoned_memory_is_not_a_number() -> None:
    with testing.poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.ones(5, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_guards_notice_a_write_outside() -> None:
    with testing.GuardBands() as guards:
        inside = torch.empty(2, 3, dtype=torch.float32)
    inside.fill_(1.0)
    assert guards.check() == 1
    inside.as_strided((1,), (1,), inside.storage_offset() + 6).fill_(0.0)
    with pytest.raises(AssertionError, match="1 values behind"):
        guards.check()
    assert torch.empty(3).shape == (3,)


@pytest.mark.parametrize("place", ["exact", "eager"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_oracle_that_is_not_finite_is_no_budget(place: str, value: float) -> None:
    """Otherwise the budget were NaN or infinite, and nothing would exceed it."""
    tensors = {"actual": torch.ones(3), "exact": torch.ones(3), "eager": torch.ones(3)}
    tensors[place] = torch.tensor([1.0, value, 1.0])
    with pytest.raises(AssertionError, match=r"of 3 values not finite, first at \(1,\)"):
        testing.error_ratio(**tensors, factor=2)
