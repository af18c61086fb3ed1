"""Pictures, pixel by pixel."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from igpt.errors import ConfigError
from igpt.palette.palette import Palette
from igpt.plots import grids
from igpt.plots.grids import GAP, MASKED


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("columns", "scale", "pad"), [(None, 3, 1), (2, 1, 0), (5, 4, 2), (9, 2, 1)])
def test_grid_pixels(columns: int | None, scale: int, pad: int) -> None:
    images = noise(5, 4, 6, 3)
    picture = np.asarray(grids.grid(images, columns=columns, scale=scale, pad=pad))
    across = {None: 3, 9: 5}.get(columns, columns)
    assert across is not None
    down = math.ceil(5 / across)
    assert picture.shape == ((down * (4 + pad) + pad) * scale, (across * (6 + pad) + pad) * scale, 3)
    seen = np.zeros(picture.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = (i // across) * (4 + pad) + pad, (i % across) * (6 + pad) + pad
        for y in range(4):
            for x in range(6):
                cell = (slice((top + y) * scale, (top + y + 1) * scale), slice((left + x) * scale, (left + x + 1) * scale))
                assert (picture[cell] == image[y, x]).all()
                seen[cell] = True
    assert (picture[~seen] == GAP).all()


@pytest.mark.parametrize(("n", "side"), [(1, 8), (16, 8), (16, 32), (64, 32), (100, 8), (9, 64), (4, 256)])
def test_grids_are_sized_for_a_page(n: int, side: int) -> None:
    picture = grids.grid(np.zeros((n, side, side, 3), np.uint8))
    assert 500 <= picture.width <= 1200


def test_completion_grid_pixels() -> None:
    originals, completions = noise(2, 8, 8, 3), noise(2, 3, 8, 8, 3, seed=1)
    mask = np.random.default_rng(2).random((2, 8, 8)) < 0.5
    picture = np.asarray(grids.completion_grid(originals, mask, completions, scale=10))
    body = picture[-190:]
    header = picture[:-190]
    assert len(header) > 15
    kept = np.where(mask[..., None], completions[:, 0], np.array(MASKED, np.uint8))
    rows = np.concatenate([originals[:, None], kept[:, None], completions], axis=1).reshape(10, 8, 8, 3)
    assert np.array_equal(body, np.asarray(grids.grid(rows, columns=5, scale=10)))
    shared = grids.completion_grid(originals, mask[0], completions, scale=10)
    assert np.array_equal(np.asarray(shared), np.asarray(grids.completion_grid(originals, mask[[0, 0]], completions, scale=10)))


@pytest.mark.parametrize("n", [1, 4])
def test_header_is_inside_its_strip_and_over_its_columns(n: int) -> None:
    page = np.asarray(grids.completion_grid(noise(1, 8, 8, 3), np.ones((8, 8), bool), noise(1, n, 8, 8, 3)))
    scale = page.shape[1] // ((2 + n) * 9 + 1)
    header = page[: len(page) - 10 * scale]
    ink = (header < 128).all(-1)
    assert not ink[0].any()
    assert not ink[-1].any()
    ends = [(0, 9), (9, 18), (18, 9 * (2 + n))]
    inked = np.flatnonzero(ink.any(0))
    for first, last in ends:
        inside = inked[(inked >= (first + 1) * scale) & (inked < (last + 1) * scale)]
        assert len(inside) > 20
        middle = (inside.min() + inside.max()) / 2
        assert abs(middle - (first + last + 1) * scale / 2) < 4
    assert (header[:, -scale:] == 255).all()


def test_header_is_left_out_where_nobody_could_read_it() -> None:
    picture = grids.completion_grid(noise(2, 8, 8, 3), np.ones((8, 8), bool), noise(2, 2, 8, 8, 3), scale=2)
    assert picture.size == ((4 * 9 + 1) * 2, (2 * 9 + 1) * 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: grids.grid(np.zeros((0, 4, 4, 3), np.uint8)),
        lambda: grids.grid(np.zeros((2, 4, 4), np.uint8)),
        lambda: grids.grid(np.zeros((2, 4, 4, 3))),
        lambda: grids.grid([[1]]),  # type: ignore[arg-type]
        lambda: grids.grid(noise(2, 4, 4, 3), columns=0),
        lambda: grids.grid(noise(2, 4, 4, 3), scale=0),
        lambda: grids.grid(noise(2, 4, 4, 3), scale=1.5),  # type: ignore[arg-type]
        lambda: grids.grid(noise(2, 4, 4, 3), pad=-1),
        lambda: grids.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4), bool), noise(3, 1, 4, 4, 3)),
        lambda: grids.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4), bool), noise(2, 1, 4, 5, 3)),
        lambda: grids.completion_grid(noise(2, 4, 4, 3), np.ones((5, 4), bool), noise(2, 1, 4, 4, 3)),
        lambda: grids.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4)), noise(2, 1, 4, 4, 3)),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_config_errors(call: Any) -> None:
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize(("images", "columns"), [(1, None), (7, None), (12, 4)])
def test_a_scale_is_checked_before_there_are_images(images: int, columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "LARGEST", 2000)
    for scale in (None, *range(1, 40)):
        try:
            grids.check_scale(scale, images, 5, 3, columns=columns)
        except ConfigError as error:
            with pytest.raises(ConfigError, match=re.escape(str(error))):
                grids.grid(noise(images, 5, 3, 3), columns=columns, scale=scale)
        else:
            picture = grids.grid(noise(images, 5, 3, 3), columns=columns, scale=scale)
            assert scale is None or picture.width * picture.height <= 2000
    with pytest.raises(ConfigError, match=r"scale must be at most [0-9]+ for a picture of .* pixels, got 40"):
        grids.check_scale(40, images, 5, 3, columns=columns)
    with pytest.raises(ConfigError, match=r"a picture of 61 x 41 pixels is too large .*: show fewer images"):
        grids.check_scale(None, 100, 5, 3)


@pytest.mark.parametrize("size", [2, 7, 64, 512])
def test_palette_picture_shows_every_colour(size: int) -> None:
    colors = np.unique(noise(2 * size, 3), axis=0)[:size]
    picture = np.asarray(grids.palette_picture(Palette(colors)))
    shown = {tuple(color) for color in picture.reshape(-1, 3)}
    assert {tuple(color) for color in colors} <= shown
    assert shown - {tuple(color) for color in colors} <= {(255, 255, 255)}


def test_before_after_panels() -> None:
    palette, photo = Palette.uniform(27), noise(30, 40, 3)
    picture = np.asarray(grids.before_after(photo, palette, scale=5))
    body = picture[-32 * 5 :: 5, ::5]
    decoded = palette.decode(palette.encode(photo), 30, 40)
    assert np.array_equal(body[1:31, 1:41], photo)
    assert np.array_equal(body[1:31, 42:82], decoded)
    difference = np.minimum(8 * np.abs(photo.astype(int) - decoded), 255)
    assert np.array_equal(body[1:31, 83:123], difference)
    assert len(picture) > 32 * 5
