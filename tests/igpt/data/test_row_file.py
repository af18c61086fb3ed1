"""Token files that change while they are in use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from igpt.data.batches import TokenBatches
from igpt.data.open import open_source
from igpt.errors import DataError
from tests.hostile import SECONDS, at_most

ROWS = np.random.default_rng(0).integers(0, 32, (20, 16))


@pytest.mark.parametrize("change", ["shorter", "longer", "same size", "replaced", "pipe", "gone"])
def test_changed_while_in_use(tmp_path: Path, change: str) -> None:
    """A memory map of a file that became shorter would end the process (SIGBUS)."""
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((4000, 64), np.uint8))
    source = open_source(f"tokens:{path}", split="all")
    batches = TokenBatches(source, None, 4, seed=3)
    batches.batch(0)
    if change in ("replaced", "pipe", "gone"):
        path.unlink()
    if change == "shorter":
        os.truncate(path, 1000)
    elif change == "longer":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "pipe":
        os.mkfifo(path)
    elif change != "gone":
        np.save(path, np.ones((4000, 64), np.uint8))
        os.utime(path, ns=(1, 1))  # clocks of file systems tick every few milliseconds
    for read in (lambda: batches.batch(1), lambda: source.tokens([3999]), lambda: source.vocab_size):
        with at_most(SECONDS), pytest.raises(DataError, match=r"x\.npy: (was changed while it was in use|cannot be read)"):
            read()


def test_cut_between_the_check_and_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((40, 64), np.uint8))
    source = open_source(f"tokens:{path}", split="all")
    os.truncate(path, 1000)
    monkeypatch.setattr("igpt.data.row_file._state", lambda status: source._array._state)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"x\.npy: ends before row 39 does"):
        source.tokens([0, 39])


def test_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    monkeypatch.chdir(tmp_path)
    source = open_source("tokens:x.npy", split="all")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(source.tokens([3]), ROWS[[3]])


def test_large_files_by_columns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(ROWS))
    monkeypatch.setattr("igpt.data.row_file._MOST_BY_COLUMNS", 1000)
    with pytest.raises(DataError, match=r"x\.npy: 2,560 bytes in Fortran order; save numpy\.ascontiguousarray"):
        open_source(f"tokens:{tmp_path / 'x.npy'}")
