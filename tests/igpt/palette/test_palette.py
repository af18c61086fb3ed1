"""Palettes: colours, encoding, decoding, error."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette
from tests.pictures import nearest


class TestColors:
    def test_are_on_the_grid(self) -> None:
        colors = np.random.default_rng(0).uniform(0, 255, (50, 3))
        palette = Palette(colors)
        assert palette.size == 50
        assert palette.colors.dtype == np.float64
        assert np.abs(palette.colors - colors).max() <= 2**-17
        assert (palette.colors * 65536 == np.rint(palette.colors * 65536)).all()
        with pytest.raises(ValueError, match="read-only"):
            palette.colors[0] = 0

    @pytest.mark.parametrize(
        "colors",
        [
            np.zeros((1, 3)),
            np.zeros((65537, 3)),
            np.zeros((4, 4)),
            np.zeros(6),
            np.zeros((2, 2, 3)),
            [],
            [[0, 0, 0], [math.nan, 0, 0]],
            [[0, 0, 0], [math.inf, 0, 0]],
            [[0, 0, 0], [256, 0, 0]],
            [[0, 0, 0], [-1, 0, 0]],
            [["a", "b", "c"]] * 2,
            [[0, 0, 0], [0, 0]],
            None,
            [[True, False, True]] * 2,
            [[1j, 0, 0]] * 2,
        ],
    )
    def test_refuses(self, colors: object) -> None:
        with pytest.raises(ConfigError, match="colors must"):
            Palette(colors)

    def test_table_is_built_once(self) -> None:
        palette = Palette.uniform(27)
        assert palette.table is palette.table


class TestUniform:
    def test_512(self) -> None:
        palette = Palette.uniform(512)
        assert palette.size == 512
        levels = np.linspace(0, 255, 8)
        for r, g, b in ((0, 0, 0), (7, 7, 7), (1, 2, 3), (5, 0, 6)):
            np.testing.assert_allclose(palette.colors[(r * 8 + g) * 8 + b], [levels[r], levels[g], levels[b]], atol=2**-17)

    @pytest.mark.parametrize(
        ("k", "levels"), [(8, (2, 2, 2)), (12, (2, 3, 2)), (256, (8, 8, 4)), (24, (3, 4, 2)), (65536, (32, 64, 32))]
    )
    def test_most_even(self, k: int, levels: tuple[int, int, int]) -> None:
        palette = Palette.uniform(k)
        assert palette.size == k
        assert tuple(len(np.unique(palette.colors[:, channel])) for channel in range(3)) == levels

    @pytest.mark.parametrize(
        ("k", "near"),
        [
            (7, "8 and 12"),
            (2, "8 and 12"),
            (511, "510 and 512"),
            (-3, "2 to 65536"),
            (65537, "65536"),
            ("8", "k must be an integer"),
        ],
    )
    def test_refuses(self, k: object, near: str) -> None:
        with pytest.raises(ConfigError, match=near):
            Palette.uniform(k)  # type: ignore[arg-type]


class TestEncode:
    @pytest.mark.parametrize("shape", [(5, 7, 3), (2, 4, 4, 3), (2, 3, 4, 5, 3), (0, 4, 4, 3), (1, 1, 3)])
    def test_is_the_nearest_colour(self, shape: tuple[int, ...]) -> None:
        generator = np.random.default_rng(1)
        palette = Palette(generator.uniform(0, 255, (100, 3)))
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        tokens = palette.encode(images)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (*shape[:-3], shape[-3] * shape[-2])
        if images.size:
            np.testing.assert_array_equal(tokens.numpy().reshape(shape[:-1]), nearest(images, palette.colors))
        assert torch.equal(palette.encode(torch.from_numpy(images)), tokens)

    def test_any_memory(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        palette = Palette.uniform(64)
        torch.set_warn_always(True)
        images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
        wanted = palette.encode(images[::-1, ::2, ::-1].copy())
        assert torch.equal(palette.encode(images[::-1, ::2, ::-1]), wanted)
        np.save(tmp_path / "x.npy", images)
        assert torch.equal(palette.encode(np.load(tmp_path / "x.npy", mmap_mode="r")[::-1, ::2, ::-1]), wanted)
        assert torch.equal(palette.encode(np.load(tmp_path / "x.npy", mmap_mode="r")), palette.encode(images))
        planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        assert torch.equal(palette.encode(planes.permute(0, 2, 3, 1)), palette.encode(images))
        torch.set_warn_always(False)
        assert not recwarn

    def test_ties_take_the_lowest(self) -> None:
        palette = Palette([[9, 9, 9], [10, 0, 0], [0, 0, 0], [10, 0, 0], [0, 0, 0]])
        assert palette.encode(np.array([[[5, 0, 0], [0, 0, 0], [11, 0, 0]]], np.uint8)).tolist() == [1, 2, 1]

    @pytest.mark.parametrize(
        "images",
        [
            np.zeros((4, 4, 3)),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4, 3), np.uint8),
            torch.zeros(4, 4, 3),
            torch.zeros(4, 3).byte(),
            "x",
            None,
        ],
    )
    def test_refuses(self, images: object) -> None:
        with pytest.raises(DataError, match="images must be uint8"):
            Palette.uniform(8).encode(images)


class TestDecode:
    def test_round_trip(self) -> None:
        palette = Palette(np.random.default_rng(0).uniform(0, 255, (300, 3)))
        tokens = torch.arange(300).reshape(3, 100)
        images = palette.decode(tokens)
        assert images.shape == (3, 10, 10, 3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images.reshape(300, 3), np.rint(palette.colors))
        np.testing.assert_array_equal(palette.decode(tokens.numpy().astype(np.uint16), 20, 5), images.reshape(3, 20, 5, 3))
        exact = Palette(np.unique(np.rint(palette.colors), axis=0))
        assert torch.equal(
            exact.encode(exact.decode(torch.arange(exact.size)[None], 1, exact.size)), torch.arange(exact.size)[None]
        )

    def test_refuses(self) -> None:
        palette = Palette.uniform(8)
        for tokens, sides, error in (
            ([[0.0]], (), DataError),
            ([[8]], (), DataError),
            ([[-1]], (), DataError),
            (3, (), DataError),
            ([[0, 1]], (), ConfigError),
            ([[0, 1, 2, 3]], (3, 1), ConfigError),
            ([[0, 1, 2, 3]], (2, None), ConfigError),
            ([[0, 1, 2, 3]], (-2, -2), ConfigError),
            ([[0, 1, 2, 3]], (2.0, 2), ConfigError),
        ):
            with pytest.raises(error):
                palette.decode(np.array(tokens), *sides)


class TestError:
    def test_by_hand(self) -> None:
        palette = Palette([[0, 0, 0], [100.4, 100, 100]])
        error = palette.error(np.array([[0, 0, 3], [100, 90, 100]], np.uint8))
        assert error.mean_delta == pytest.approx(13 / 6)
        assert error.psnr == pytest.approx(10 * math.log10(255**2 / (109 / 6)))
        assert str(error) == "mean error 2.17 of 255, PSNR 35.5 dB"
        with pytest.raises(DataError):
            palette.error(np.zeros((0, 3), np.uint8))

    def test_in_parts(self, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        palette = Palette.uniform(64)
        whole = palette.error(photo)
        decoded = palette.decode(palette.encode(photo), *photo.shape[:2]).astype(float)
        assert whole.mean_delta == pytest.approx(np.abs(decoded - photo).mean())
        monkeypatch.setattr("igpt.palette.palette._CHUNK", 777)
        assert palette.error(photo) == whole
        assert palette.error(torch.from_numpy(photo)) == whole
