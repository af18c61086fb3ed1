"""The configurations that are tried on a GPU."""

from __future__ import annotations

import pytest

from igpt_kernels import tuning
from igpt_kernels.tuning import Config
from tools.kernels import KERNELS
from tools.variants import ATTENTION, Variant, parse, variants

SHIPPED = Config(16, 16, 1, 1)


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "lookup", lambda kernel, **_: SHIPPED)


@pytest.mark.parametrize("kernel", ATTENTION)
def test_texts_are_configurations(kernel: str) -> None:
    assert kernel in KERNELS
    for text in ATTENTION[kernel].values():
        for one in text.split():
            assert str(parse(one)) == one


def test_what_ships_comes_first_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [*variants()]
    assert len(found) == len(set(found))
    first = {(one.kernel, one.head_dim): one.config for one in reversed(found)}
    assert set(first) == {(kernel, size) for kernel, sizes in ATTENTION.items() for size in sizes}
    assert set(first.values()) == {SHIPPED}
    tried = parse(ATTENTION["flash_forward"][64].split()[-1])
    monkeypatch.setattr(tuning, "lookup", lambda kernel, **_: tried)
    assert [*variants()].count(Variant("flash_forward", 64, tried)) == 1


def test_kernels_are_chosen_by_the_beginning_of_their_names() -> None:
    assert {one.kernel for one in variants(["sparse_backward"])} == {"sparse_backward_keys", "sparse_backward_queries"}
