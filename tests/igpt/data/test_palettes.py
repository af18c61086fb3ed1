"""Palettes by name, and the pixels they are learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from igpt.data.open import open_source
from igpt.data.palettes import parse_palette, sample_pixels
from igpt.errors import ConfigError, IgptError
from igpt.palette.palette import Palette


class TestParse:
    def test_names(self, tmp_path: Path, photo: np.ndarray) -> None:
        np.testing.assert_array_equal(parse_palette("uniform:27", photo).colors, Palette.uniform(27).colors)
        fitted = Palette.fit(photo, 20, seed=3, progress=False)
        np.testing.assert_array_equal(parse_palette("fit:20", photo, seed=3, progress=False).colors, fitted.colors)
        fitted.save(tmp_path)
        np.testing.assert_array_equal(parse_palette(str(tmp_path), photo).colors, fitted.colors)
        assert parse_palette("fit:17", open_source("digits"), progress=False).size == 17

    def test_tokens_bring_their_own(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((3, 4), np.uint8))
        spec = f"tokens:{tmp_path / 'x.npy'}"
        with pytest.raises(ConfigError, match="no palette beside it"):
            parse_palette("fit:512", open_source(spec))
        about = {"height": 2, "width": 2, "vocab": 8, **Palette.uniform(8).as_dict()}
        (tmp_path / "x.json").write_text(json.dumps(about))
        assert parse_palette("fit:512", open_source(spec)).size == 8

    @pytest.mark.parametrize(
        "text",
        [
            "fit:",
            "fit:x",
            "fit:-3",
            "fit:1",
            "fit:1e3",
            "fit:99999999",
            "uniform:",
            "uniform:7",
            "fit",
            "",
            "kmeans:512",
            "fit:٣",
        ],
    )
    def test_refuses(self, text: str, photo: np.ndarray) -> None:
        with pytest.raises(IgptError):
            parse_palette(text, photo, progress=False)


class TestSamplePixels:
    def test_all_or_some(self) -> None:
        source = open_source("digits", split="all")
        assert sample_pixels(source, 10**6).shape == (1797 * 64, 3)
        some = sample_pixels(source, 20_000, seed=1)
        assert 1797 * 8 < len(some) <= 20_000
        np.testing.assert_array_equal(some, sample_pixels(source, 20_000, seed=1))
        assert (some != sample_pixels(source, 20_000, seed=2)).any()
        share = np.bincount(some[:, 0] // 16, minlength=16) / len(some)
        whole = sample_pixels(source, 10**6)[:, 0]
        np.testing.assert_allclose(share, np.bincount(whole // 16, minlength=16) / len(whole), atol=0.02)

    def test_large_sources_are_not_read_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_source("digits", split="all", height=64, width=64)
        asked: list[int] = []
        read = source.images
        monkeypatch.setattr(source, "images", lambda indices: asked.extend(indices.tolist()) or read(indices))
        monkeypatch.setattr("igpt.data.palettes._MIN_IMAGES", 16)
        assert len(sample_pixels(source, 100_000)) == 100_000
        assert len(asked) == len(set(asked)) == 25


def test_auto_takes_what_colours_there_are() -> None:
    """512, or every colour of images that have fewer."""
    few = np.array([[0, 0, 0], [9, 9, 9], [9, 9, 9], [200, 1, 7]], dtype=np.uint8)
    assert parse_palette("auto", few).size == 3
    many = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)
    assert parse_palette("auto", many, progress=False).size == 512
