"""Rows of a .npy file, read from the disk when they are asked for.

A memory map takes a half to an eighth of the time (128 rows of 4,096 bytes: 0.16 ms, here 0.5 ms). But with a map, a file
that becomes shorter ends the process: the system sends SIGBUS.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpt.errors import DataError
from igpt.files import describe, open_npy

_MOST_BY_COLUMNS = 1024 * 1024 * 1024


class RowFile:
    """A two-dimensional .npy file of integers. It keeps no file open, so it can be pickled and used after a fork.

    Args:
        path: the file. Column by column ("Fortran order") it is read at once, and may have up to 1 GiB.

    Attributes:
        shape: rows and columns.
        dtype: of the integers.

    Raises:
        DataError: as `igpt.files.open_npy`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, path.absolute()
        array = open_npy(path, ndim=2, kinds="iu")
        try:
            self._state = _state(os.stat(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({describe(error)})") from error
        self.shape: tuple[int, int] = array.shape
        self.dtype = array.dtype
        self._begin: int = array.offset  # type: ignore[attr-defined]
        self._whole: NDArray[Any] | None = None
        by_rows = array.flags.c_contiguous
        del array  # a map whose pages are never touched needs no memory and cannot fail
        if not by_rows:
            size = self.shape[0] * self.shape[1] * self.dtype.itemsize
            if size > _MOST_BY_COLUMNS:
                raise DataError(f"{path}: {size:,} bytes in Fortran order; save numpy.ascontiguousarray(array) instead")
            self._whole = self._read_part(0, self.shape[0]).reshape(self.shape[::-1]).T

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        """The rows at these places, as an array of its own.

        Raises:
            DataError: the file is not what it was when it was opened, or cannot be read.
        """
        if self._whole is not None:
            return self._whole[rows]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read_part(start, stop)
        found = np.empty((len(rows), self.shape[1]), dtype=self.dtype)
        with self._opened() as file:
            for place, row in enumerate(rows.tolist()):
                self._fill(file, row, found[place])
        return found

    def _read_part(self, start: int, stop: int) -> NDArray[Any]:
        found = np.empty((stop - start, self.shape[1]), dtype=self.dtype)
        with self._opened() as file:
            self._fill(file, start, found)
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        try:
            with io.FileIO(self._place, opener=_open_at_once) as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise DataError(f"{self._path}: was changed while it was in use; open it anew")
                yield file
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({describe(error)})") from error

    def _fill(self, file: io.FileIO, row: int, target: NDArray[Any]) -> None:
        file.seek(self._begin + row * self.shape[1] * self.dtype.itemsize)
        left = memoryview(target.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while len(left):
            count = file.readinto(left)
            if not count:
                raise DataError(f"{self._path}: ends before row {row} does; it became shorter while it was in use")
            left = left[count:]


def _open_at_once(path: str, flags: int) -> int:
    """Open a file for reading; a pipe that took its place is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino
