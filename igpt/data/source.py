"""What every data source offers, and the two kinds that hold pictures: an array in memory, and files in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from igpt.data.images import MAX_PIXELS, fit, read_picture
from igpt.errors import ConfigError, DataError


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
        asked = np.asarray(indices)
        if asked.size == 0:
            asked = asked.astype(np.int64)
        if asked.ndim != 1 or asked.dtype.kind not in "iu":
            raise DataError(f"indices must be integers of one dimension, got shape {asked.shape} of {asked.dtype}")
        if asked.size and (asked.min() < 0 or asked.max() >= len(self)):
            raise DataError(f"indices must lie in 0..{len(self) - 1}, got {asked.min()}..{asked.max()}")
        return asked.astype(np.int64)

    def _labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.labels is None else self.labels[indices]


class ArraySource(Source):
    """Images that are in memory already: uint8 [n,h,w,3], resized as they are asked for when another size is wanted."""

    def __init__(
        self,
        name: str,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        height: int | None,
        width: int | None,
    ) -> None:
        own_height, own_width = pixels.shape[1:3]
        super().__init__(
            name,
            "images",
            own_height if height is None else height,
            own_width if width is None else width,
            labels,
            classes,
        )
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, indices: ArrayLike, *, seed: int | None = None, first: int = 0) -> Batch:
        used = self.check_indices(indices)
        pixels = self._pixels[used]
        if pixels.shape[1:3] != (self.height, self.width):
            sized = np.empty((len(used), self.height, self.width, 3), dtype=np.uint8)
            for i, image in enumerate(pixels):
                sized[i] = fit(Image.fromarray(image), self.height, self.width)
            pixels = sized
        return Batch(np.ascontiguousarray(pixels), self._labels_of(used), used)


class FolderSource(Source):
    """Picture files, decoded when they are asked for by a few threads (Pillow frees the interpreter while it decodes).

    See `open_source` for the arguments. With `like`, the picture that height and width are those of, pictures of another size
    count as damaged; without it all are resized. The result does not depend on the number of threads.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        height: int,
        width: int,
        *,
        like: Path | None = None,
        augment: bool = False,
        bad_images: str = "raise",
        max_bad: int = 100,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._paths = list(paths)
        self._skip = bad_images == "skip"
        self._max_bad = max_bad
        self._max_pixels = max_pixels
        self._bad: dict[int, DataError] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._like = like
        super().__init__(name, "images", height, width, labels, classes, augment=augment)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def skipped(self) -> int:
        return len(self._bad)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self._paths[index]

    def read(self, indices: ArrayLike, *, seed: int | None = None, first: int = 0) -> Batch:
        asked = self.check_indices(indices)
        draws = [None if seed is None or not self.augment else (seed, first + i) for i in range(len(asked))]
        pixels = np.empty((len(asked), self.height, self.width, 3), dtype=np.uint8)
        used = asked.copy()
        for i, result in enumerate(self._map(self._try, asked.tolist(), draws)):
            if isinstance(result, DataError):
                used[i], result = self._replacement(int(asked[i]), result, draws[i])
            pixels[i] = result
        return Batch(pixels, self._labels_of(used), used)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _try(self, index: int, draw: tuple[int, int] | None) -> NDArray[np.uint8] | DataError:
        known = self._bad.get(index)
        if known is not None:
            return known
        path = self._paths[index]
        try:
            picture = read_picture(path, max_pixels=self._max_pixels)
        except DataError as error:
            return error
        if self._like is not None and picture.size != (self.width, self.height):
            return DataError(
                f"{path}: {picture.height} x {picture.width} pixels, but {self._like} has {self.height} x {self.width}; "
                "give a height and width to resize all"
            )
        crop = None if draw is None else np.random.Generator(np.random.PCG64(np.random.SeedSequence(draw)))
        return fit(picture, self.height, self.width, crop)

    def _replacement(self, index: int, error: DataError, draw: tuple[int, int] | None) -> tuple[int, NDArray[np.uint8]]:
        for _ in range(len(self._paths)):
            self._note(index, error)
            index = (index + 1) % len(self._paths)
            result = self._try(index, draw)
            if not isinstance(result, DataError):
                return index, result
            error = result
        raise DataError(f"{self.name}: none of its {len(self._paths)} pictures can be read; the last: {error}")

    def _note(self, index: int, error: DataError) -> None:
        if not self._skip:
            raise error
        self._bad[index] = error
        if len(self._bad) > self._max_bad:
            raise DataError(
                f"{len(self._bad)} damaged pictures, more than max_bad={self._max_bad}; the last: {error}"
            ) from error

    def _map(
        self,
        function: Callable[[int, tuple[int, int] | None], NDArray[np.uint8] | DataError],
        indices: list[int],
        draws: list[tuple[int, int] | None],
    ) -> Iterator[NDArray[np.uint8] | DataError]:
        # Single pictures too: a signal handler that raises does so in the main thread, never inside a decoder, where it
        # would pass for damage.
        if self._pool is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            self._pool = ThreadPoolExecutor(min(8, cores or 1), thread_name_prefix="igpt-read")
        return self._pool.map(function, indices, draws)
