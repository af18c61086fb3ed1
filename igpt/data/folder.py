"""Pictures in files: the sources ``photos:DIR`` and ``folder:DIR``, and a single picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.data.images import MAX_PIXELS, SUFFIXES, crop_and_resize, read_picture
from igpt.data.source import Batch, Source
from igpt.data.threads import Threads, usable_cores
from igpt.errors import ConfigError, DataError
from igpt.files import describe

if TYPE_CHECKING:
    from igpt.data.open import Request

_MAX_OWN_SIDE = 256
"""A picture without a wanted size is taken as it is up to this side: 256 x 256 = 65,536 tokens."""

_LONG_PATH = 200  # letters of a path in a message


class FolderSource(Source):
    """Picture files, decoded when they are asked for by a few threads (Pillow frees the interpreter while it decodes).

    See `open_source` for the arguments. With `like`, the picture that height and width are those of, pictures of another size
    count as damaged; without it all are resized. The result does not depend on the number of threads. A source can be used in
    forked and spawned workers; each counts the damaged pictures that it met.
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
        self._threads = Threads(min(8, usable_cores()), "igpt-read")
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
        seed, first = self.check_draws(seed, first)
        draws = [None if seed is None or not self.augment else (seed, first + i) for i in range(len(asked))]
        pixels = np.empty((len(asked), self.height, self.width, 3), dtype=np.uint8)
        used = asked.copy()
        for i, result in enumerate(self._map(self._try, asked.tolist(), draws)):
            if isinstance(result, DataError):
                used[i], result = self._replacement(int(asked[i]), result, draws[i])
            pixels[i] = result
        return Batch(pixels, self._labels_of(used), used)

    def close(self) -> None:
        self._threads.close()

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
        return crop_and_resize(picture, self.height, self.width, crop)

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
        return self._threads.pool.map(function, indices, draws)


def open_pictures(request: Request) -> FolderSource:
    """All pictures below a folder, or one file; for the scheme ``folder`` with the sub-folders as classes."""
    paths, labels, classes = _pictures(request.spec, request.path, by_class=request.scheme == "folder")
    chosen = request.chosen(len(paths))
    height, width, like = request.height, request.width, None
    if height is None or width is None:
        # By the first of all pictures, not of this split: the splits of one folder must agree.
        damaged = request.max_bad if request.bad_images == "skip" else 0
        height, width, like = _own_size(request.spec, paths, request.max_pixels, damaged)
    return FolderSource(
        request.spec,
        [paths[i] for i in chosen],
        None if labels is None else labels[chosen],
        classes,
        height,
        width,
        like=like,
        augment=request.augment,
        bad_images=request.bad_images,
        max_bad=request.max_bad,
        max_pixels=request.max_pixels,
    )


def _pictures(spec: str, root: Path, *, by_class: bool) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...]]:
    if root.is_file():
        return [root], None, ()
    if not root.is_dir():
        raise DataError(f"{spec}: no such folder or file")
    found = sorted(_walk(root))
    if not found:
        raise DataError(f"{spec}: no pictures in it (names ending in {' '.join(sorted(SUFFIXES))})")
    paths = [root / name for name in found]
    if not by_class:
        return paths, None, ()
    tops = [name.partition("/")[0] if "/" in name else "" for name in found]
    beside = [name for name, top in zip(found, tops, strict=True) if not top]
    if len(beside) == len(found):
        return paths, None, ()
    if beside:
        raise DataError(
            f"{spec}: {len(beside)} picture(s) lie beside the class folders, the first is {root / beside[0]}; "
            f"move them, or say photos:{root} to do without classes"
        )
    classes = tuple(sorted(set(tops)))
    number = {name: i for i, name in enumerate(classes)}
    return paths, np.array([number[top] for top in tops], dtype=np.int64), classes


def _own_size(spec: str, paths: list[Path], max_pixels: int, max_bad: int) -> tuple[int, int, Path]:
    """Height and width of the first readable picture, and its path; more than `max_bad` damaged ones before it are an error."""
    for damaged, path in enumerate(paths):
        try:
            picture = read_picture(path, max_pixels=max_pixels)
        except DataError as error:
            if damaged >= max_bad:
                raise
            if path == paths[-1]:
                raise DataError(f"{spec}: none of its {len(paths)} pictures can be read; the last: {error}") from error
            continue
        if max(picture.size) <= _MAX_OWN_SIDE:
            return picture.height, picture.width, path
        raise ConfigError(
            f"{spec} needs a height and width: its first picture has {picture.height} x {picture.width} pixels, "
            f"and only pictures up to {_MAX_OWN_SIDE} are taken at their own size"
        )
    raise DataError(f"{spec}: no pictures")


def _walk(root: Path) -> list[str]:
    """Relative paths with "/" of all pictures, folder by folder, however deep.

    Links are followed, but no folder is entered twice: links can form a ring. Where two paths lead to a folder, the first of
    a walk in the order of names is taken.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        below = []
        try:
            status = os.stat(root / relative)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / relative) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if _is_folder(entry):
                        below.append(relative + name + "/")
                    elif os.path.splitext(name)[1].lower() in SUFFIXES:
                        found.append(relative + name)
        except OSError as error:
            shown = (
                relative if len(relative) <= _LONG_PATH else f"{relative[: _LONG_PATH // 2]}...{relative[-_LONG_PATH // 2 :]}"
            )
            raise DataError(f"{root}: {shown} cannot be read ({describe(error)})") from error
        waiting += sorted(below, reverse=True)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself
