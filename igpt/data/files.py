"""Files that strangers may have written: JSON and .npy read without running anything, and files replaced in one step."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.errors import DataError

# The largest palette, 65,536 colours at full precision and one number a line, is 7 MB.
MAX_JSON_BYTES = 32 * 1024 * 1024


def regular_size(path: Path) -> int:
    """Bytes in `path`. Raises `DataError` unless it is a plain file: opening a pipe or a device could block for ever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({reason(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a plain file")
    return status.st_size


def reason(error: BaseException) -> str:
    """The error in a few words on one line, for the end of a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror is not None else str(error)
    text = " ".join(text.split())
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most 32 MB. Raises `DataError` naming the file for anything else."""
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise DataError(f"{path}: {size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({reason(error)})") from error


def open_npy(path: Path, *, ndim: int, kinds: str) -> NDArray[Any]:
    """Memory-map a .npy file for reading. Pickled objects are refused, not loaded; nothing is copied.

    Args:
        path: the file.
        ndim: dimensions that the array must have.
        kinds: numpy dtype kinds that are welcome, for example ``"iu"``.

    Raises:
        DataError: missing, not .npy, object dtype, another kind or dimension, empty, or a length that is not the header's.
    """
    size = regular_size(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header parser lets SyntaxError, TokenError, TypeError, OverflowError ... through
        raise DataError(f"{path}: not a readable .npy file ({reason(error)})") from error
    if array.dtype.kind not in kinds or array.ndim != ndim or array.size == 0:
        names = {"i": "integer", "u": "unsigned integer", "f": "float", "b": "boolean"}
        wanted = " or ".join(names[kind] for kind in kinds)
        raise DataError(f"{path}: expected {ndim} filled dimension(s) of {wanted}, got shape {array.shape} of {array.dtype}")
    if array.offset + array.nbytes != size:
        raise DataError(f"{path}: {size:,} bytes, but its header says {array.offset + array.nbytes:,}")
    return array


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; on success it becomes `path` in one step, on failure `path` stays as it was.

    The temporary file lies in the same folder (made if missing) and is fsynced before the rename.

    Raises:
        DataError: the folder or file cannot be written (read-only, disk full); names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step. Raises `DataError` when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
