"""Palettes learned by k-means."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from sklearn.cluster import KMeans

from igpt.data.open import open_source
from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette
from tests.pictures import nearest


class TestFit:
    def test_few_colours_come_back_exactly(self) -> None:
        pixels = open_source("digits", split="all").images(np.arange(1797))
        palette = Palette.fit(pixels, 17, progress=False)
        np.testing.assert_array_equal(palette.colors, np.repeat(np.rint(np.arange(17) * 255 / 16)[:, None], 3, axis=1))
        assert palette.error(pixels) == (0.0, math.inf)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "sklearn.cluster", None)  # nothing to learn, nothing needed
            assert Palette.fit(pixels, 17).size == 17
        with pytest.raises(ConfigError, match="only 17 different colours; ask for at most 17"):
            Palette.fit(pixels, 512)

    def test_finds_the_clusters(self) -> None:
        generator = np.random.default_rng(0)
        centers = np.array([[20, 30, 40], [200, 40, 40], [60, 220, 90], [240, 240, 30], [30, 30, 230]])
        sizes = [5000, 50, 700, 300, 1000]
        pixels = np.concatenate([c + generator.integers(-6, 7, (n, 3)) for c, n in zip(centers, sizes, strict=True)]).astype(
            np.uint8
        )
        palette = Palette.fit(generator.permutation(pixels)[:, None], 5, progress=False)
        near = nearest(pixels, centers.astype(float))
        wanted = np.stack([pixels[near == i].mean(axis=0) for i in range(5)])
        light = wanted @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(palette.colors, wanted[np.argsort(light)], atol=1e-4)

    def test_sorted_from_dark_to_bright(self, photo: np.ndarray) -> None:
        palette = Palette.fit(photo, 40, progress=False)
        assert (np.diff(palette.colors @ [299, 587, 114]) >= 0).all()
        mirrored = Palette.fit(np.array([[0, 0, 0], [114, 0, 0], [0, 0, 255], [100, 50, 25], [100, 50, 25]], np.uint8), 4)
        assert mirrored.colors.tolist() == [[0, 0, 0], [0, 0, 255], [114, 0, 0], [100, 50, 25]]

    def test_is_a_function_of_its_arguments(self, photo: np.ndarray) -> None:
        one = Palette.fit(photo, 64, seed=1, progress=False)
        np.testing.assert_array_equal(one.colors, Palette.fit(photo, 64, seed=1, progress=False).colors)
        assert (one.colors != Palette.fit(photo, 64, seed=2, progress=False).colors).any()
        few = Palette.fit(photo, 64, seed=1, max_pixels=3000, progress=False)
        np.testing.assert_array_equal(few.colors, Palette.fit(photo, 64, seed=1, max_pixels=3000, progress=False).colors)
        assert (one.colors != few.colors).any()

    @pytest.mark.parametrize("repeats", [1, 50])
    def test_is_near_a_minimum(self, photo: np.ndarray, repeats: int) -> None:
        # Repeated, some colours weigh much more than others: the minimum is another one.
        pixels = np.concatenate([photo.reshape(-1, 3), *[photo[:30, :40].reshape(-1, 3)] * (repeats - 1)])
        palette = Palette.fit(pixels, 64, progress=False)
        token = nearest(pixels, palette.colors)
        means = np.stack([pixels[token == v].mean(axis=0) for v in range(64)])  # every colour is used
        before = ((pixels - palette.colors[token]) ** 2).sum(1).mean()
        after = ((pixels - means[token]) ** 2).sum(1).mean()
        assert after <= before < after * 1.005
        grid = Palette.uniform(64)
        assert palette.error(photo).psnr > grid.error(photo).psnr + 6

    @pytest.mark.parametrize("k", [8, 64, 200])
    def test_is_as_good_as_scikit_learn(self, photo: np.ndarray, k: int) -> None:
        pixels = photo.reshape(-1, 3)
        theirs = KMeans(k, n_init=1, random_state=0).fit(pixels.astype(np.float64))
        palette = Palette.fit(photo, k, progress=False)
        ours = ((pixels - palette.colors[nearest(pixels, palette.colors)]) ** 2).sum()
        assert ours < 1.03 * theirs.inertia_

    def test_a_start_is_found_on_pixels_as_often_as_they_occur(self) -> None:
        # One colour has nearly all pixels: a part of the pixels holds too few others, and all are taken.
        pixels = np.concatenate(
            [np.zeros((900_000, 3), np.uint8), np.indices((20, 20, 20)).reshape(3, -1).T.astype(np.uint8) * 12]
        )
        palette = Palette.fit(pixels, 300, progress=False)
        assert palette.colors[0].max() < 0.01
        assert len(np.unique(palette.encode(pixels[None]).numpy())) == 300

    def test_many_colours_are_sampled(self, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        full = Palette.fit(photo, 32, progress=False)
        monkeypatch.setattr("igpt.palette.kmeans._MAX_POINTS", 4000)
        part = Palette.fit(photo, 32, progress=False)
        assert (part.colors != full.colors).any()
        assert part.error(photo).psnr > full.error(photo).psnr - 0.5

    @pytest.mark.parametrize(
        ("images", "options", "error"),
        [
            (np.zeros((4, 3)), {}, DataError),
            (np.zeros((4, 4), np.uint8), {}, DataError),
            (np.zeros((0, 3), np.uint8), {}, DataError),
            (np.zeros((4, 3), np.uint8), {"k": 1}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"k": 65537}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"max_pixels": 0}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"seed": -1}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"k": "4"}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"max_pixels": "9"}, ConfigError),
        ],
    )
    def test_refuses(self, images: np.ndarray, options: dict[str, int], error: type[Exception]) -> None:
        with pytest.raises(error):
            Palette.fit(images, **options)
