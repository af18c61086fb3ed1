"""Which image comes when: pure functions of the seed, so that there is no loader state to save."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from igpt.checks import Between, check_int, check_number
from igpt.errors import ConfigError
from igpt_kernels.messages import shown

_MOST = 1 << 28  # images, or draws at once: 2 GiB of indices
_SHARE = Between(0.0, 1.0, high_open=True)
_SPLIT = 0x53504C  # keeps the split's random stream apart from those of the epochs


def order(n: int, seed: int, first: int, count: int) -> NDArray[np.int64]:
    """The indices of draws `first` .. `first + count - 1` over `n` images: every epoch visits each image once.

    Epoch e = draw // n is the permutation of ``Generator(PCG64(SeedSequence([seed, e])))``. The answer depends on
    (n, seed, draw) alone, however the draws are cut into calls. It is the same for one NumPy version; NumPy keeps the
    right to change a stream between versions (NEP 19).

    Args:
        n: images, at least 1.
        seed: at least 0.
        first: first draw, counted from 0.
        count: draws.

    Returns:
        int64 [count], values 0..n-1.

    Raises:
        ConfigError: n below 1, or another argument below 0.

    Cost:
        O(count), plus one permutation for an epoch that is not among the last four; (30 ms for n = 1.3 million).
    """
    n, seed = check_int("n", n, 1, _MOST), check_int("seed", seed, 0)
    first, count = check_int("first", first, 0), check_int("count", count, 0, _MOST)
    parts = []
    while count > 0:
        epoch, start = divmod(first, n)
        part = _permutation(n, seed, epoch)[start : start + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    permutation = generator.permutation(n).astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def split_indices(n: int, split: str, val_fraction: float, seed: int) -> NDArray[np.int64]:
    """Sorted indices of one part of `n` images: a pure function of (n, seed, val_fraction).

    round(n x val_fraction) images (at least one if the fraction is above 0 and n above 1) are drawn at random
    for "val"; "train" is the rest and "all" is everything.

    Raises:
        ConfigError: unknown split, a fraction outside [0, 1), a negative seed, or a part without images.
    """
    if not isinstance(split, str) or split not in ("train", "val", "all"):
        raise ConfigError(f"split must be one of train, val, all; got {shown(split)}")
    val_fraction = check_number("val_fraction", val_fraction, _SHARE)
    n, seed = check_int("n", n, 0, _MOST), check_int("seed", seed, 0)
    if split == "all":
        return np.arange(n, dtype=np.int64)
    held = min(max(round(n * val_fraction), 1), n - 1) if val_fraction > 0.0 else 0
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _SPLIT])))
    shuffled = generator.permutation(n)
    part = shuffled[:held] if split == "val" else shuffled[held:]
    if part.size == 0:
        raise ConfigError(f"split 'val' is empty: {n} image(s), val_fraction {val_fraction!r}")
    return np.sort(part).astype(np.int64)
