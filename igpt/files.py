"""Safe reading of untrusted files, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The largest palette, 65,536 colours at full precision and one number a line, is 7 MB.
MAX_JSON_BYTES = 32 * 1024 * 1024


def regular_size(path: Path) -> int:
    """Bytes in `path`. Raises `DataError` unless it is a plain file: opening a pipe or a device could block for ever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({describe(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a plain file")
    return status.st_size


def describe(error: BaseException) -> str:
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
        raise DataError(f"{path}: not readable as JSON ({describe(error)})") from error


def open_npy(path: Path, *, ndim: int, kinds: str) -> NDArray[Any]:
    """Memory-map a .npy file for reading. Pickled objects are refused, not loaded; nothing is copied.

    Args:
        path: the file.
        ndim: dimensions that the array must have.
        kinds: numpy dtype kinds that are welcome, for example ``"iu"``.

    Raises:
        DataError: missing, not .npy, object dtype, another kind or dimension, empty, or a length that is not the header's.
    """
    import numpy as np

    size = regular_size(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header parser lets SyntaxError, TokenError, TypeError, OverflowError ... through
        raise DataError(f"{path}: not a readable .npy file ({describe(error)})") from error
    if array.dtype.kind not in kinds or array.ndim != ndim or array.size == 0:
        names = {"i": "integer", "u": "unsigned integer", "f": "float", "b": "boolean"}
        wanted = " or ".join(names[kind] for kind in kinds)
        raise DataError(f"{path}: expected {ndim} filled dimension(s) of {wanted}, got shape {array.shape} of {array.dtype}")
    if array.offset + array.nbytes != size:
        raise DataError(f"{path}: {size:,} bytes, but its header says {array.offset + array.nbytes:,}")
    return array


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of `path`. On success it becomes `path` in one step; on failure `path` stays as it was.

    Args:
        path: the file to write, in a folder that exists.
        durable: also flush the folder, so that the rename outlives a power failure. The caller alone writes into the folder:
            the temporary name is the same in every process, so that the next write replaces what a killed one left.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    temporary = path.with_name(TEMPORARY + ("" if durable else f"{os.getpid()}-") + path.name)
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


TEMPORARY = ".tmp-"
"""How the names of unfinished files and folders begin."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`atomic_path` with an error for users; the folder is made if it is missing.

    Raises:
        DataError: the folder or file cannot be written (read-only, disk full); names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({describe(error)})") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step. Raises `DataError` when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves the old content or the new, never a part: temporary file, fsync, rename.

    For a folder that the caller alone writes into. A killed write leaves ``.tmp-NAME``; the next write of NAME replaces it.
    """
    with atomic_path(path, durable=True) as temporary:
        temporary.write_bytes(data)


def json_lines(path: Path, *, number: str | None = None) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of JSON objects, each with its bytes; a last line that a crash cut short is left out.

    Args:
        path: the file.
        number: a key whose value must be a number in every line, for example ``"step"``.

    Raises:
        DataError: a line before the last is no such object; names it.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for place, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line).items())
            if number is not None:
                row[number] = int(row[number])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            if place == len(lines):
                break
            wanted = "a JSON object" + ("" if number is None else f" with a {number}")
            raise DataError(f"{path} line {place} is not {wanted}: {line.decode('utf-8', 'replace')[:80]!r}") from error
        found.append((line, row))
    return found


def flush_to_disk(path: Path) -> None:
    """fsync a file or, where the system can, a folder (its entries: that is what makes a rename last)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder, and say so with EINVAL.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
