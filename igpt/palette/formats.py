"""Palette files as pretrained models carry them: `preprocessor_config.json` and `kmeans_centers.npy`, colours in [-1, 1]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.errors import CheckpointError, import_extra
from igpt.files import describe, open_npy, read_json

SLACK = 0.01  # how far beyond 0..255 rounding may have carried a colour


def palette_file(path: str | Path) -> Path:
    """The file to read for a folder, file or hub id. Raises `CheckpointError` where there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        for name in ("preprocessor_config.json", "kmeans_centers.npy"):
            if (file / name).exists():
                return file / name
        raise CheckpointError(f"{file}: holds no palette (preprocessor_config.json or kmeans_centers.npy)")
    if file.exists():
        return file
    name = str(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or file.suffix in (".json", ".npy"):
        raise CheckpointError(f"palette {name!r}: no such folder or file")
    try:
        hub = import_extra("huggingface_hub", "hf")
        return Path(hub.hf_hub_download(name, "preprocessor_config.json"))
    except Exception as error:  # many kinds: not found, offline, a proxy's answer, no permission, extra not installed
        raise CheckpointError(
            f"palette {name!r}: no such folder, and not to be had from the hub ({describe(error)})"
        ) from error


def read_clusters(file: Path) -> tuple[NDArray[np.float64], int | None, int | None]:
    """Colours float64 [V,3] on the 0..255 scale, and the image size (height, width) if the file states one.

    Raises:
        CheckpointError, DataError: the file is malformed; names it and what is wrong.
    """
    if file.suffix == ".npy":
        array = np.array(open_npy(file, ndim=2, kinds="f"), dtype=np.float64)
        return _from_unit(array, file), None, None
    values = read_json(file)
    clusters = values.get("clusters") if isinstance(values, dict) else None
    if not isinstance(clusters, list) or not 2 <= len(clusters) <= 65536:
        raise CheckpointError(f'{file}: "clusters" must be a list of 2 to 65536 colours')
    for i, color in enumerate(clusters):
        numbers = isinstance(color, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in color)
        if not numbers or len(color) != 3:
            raise CheckpointError(f"{file}: clusters[{i}] must be three numbers, got {str(color)[:60]}")
    for key in ("image_mean", "image_std"):
        if values.get(key, [0.5] * 3) not in (0.5, [0.5] * 3):
            raise CheckpointError(f"{file}: {key} must be 0.5 (clusters in [-1, 1]), got {str(values[key])[:60]}")
    try:
        array = np.array(clusters, dtype=np.float64)
    except OverflowError as error:
        raise CheckpointError(f"{file}: clusters hold a number that is too large") from error
    return _from_unit(array, file), *_stated_size(values)


def _from_unit(array: NDArray[np.float64], file: Path) -> NDArray[np.float64]:
    limit = 1.0 + SLACK / 127.5
    if array.size and np.abs(array).max() > limit:
        raise CheckpointError(f"{file}: clusters must lie in [-1, 1], got {array.min():g}..{array.max():g}")
    return (array + 1.0) * 127.5


def _stated_size(values: dict[str, Any]) -> tuple[int | None, int | None]:
    """ "size" as a mapping, or as one number in files of transformers 4; anything else, or do_resize false, states none."""
    size = values.get("size") if values.get("do_resize", True) else None
    if isinstance(size, dict):
        height, width = size.get("height"), size.get("width")
    else:
        height = width = size
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 65536:
            return None, None
    return height, width
