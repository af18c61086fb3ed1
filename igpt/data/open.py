"""From the name of a data source to the source."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from igpt.checks import MAX_SIDE, check_bool, check_int, check_path
from igpt.data import sources
from igpt.data.images import MAX_PIXELS, PILLOW_REFUSES, SUFFIXES
from igpt.data.orders import split_indices
from igpt.errors import ArgumentTypeError, ConfigError
from igpt_kernels.messages import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from igpt.data.source import Source


@dataclass(frozen=True)
class Request:
    """What `open_source` was asked for, checked; for the openers of the table.

    Attributes:
        scheme: the word before the colon.
        path: what follows it, "~" expanded.
        others: see `open_source`.
    """

    spec: str
    scheme: str
    path: Path
    height: int | None
    width: int | None
    split: str
    val_fraction: float
    seed: int
    augment: bool
    bad_images: str
    max_bad: int
    max_pixels: int

    def chosen(self, count: int) -> NDArray[np.int64]:
        """The images of the split, of `count` in all."""
        return split_indices(count, self.split, self.val_fraction, self.seed)


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

    `igpt.data.sources.SOURCES` lists the names. ``digits`` is scikit-learn's, grey 0..255 as RGB. ``photos:DIR`` takes one
    picture file too, and so does the bare path of a picture. In ``folder:DIR``, where every picture lies in a sub-folder, the
    sub-folders are the classes. ``cifar10:DIR`` and ``cifar100:DIR`` name the binary archive, unpacked or not; "train" and
    "val" are its own train and test parts.

    Pictures come in the order of their relative paths; hidden files, and names without a picture's suffix, are left out.
    Splits are a pure function of (number of images, seed, val_fraction).

    Args:
        spec: the name.
        height, width: size of the images, both or neither. Neither takes the source's own: 8 x 8 for digits, 32 x 32 for
            CIFAR; the first picture's in a folder if no side exceeds 256 (then a picture of another size counts as damaged).
            Pictures are cut to shape and resized as `igpt.data.images.crop_and_resize` says.
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
    if not isinstance(spec, str):
        raise ArgumentTypeError(f"spec must be the name of a source, one of {sources.forms()}, got {shown(spec)}")
    height, width = (
        None if value is None else check_int(name, value, 1, MAX_SIDE) for name, value in (("height", height), ("width", width))
    )
    if (height is None) != (width is None):
        raise ConfigError(f"give both height and width or neither, got {height} and {width}")
    if not isinstance(bad_images, str) or bad_images not in ("raise", "skip"):
        raise ConfigError(f"bad_images must be raise or skip, got {shown(bad_images)}")
    augment, max_bad = check_bool("augment", augment), check_int("max_bad", max_bad, 0)
    max_pixels = check_int("max_pixels", max_pixels, 1, PILLOW_REFUSES)  # where Pillow refuses
    split_indices(2, split, val_fraction, seed)
    check_path("spec", spec)
    kind, (scheme, _, rest) = sources.find(spec), spec.partition(":")
    if kind is None and Path(spec).suffix.lower() in SUFFIXES and _expanded(spec).is_file():
        kind, scheme, rest = sources.find(f"photos:{spec}"), "photos", spec
    if kind is None:
        raise ConfigError(_unknown(spec))
    if augment and not kind.crops:
        raise ConfigError(f"augment cuts random parts out of photographs; {scheme} has none")
    module, _, function = kind.opener.partition(":")
    path = _expanded(rest)
    request = Request(spec, scheme, path, height, width, split, val_fraction, seed, augment, bad_images, max_bad, max_pixels)
    source: Source = getattr(importlib.import_module(module), function)(request)
    return source


def _expanded(path: str) -> Path:
    """A path without "~"."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"spec: no home folder is known for {shown(path)}") from error


def _unknown(spec: str) -> str:
    scheme, separator, _ = spec.partition(":")
    path = _expanded(spec)
    if spec and path.is_dir():
        return f"spec {shown(spec)} is a folder: say photos:{spec} (or folder:{spec} with class sub-folders)"
    if path.suffix == ".npy" and path.is_file():
        return f"spec {shown(spec)} is an array: say tokens:{spec} if its rows are tokens"
    if any(kind.scheme == scheme and kind.path for kind in sources.SOURCES):
        return f"spec {shown(spec)} {'lacks' if separator else 'needs'} a path: {scheme}:PATH"
    return f"spec: unknown data source {shown(spec)}; known are {sources.forms()}, or a picture file"
