"""The palette that `--palette` names, and pixels of a source to learn one from."""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.checks import check_bool, check_int
from igpt.data.source import Source
from igpt.data.tokens import TokenSource
from igpt.errors import ArgumentTypeError, ConfigError
from igpt.palette.arrays import check_pixels
from igpt.palette.kmeans import different_colors, even_draw
from igpt.palette.palette import Palette
from igpt_kernels.messages import shown

_MIN_IMAGES = 4096  # that a sample of pixels comes from, where there are so many


def parse_palette(
    text: str, images: Source | ArrayLike, *, max_pixels: int = 2_000_000, seed: int = 0, progress: bool = True
) -> Palette:
    """The palette that `--palette` names: ``auto``, ``fit:K``, ``uniform:K``, or what `Palette.from_pretrained` reads.

    ``auto`` is ``fit:512`` (the paper's size), or, of images with fewer different colours, exactly those.

    Args:
        text: the name.
        images: uint8 [...,3] or a `Source`, looked at for ``auto`` and ``fit:K`` only. A token file cannot be fitted: there
            they mean the palette stored beside it.
        max_pixels, seed, progress: as in `Palette.fit`.

    Raises:
        ConfigError: K is not a number or cannot be; tokens without a palette of their own.
        IgptError: as `Palette.fit`, `Palette.uniform` and `Palette.from_pretrained`.
    """
    if not isinstance(text, str):
        raise ArgumentTypeError(f"text: palette must be named by a string, got {shown(text)}")
    max_pixels, seed, progress = (
        check_int("max_pixels", max_pixels, 1),
        check_int("seed", seed, 0),
        check_bool("progress", progress),
    )
    kind, separator, number = text.partition(":")
    if text == "auto":
        kind, number = "fit", ""
    elif kind not in ("fit", "uniform") or not separator:
        return Palette.from_pretrained(text)
    elif not re.fullmatch(r"[0-9]{1,6}", number):
        raise ConfigError(f"palette: {kind}:K wants a number of colours, got {text!r}")
    if kind == "uniform":
        return Palette.uniform(int(number))
    if isinstance(images, TokenSource):
        own = images.palette
        if own is None:
            raise ConfigError(f"{images.name} has no palette beside it, and {text} needs pixels: name a palette folder")
        return own
    if isinstance(images, Source):
        images = sample_pixels(images, max_pixels, seed)
    k = int(number) if number else min(512, len(different_colors(check_pixels(images).reshape(-1, 3))[0]))
    return Palette.fit(images, k, max_pixels=max_pixels, seed=seed, progress=progress)


def sample_pixels(source: Source, max_pixels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pixels of a source to learn a palette from: uint8 [N,3], N at most about `max_pixels`.

    All pixels where they are no more than that. Otherwise as many from each of at least 4,096 images (or all there are),
    drawn at random by `seed`.

    Raises:
        DataError: a damaged image, as `Source.read`.
    """
    n, each = len(source), source.height * source.width
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, n, each])))
    drawn = n if n * each <= max_pixels else min(n, max(_MIN_IMAGES, math.ceil(max_pixels / each)))
    chosen = np.arange(n) if drawn == n else np.sort(generator.permutation(n)[:drawn])
    share = min(each, max(1, max_pixels // drawn))
    parts = []
    for start in range(0, drawn, 256):
        pixels = source.images(chosen[start : start + 256]).reshape(-1, 3)
        if share < each:
            pixels = pixels[even_draw(len(pixels), len(pixels) // each * share, generator)]
        parts.append(pixels)
    return np.concatenate(parts)
