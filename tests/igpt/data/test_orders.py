"""The order of the images in a run, and which are held out."""

from __future__ import annotations

import numpy as np
import pytest

from igpt.data.orders import _permutation, order, split_indices
from igpt.errors import ConfigError

PINNED_ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1, 9, 1]


PINNED_SPLIT = [0, 8, 9]


class TestOrder:
    @pytest.mark.parametrize("n", [1, 2, 7, 100])
    def test_every_epoch_is_a_permutation(self, n: int) -> None:
        draws = order(n, 3, 0, 4 * n).reshape(4, n)
        assert draws.dtype == np.int64
        assert (np.sort(draws, axis=1) == np.arange(n)).all()
        if n == 100:
            assert len({row.tobytes() for row in draws}) == 4

    def test_does_not_depend_on_the_cuts(self) -> None:
        whole = order(13, 5, 0, 100)
        cuts = np.random.default_rng(0).integers(0, 101, (200, 2))
        for first, last in np.sort(cuts, axis=1):
            np.testing.assert_array_equal(order(13, 5, first, last - first), whole[first:last])

    def test_seed_and_size_matter(self) -> None:
        assert (order(50, 0, 0, 50) != order(50, 1, 0, 50)).any()
        assert (order(50, 0, 0, 50) != order(51, 0, 0, 50)).any()

    def test_values_are_pinned(self) -> None:
        # Resuming an old run relies on these; a change here is a change of every run.
        assert order(10, 0, 0, 12).tolist() == PINNED_ORDER
        assert split_indices(10, "val", 0.3, 0).tolist() == PINNED_SPLIT

    def test_an_epoch_is_computed_once(self) -> None:
        _permutation.cache_clear()
        for step in range(20):
            order(100_003, 0, step * 128, 128)
            order(50_000, 0, step * 128, 128)
        assert _permutation.cache_info().misses == 2

    def test_answer_is_ours_to_change(self) -> None:
        first = order(10, 0, 0, 10)
        first[:] = 0
        assert order(10, 0, 0, 10).tolist() != [0] * 10

    @pytest.mark.parametrize("arguments", [(0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)])
    def test_refuses(self, arguments: tuple[int, int, int, int]) -> None:
        with pytest.raises(ConfigError, match=r"(n|seed|first|count) must be an integer"):
            order(*arguments)


class TestSplit:
    @pytest.mark.parametrize(("n", "fraction", "held"), [(1797, 0.1, 180), (10, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2)])
    def test_parts_are_disjoint_and_whole(self, n: int, fraction: float, held: int) -> None:
        train, val = (split_indices(n, part, fraction, 7) for part in ("train", "val"))
        assert len(val) == held
        assert sorted([*train, *val]) == list(range(n))
        assert (np.diff(train) > 0).all()
        np.testing.assert_array_equal(val, split_indices(n, "val", fraction, 7))
        np.testing.assert_array_equal(split_indices(n, "all", fraction, 7), np.arange(n))

    def test_seed_matters(self) -> None:
        assert split_indices(1000, "val", 0.1, 0).tolist() != split_indices(1000, "val", 0.1, 1).tolist()

    def test_one_image_is_for_training(self) -> None:
        assert split_indices(1, "train", 0.5, 0).tolist() == [0]
        with pytest.raises(ConfigError, match="empty"):
            split_indices(1, "val", 0.5, 0)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((5, "test", 0.1, 0), "split"),
            ((5, "val", 1.0, 0), "val_fraction"),
            ((5, "val", -0.1, 0), "val_fraction"),
            ((5, "val", 0.0, 0), "empty"),
            ((5, "val", 0.1, -1), "seed"),
        ],
    )
    def test_refuses(self, arguments: tuple[int, str, float, int], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            split_indices(*arguments)
