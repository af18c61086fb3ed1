"""scikit-learn's digits."""

from __future__ import annotations

import numpy as np
import pytest

from igpt.data.open import open_source
from igpt.data.orders import split_indices
from igpt.errors import DataError


class TestDigits:
    def test_is_the_real_thing(self) -> None:
        from sklearn.datasets import load_digits

        source = open_source("digits", split="all")
        batch = source.read(np.arange(len(source)))
        assert batch.images.shape == (1797, 8, 8, 3)
        assert batch.images.dtype == np.uint8
        assert (source.height, source.width, source.kind, source.skipped) == (8, 8, "images", 0)
        digits = load_digits()
        np.testing.assert_array_equal(batch.images[..., 0], np.rint(digits.images * 255 / 16))
        assert (batch.images == batch.images[..., :1]).all()
        np.testing.assert_array_equal(batch.labels, digits.target)
        assert source.classes == tuple("0123456789")
        assert len(np.unique(batch.images)) == 17

    def test_labels_follow_the_split(self) -> None:
        whole = open_source("digits", split="all")
        part = open_source("digits", split="val", seed=5)
        chosen = split_indices(1797, "val", 0.1, 5)
        assert len(part) == 180
        np.testing.assert_array_equal(part.labels, whole.labels[chosen])
        np.testing.assert_array_equal(part.images(np.arange(180)), whole.images(chosen))
        batch = part.read([3, 3, 0])
        np.testing.assert_array_equal(batch.labels, part.labels[[3, 3, 0]])
        np.testing.assert_array_equal(batch.indices, [3, 3, 0])

    def test_other_size(self) -> None:
        whole = open_source("digits", height=4, width=4, split="all")
        own = open_source("digits", split="all").images([0, 1]).astype(float)
        means = own.reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
        assert np.abs(whole.images([0, 1]) - means).max() <= 1.0  # Pillow rounds after the rows and again after the columns
        assert open_source("digits", height=16, width=12).images([0]).shape == (1, 16, 12, 3)

    @pytest.mark.parametrize("indices", [[-1], [1797], [0.5], [[0]], "a"])
    def test_wrong_indices(self, indices: object) -> None:
        with pytest.raises(DataError, match="indices"):
            open_source("digits", split="all").images(indices)

    def test_no_indices(self) -> None:
        assert open_source("digits").images([]).shape == (0, 8, 8, 3)
