"""Token files: rows of palette tokens in a .npy, read as they are needed. What they mean is in a .json of that name beside it.

`igpt tokenize` writes NAME.npy (uint8 or uint16 [n, T]); NAME.json (height, width, vocab, classes, and the palette as
"clusters" in the form of a preprocessor_config.json); and, where the images had labels, NAME.labels.npy (int64 [n]). Only the
.npy is needed to read them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from igpt.data.row_file import RowFile
from igpt.data.source import Source
from igpt.errors import ConfigError, DataError
from igpt.files import open_npy, read_json

if TYPE_CHECKING:
    from igpt.data.open import Request
    from igpt.palette.palette import Palette

_SCAN_BYTES = 64 * 1024 * 1024


def open_tokens(request: Request) -> TokenSource:
    """The token file at the request's path."""
    source = TokenSource(request.spec, request.path, request.height, request.width)
    source.restrict(request.chosen(len(source)))
    return source


def sidecar_paths(path: Path) -> tuple[Path, Path]:
    """The .json and the .labels.npy that belong to a token file."""
    return path.with_suffix(".json"), path.with_suffix(".labels.npy")


def check_tokens(tokens: NDArray[Any], rows: NDArray[np.int64], size: int, name: str) -> None:
    """Raise `DataError` naming the row when a token lies outside 0 .. size - 1. tokens [n,T], rows [n]."""
    if tokens.size == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < size):
        return
    row, column = np.argwhere((tokens < 0) | (tokens >= size))[0]
    raise DataError(f"{name}: row {rows[row]} holds token {tokens[row, column]}, expected 0..{size - 1}")


class TokenSource(Source):
    """A token file. `rows` (int64, sorted) are the lines of the file that belong to this split; None is all.

    Attributes besides those of `Source`:
        palette: the palette that made the tokens, or None where the file has no .json beside it.

    Raises:
        DataError: not a two-dimensional integer .npy, or a .json or .labels.npy that does not fit to it.
        ConfigError: height x width is not T, or is unknown and T is not a square.
    """

    def __init__(self, name: str, path: Path, height: int | None, width: int | None) -> None:
        self._path = path
        self._array = RowFile(path)
        n, length = self._array.shape
        self._rows = np.arange(n, dtype=np.int64)
        self._vocab: int | None = None
        self._has_palette = False
        sidecar, labels_path = sidecar_paths(path)
        classes: tuple[str, ...] = ()
        if sidecar.exists():
            own_height, own_width, self._vocab, classes, self._has_palette = _read_sidecar(sidecar)
            if own_height * own_width != length:
                raise DataError(f"{sidecar}: {own_height} x {own_width} does not fit to the {length} tokens a row of {path}")
            if height is None or width is None:
                height, width = own_height, own_width
            if (height, width) != (own_height, own_width):
                raise ConfigError(f"{name} holds images of {own_height} x {own_width}, not {height} x {width}")
        if height is None or width is None:
            height = width = math.isqrt(length)
        if height * width != length:
            raise ConfigError(f"{name} has {length} tokens a row, which is not {height} x {width}; give its height and width")
        labels = None
        if labels_path.exists():
            labels = np.array(open_npy(labels_path, ndim=1, kinds="iu"), dtype=np.int64)
            if len(labels) != n or labels.min() < 0 or (classes and labels.max() >= len(classes)):
                raise DataError(f"{labels_path}: does not fit to the {n} rows of {path} and {len(classes)} classes")
        super().__init__(name, "tokens", height, width, labels, classes)

    def __len__(self) -> int:
        return len(self._rows)

    def restrict(self, rows: NDArray[np.int64]) -> None:
        """Keep only these rows (sorted indices into the present ones)."""
        self._rows = self._rows[rows]
        if self.labels is not None:
            self.labels = self.labels[rows]

    @property
    def vocab_size(self) -> int:
        """Palette size by the .json; without one the largest token + 1, found by reading the whole file once."""
        if self._vocab is None:
            step = max(1, _SCAN_BYTES // (self._array.shape[1] * self._array.dtype.itemsize))
            largest = 0
            for start in range(0, len(self._array), step):
                part = self._array[start : start + step]
                largest = max(largest, int(part.max()))
                check_tokens(part, np.arange(start, start + len(part)), largest + 1, str(self._path))
            self._vocab = largest + 1
        return self._vocab

    @property
    def palette(self) -> Palette | None:
        """The palette stored beside the tokens, read anew each time."""
        if not self._has_palette:
            return None
        from igpt.palette.palette import Palette

        return Palette.from_pretrained(sidecar_paths(self._path)[0])

    def tokens(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Rows by index: int64 [n,T]. Raises `DataError` naming the row where a token is outside the vocabulary."""
        rows = self._rows[self.check_indices(indices)]
        tokens = self._array[rows]
        largest = 65536 if self._vocab is None else self._vocab
        check_tokens(tokens, rows, largest, str(self._path))
        return np.asarray(tokens, dtype=np.int64)


def _read_sidecar(path: Path) -> tuple[int, int, int, tuple[str, ...], bool]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object with height, width and vocab")
    numbers = []
    for key in ("height", "width", "vocab"):
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
            raise DataError(f"{path}: {key} must be an integer from 1 to 65536, got {str(value)[:50]!r}")
        numbers.append(value)
    classes = values.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(item, str) for item in classes):
        raise DataError(f"{path}: classes must be a list of names")
    return numbers[0], numbers[1], numbers[2], tuple(classes), "clusters" in values
