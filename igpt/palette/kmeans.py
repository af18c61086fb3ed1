"""The k-means behind `igpt.Palette.fit`: from pixels to colours."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.console import Console
from igpt.errors import ConfigError, import_extra
from igpt_kernels.palette import PaletteTable

# k-means runs on all different colours up to this many (512 colours: 10 s on 2 cores), above it on as many pixels.
_MAX_POINTS = 200_000
_ROUND = 10  # Lloyd iterations between two looks at the progress
_ROUNDS = 10
# The start is found on this many pixels a colour: k-means++ on 150,000 colours takes ten times as long as ten iterations.
_START_PIXELS = 64
_LEAST_START = 5_000
# With few colours the minima that are reached differ (0.4 dB at k = 8), and a start costs next to nothing.
_STARTS, _FEW_COLORS = 2, 32
_FEW_PAIRS = 100_000
_ENOUGH = 1e-3  # a round that lowers the error by less than this share is the last


def learn_colors(pixels: NDArray[np.uint8], k: int, *, max_pixels: int, seed: int, progress: bool) -> NDArray[np.float64]:
    """k colours, float64 [k,3], dark to bright, of pixels uint8 [N,3], N >= 1. What and how: `igpt.Palette.fit`."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, k])))
    if len(pixels) > max_pixels:
        pixels = pixels[even_draw(len(pixels), max_pixels, generator)]
    points, counts = different_colors(pixels)
    if len(points) < k:
        raise ConfigError(f"k = {k}, but the images have only {len(points)} different colours; ask for at most {len(points)}")
    if len(points) == k:
        return _dark_to_bright(points.astype(np.float64))
    chosen, weights = points, counts
    if len(points) > _MAX_POINTS:
        sample, sample_weights = different_colors(pixels[even_draw(len(pixels), _MAX_POINTS, generator)])
        if len(sample) >= k:
            chosen, weights = sample, sample_weights
    centers = _k_means(chosen.astype(np.float64), weights, k, generator, progress)
    return _dark_to_bright(_means(centers, points, counts))


def even_draw(n: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` places out of n, one at random in each of `count` equal stretches: sorted, and without a permutation of n."""
    return ((np.arange(count) + generator.random(count)) * (n / count)).astype(np.int64).clip(max=n - 1)


def different_colors(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The different colours, uint8 [u,3], and how often each occurs, int64 [u]."""
    code = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    codes, counts = np.unique(code, return_counts=True)
    return np.stack([codes >> 16, (codes >> 8) & 255, codes & 255], axis=1).astype(np.uint8), counts


def _k_means(
    points: NDArray[np.float64], counts: NDArray[np.int64], k: int, generator: np.random.Generator, progress: bool
) -> NDArray[np.float64]:
    """k-means++ and Lloyd iterations on a part of the pixels, then Lloyd iterations on all."""
    cluster = import_extra("sklearn.cluster", "eval")
    limits = import_extra("threadpoolctl", "eval").threadpool_limits
    seed = int(generator.integers(2**31))
    part, weights = _some(points, counts, max(_START_PIXELS * k, _LEAST_START), generator)
    if len(part) < k:
        part, weights = points, counts
    bar = Console(progress).progress(_ROUND * (_ROUNDS + 1), 0, f"k-means, {k} colours", "it")
    with limits(limits=2), bar:
        starts = _STARTS if k <= _FEW_COLORS else 1
        found = cluster.KMeans(k, n_init=starts, max_iter=_ROUND * _ROUNDS, random_state=seed)
        found.fit(part, sample_weight=weights.astype(np.float64))
        bar.update(_ROUND)
        before = math.inf
        for steps in (1, *[_ROUND] * _ROUNDS):
            found = cluster.KMeans(k, init=found.cluster_centers_, n_init=1, max_iter=steps, tol=0.0, random_state=seed)
            found.fit(points, sample_weight=counts.astype(np.float64))
            bar.update(steps)
            bar.set_postfix_str(f"{found.inertia_ / counts.sum():.2f} squared error a pixel")
            if found.n_iter_ < steps or found.inertia_ > before * (1.0 - _ENOUGH):
                break
            before = found.inertia_
    return np.asarray(found.cluster_centers_, dtype=np.float64).clip(0.0, 255.0)


def _some(
    points: NDArray[np.float64], counts: NDArray[np.int64], pixels: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The colours of `pixels` of the pixels, drawn evenly, and how often each occurs among them; all where there are fewer."""
    ends = counts.cumsum()
    if len(points) <= pixels:
        return points, counts
    places, often = np.unique(
        np.searchsorted(ends, even_draw(int(ends[-1]), pixels, generator), side="right"), return_counts=True
    )
    return points[places], often


def _means(centers: NDArray[np.float64], points: NDArray[np.uint8], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """One Lloyd step over all points: each colour becomes the mean of the points nearest to it, or stays if none is."""
    k = len(centers)
    # Both give the same answer. Trying all k colours costs 60 to 1,000 ns a pair; the table costs 0.03 to 0.5 s in all.
    backend: Literal["auto", "reference"] = "reference" if len(points) * k <= _FEW_PAIRS else "auto"
    token = PaletteTable(_on_grid(centers), backend=backend).lookup(torch.from_numpy(points)).numpy()
    # Whole numbers below 2^53 in float64: the sums are exact in any order.
    total = np.bincount(token, weights=counts, minlength=k)
    weighted = counts[:, None] * points.astype(np.int64)
    sums = np.stack([np.bincount(token, weights=weighted[:, channel], minlength=k) for channel in range(3)], axis=1)
    return np.where(total[:, None] > 0, sums / np.maximum(total, 1)[:, None], centers)


def _on_grid(colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiples of 2^-16, as `igpt.Palette` keeps them; here so that equal brightness sorts by what is kept."""
    return np.rint(colors * 65536.0) / 65536.0


def _dark_to_bright(colors: NDArray[np.float64]) -> NDArray[np.float64]:
    colors = _on_grid(colors)
    light = colors @ np.array([299.0, 587.0, 114.0])
    return colors[np.lexsort((colors[:, 2], colors[:, 1], colors[:, 0], light))]
