"""What every data source offers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.checks import check_int
from igpt.errors import ConfigError, DataError
from igpt_kernels.messages import shown


class Batch(NamedTuple):
    """Images as they were read.

    images: uint8 [n,h,w,3]. labels: int64 [n], or None. indices: int64 [n], the images actually used: another than
    was asked for where a damaged one was replaced.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]


class Source:
    """A data set: `len(source)` images of one size, or rows of tokens. Made by `open_source`.

    Attributes:
        name: what it was opened as.
        kind: "images" (has `images` and `read`) or "tokens" (has `tokens` and `vocab_size`).
        height, width: h and w of every image; T = h x w tokens.
        labels: int64 [n], or None where there are no classes.
        classes: class names; labels index them.
        augment: whether `images` draws random crops when given a seed.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["images", "tokens"],
        height: int,
        width: int,
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        *,
        augment: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.height = height
        self.width = width
        self.labels = labels
        self.classes = classes
        self.augment = augment

    def __len__(self) -> int:
        raise NotImplementedError

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def skipped(self) -> int:
        """Damaged images met so far, each file counted once."""
        return 0

    @property
    def vocab_size(self) -> int:
        """Tokens lie in 0 .. vocab_size - 1. Raises `ConfigError` on a source of images."""
        raise ConfigError(f"{self.name} holds images, not tokens: it needs a palette")

    def images(self, indices: ArrayLike, *, seed: int | None = None, first: int = 0) -> NDArray[np.uint8]:
        """Images by index: `read(...)` without labels."""
        return self.read(indices, seed=seed, first=first).images

    def read(self, indices: ArrayLike, *, seed: int | None = None, first: int = 0) -> Batch:
        """Images with their labels.

        Args:
            indices: integers [n] in 0 .. len(source) - 1, in any order, repeats welcome.
            seed: draws the random crops of a source opened with ``augment=True``: the crop of ``indices[i]`` is a pure
                function of (seed, first + i). None cuts the middle, as for evaluation.
            first: position of the first index in the run's sequence of draws.

        Raises:
            DataError: an index out of range, or a damaged image (see `open_source`).
            ConfigError: the source holds tokens.
        """
        raise ConfigError(f"{self.name} holds tokens, not images")

    def tokens(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Rows of tokens, int64 [n,T]. Raises `ConfigError` on a source of images."""
        raise ConfigError(f"{self.name} holds images, not tokens: it needs a palette")

    def close(self) -> None:
        """Stop the reading threads, if any. The source can still be used; they start again."""

    def check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """`indices` as int64 [n]. Raises `DataError` unless they are integers in 0 .. len(source) - 1."""
        try:
            asked = np.asarray(indices)
        except Exception as error:  # tensors without values in memory, rows of several lengths
            raise DataError(f"indices must be integers of one dimension, got {shown(indices)}") from error
        if asked.size == 0:
            asked = np.zeros(asked.shape, np.int64)
        if asked.ndim != 1 or asked.dtype.kind not in "iu":
            raise DataError(f"indices must be integers of one dimension, got shape {asked.shape} of {asked.dtype}")
        if asked.size and (asked.min() < 0 or asked.max() >= len(self)):
            raise DataError(f"indices must lie in 0..{len(self) - 1}, got {asked.min()}..{asked.max()}")
        return asked.astype(np.int64)

    @staticmethod
    def check_draws(seed: int | None, first: int) -> tuple[int | None, int]:
        """The arguments that draw crops. Raises `ConfigError` unless they are integers of at least 0."""
        return None if seed is None else check_int("seed", seed, 0), check_int("first", first, 0)

    def _labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.labels is None else self.labels[indices]
