"""From the name of a data source to the source."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from igpt.data.cifar import CIFAR10, CIFAR100, load_cifar
from igpt.data.files import reason
from igpt.data.images import MAX_PIXELS, PILLOW_REFUSES, SUFFIXES, read_picture
from igpt.data.orders import split_indices
from igpt.data.source import ArraySource, FolderSource, Source
from igpt.data.tokens import TokenSource
from igpt.errors import ConfigError, DataError, need

_KNOWN = "digits, photos:DIR, folder:DIR, cifar10:DIR, cifar100:DIR, tokens:FILE.npy, or a picture file"
_MAX_SIDE = 4096
# A picture without a wanted size is taken as it is up to this side: 256 x 256 = 65,536 tokens.
_MAX_OWN_SIDE = 256


def open_source(
    spec: str,
    *,
    height: int | None = None,
    width: int | None = None,
    split: str = "train",
    val_fraction: float = 0.1,
    seed: int = 0,
    augment: bool = False,
    bad_images: str = "raise",
    max_bad: int = 100,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Open a data set by name.

    ``digits``: scikit-learn's 1,797 real 8 x 8 digits, grey 0..255 as RGB. ``photos:DIR``: all pictures below a folder, or one
    picture file (the bare path of a picture works too). ``folder:DIR``: the same, where every picture lies in a sub-folder of
    DIR the sub-folders are the classes. ``cifar10:DIR``, ``cifar100:DIR``: the binary archive, unpacked or not; "train" and
    "val" are its own train and test parts. ``tokens:FILE.npy``: rows written by `igpt tokenize`.

    Pictures come in the order of their relative paths; hidden files, and names without a picture's suffix, are left out.
    Splits are a pure function of (number of images, seed, val_fraction).

    Args:
        spec: the name.
        height, width: size of the images, both or neither. Neither takes the source's own: 8 x 8 for digits, 32 x 32 for
            CIFAR, the first picture's in a folder if no side exceeds 256 (then a picture of another size counts as damaged).
            Pictures are cut to shape and resized as `igpt.data.images.fit` says.
        split: "train", "val" (the images held out) or "all".
        val_fraction: share held out, in [0, 1). CIFAR holds out its test part instead.
        seed: of the split.
        augment: random crops from pictures (not digits, CIFAR or tokens), drawn by the seed given to `images`.
        bad_images: "raise" stops at a damaged picture with an error that names it; "skip" takes the next readable one in
            its place and counts it in `.skipped`.
        max_bad: with "skip", more damaged pictures than this are an error.
        max_pixels: pictures with more pixels are refused before they are decoded; at most 178,956,970.

    Raises:
        ConfigError: an unknown name or an option that cannot work.
        DataError: a folder, file or archive that is missing, empty, damaged or not what its name says.
        MissingExtra: `digits` without scikit-learn.
    """
    _check_options(height, width, augment, bad_images, max_bad, max_pixels)
    split_indices(2, split, val_fraction, seed)
    scheme, separator, rest = spec.partition(":")
    if spec == "digits":
        if augment:
            raise ConfigError("augment cuts random parts out of photographs; digits has none")
        pixels, labels, classes = _digits()
        chosen = split_indices(len(pixels), split, val_fraction, seed)
        return ArraySource(spec, pixels[chosen], labels[chosen], classes, height, width)
    if scheme in ("cifar10", "cifar100") and rest:
        if augment:
            raise ConfigError(f"augment cuts random parts out of photographs; {scheme} has none")
        form = CIFAR10 if scheme == "cifar10" else CIFAR100
        pixels, labels, classes = load_cifar(form, Path(rest).expanduser(), split)
        return ArraySource(spec, pixels, labels, classes, height, width)
    if scheme == "tokens" and rest:
        if augment:
            raise ConfigError("augment needs pictures; a token file has none")
        source = TokenSource(spec, Path(rest).expanduser(), height, width)
        source.restrict(split_indices(len(source), split, val_fraction, seed))
        return source
    if scheme in ("photos", "folder") and rest:
        paths, folder_labels, classes = _pictures(spec, Path(rest).expanduser(), by_class=scheme == "folder")
    elif Path(spec).suffix.lower() in SUFFIXES and Path(spec).expanduser().is_file():
        paths, folder_labels, classes = [Path(spec).expanduser()], None, ()
    else:
        raise ConfigError(_unknown(spec, scheme, separator))
    chosen = split_indices(len(paths), split, val_fraction, seed)
    like = None
    if height is None or width is None:
        # By the first of all pictures, not of this split: the splits of one folder must agree.
        height, width, like = _own_size(spec, paths, max_pixels, max_bad if bad_images == "skip" else 0)
    return FolderSource(
        spec,
        [paths[i] for i in chosen],
        None if folder_labels is None else folder_labels[chosen],
        classes,
        height,
        width,
        like=like,
        augment=augment,
        bad_images=bad_images,
        max_bad=max_bad,
        max_pixels=max_pixels,
    )


def _check_options(
    height: int | None, width: int | None, augment: bool, bad_images: str, max_bad: int, max_pixels: int
) -> None:
    if (height is None) != (width is None):
        raise ConfigError(f"give both height and width or neither, got {height} and {width}")
    for name, value in (("height", height), ("width", width)):
        if value is not None and not 1 <= value <= _MAX_SIDE:
            raise ConfigError(f"{name} must be from 1 to {_MAX_SIDE}, got {value}")
    if bad_images not in ("raise", "skip"):
        raise ConfigError(f"bad_images must be raise or skip, got {bad_images!r}")
    if max_bad < 0:
        raise ConfigError(f"max_bad must not be negative, got {max_bad}")
    if not 1 <= max_pixels <= PILLOW_REFUSES:
        raise ConfigError(f"max_pixels must be from 1 to {PILLOW_REFUSES} (where Pillow refuses), got {max_pixels}")


def _unknown(spec: str, scheme: str, separator: str) -> str:
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return f"{spec!r} is a folder: say photos:{spec} (or folder:{spec} with class sub-folders)"
    if path.suffix == ".npy" and path.is_file():
        return f"{spec!r} is an array: say tokens:{spec} if its rows are tokens"
    if scheme in ("photos", "folder", "cifar10", "cifar100", "tokens"):
        return f"{spec!r} lacks a path: {scheme}:PATH" if separator else f"{spec!r} needs a path: {scheme}:PATH"
    return f"unknown data source {spec!r}; known are {_KNOWN}"


def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    digits = need("sklearn.datasets", "eval").load_digits()
    grey = np.rint(np.asarray(digits.images) * (255.0 / 16.0)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    return pixels, np.asarray(digits.target, dtype=np.int64), tuple(str(name) for name in digits.target_names)


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
    """Relative paths with "/" of all pictures. Links are followed, but no folder is entered twice: links can form a ring."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=_refuse(root)):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                found.append((relative / name).as_posix())
    return found


def _refuse(root: Path) -> Callable[[OSError], None]:
    def stop(error: OSError) -> None:
        raise DataError(f"{root}: {error.filename} cannot be read ({reason(error)})") from error

    return stop
