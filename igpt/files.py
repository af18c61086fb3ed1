"""Safe reading of untrusted files, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from igpt.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The largest palette, 65,536 colours at full precision and one number a line, is 7 MB.
MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_LINE_BYTES = 64 * 1024
"""Of a file of JSON lines."""
_LONG_NAME = 100  # bytes; temporary names hold a digest instead, because file systems allow 143 to 255
_MAX_LINKS = 40  # as Linux follows


def regular_size(path: Path) -> int:
    """Bytes in `path`. Raises `DataError` unless it is a plain file: opening a pipe or a device could block for ever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({describe(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a plain file")
    return status.st_size


def open_plain(path: Path) -> IO[bytes]:
    """Open a plain file for reading. What turns out to be a pipe, a device or a folder is refused and never waited for.

    Raises:
        DataError: it cannot be opened, or is no plain file; names it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({describe(error)})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError(f"{path}: not a plain file")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """What a plain file of at most `limit` bytes holds.

    Raises:
        DataError: as `open_plain`; a longer file.
    """
    with open_plain(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({describe(error)})") from error
        if len(data) > limit:
            raise DataError(f"{path}: {max(os.fstat(file.fileno()).st_size, len(data)):,} bytes, expected at most {limit:,}")
    return data


def reason(error: BaseException) -> str:
    """What an error says, in a few words on one line, and what to do where that is plain."""
    if isinstance(error, OSError) and error.strerror is not None:
        advice = ": name a place elsewhere" if error.errno == errno.EROFS else ""
        return " ".join(error.strerror.split()) + advice
    return " ".join(str(error).split())[:200]


def describe(error: BaseException) -> str:
    """The kind of an error and its `reason`, for the end of a message."""
    text, name = reason(error), type(error).__name__
    return f"{name}: {text}" if text else name


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES, strict: bool = False) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Args:
        path: the file.
        limit: bytes.
        strict: also refuse what JSON does not know or leaves open: NaN, infinities, numbers beyond floats, a key given twice.

    Raises:
        DataError: no such file, a longer one, or one that holds something else; names it.
    """
    data = read_bytes(path, limit)
    try:
        if not strict:
            return json.loads(data)
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({describe(error)})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:40]!r} is given twice")
        found[name] = value
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


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


TEMPORARY = ".tmp-"
"""How the names of unfinished files and folders begin."""


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of `path`. On success it becomes `path` in one step; on failure `path` stays as it was.

    Where `path` is a link, the file that it points to is replaced and the link stays.

    Args:
        path: the file to write, in a folder that exists.
        durable: also flush the folder, so that the rename outlives a power failure. The caller alone writes into the folder:
            the temporary name is the same in every process, so that the next write replaces what a killed one left. A link
            is replaced itself: nothing outside the folder is written.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    target = path if durable else link_target(path)
    name = target.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    temporary = target.with_name(TEMPORARY + ("" if durable else f"{os.getpid()}-") + name)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()  # a link of that name would be followed
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, target)
        if durable:
            flush_to_disk(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def link_target(path: Path) -> Path:
    """Where a link leads in the end, whether something is there or not; `path` itself when it is no link.

    Raises:
        OSError: the link leads to itself.
    """
    for _ in range(_MAX_LINKS):
        if not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing. `Path.mkdir` recurses, and ends at a thousand levels.

    Raises:
        OSError: one cannot be made.
    """
    missing = list(itertools.takewhile(lambda each: not each.is_dir(), (path, *path.parents)))
    for each in reversed(missing):
        each.mkdir(exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`atomic_path` with an error for users; the folder is made if it is missing.

    Raises:
        DataError: the folder or file cannot be written (read-only, disk full); names the file.
    """
    try:
        make_folder(link_target(path).parent)
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({describe(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, replacing `path` in one step; what UTF-8 lacks is spelled out. `DataError` as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, replacing `path` in one step. Raises `DataError` when it cannot be written."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves the old content or the new, never a part: temporary file, fsync, rename.

    For a folder that the caller alone writes into. A killed write leaves ``.tmp-NAME``; the next write of NAME replaces it.
    """
    with atomic_path(path, durable=True) as temporary:
        temporary.write_bytes(data)


def json_lines(path: Path, *, number: str | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of JSON objects, each with its bytes; a last line that a crash cut short is left out.

    Args:
        path: the file. One line at a time is in memory.
        number: a key whose value must be a number of 64 bits in every line, for example ``"step"``; it becomes an int.

    Raises:
        DataError: the file cannot be opened; a line before the last is no such object: names it.
        OSError: the file cannot be read.
    """
    wanted = "a JSON object" + ("" if number is None else f" with a {number}")
    with open_plain(path) as file:
        wrong: DataError | None = None
        for place in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            if wrong is not None:
                raise wrong
            try:
                row = dict(json.loads(line).items())
                if number is not None:
                    row[number] = _integer(row[number])
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                wrong = DataError(f"{path} line {place} is not {wanted}: {line.decode('utf-8', 'replace')[:80]!r}")
            else:
                yield line, row


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**63) <= value < 2**63:
        raise ValueError
    return int(value)


def flush_to_disk(path: Path) -> None:
    """fsync a file or, where the system can, a folder (its entries: that is what makes a rename last)."""
    posix = os.name == "posix"
    if path.is_dir() and not posix:
        return
    handle = os.open(path, os.O_RDONLY if posix else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder, and say so with EINVAL.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
