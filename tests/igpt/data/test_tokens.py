"""Token files, whole, damaged and hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt.data.batches import TokenBatches
from igpt.data.open import open_source
from igpt.data.orders import order
from igpt.data.tokens import TokenSource
from igpt.errors import CheckpointError, ConfigError, DataError
from igpt.palette.palette import Palette
from tests.hostile import SECONDS, Trap, at_most


class TestTokenFiles:
    def rows(self, n: int = 20, length: int = 16, top: int = 32) -> np.ndarray:
        return np.random.default_rng(0).integers(0, top, (n, length))

    @pytest.mark.parametrize("dtype", ["u1", "i2", "<u2", ">u2", "i4", "i8", "u8"])
    @pytest.mark.parametrize("fortran", [False, True])
    def test_reads_any_integers(self, tmp_path: Path, dtype: str, fortran: bool) -> None:
        rows = self.rows()
        np.save(tmp_path / "x.npy", np.array(rows, dtype=dtype, order="F" if fortran else "C"))
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        assert (source.kind, source.height, source.width, len(source), source.labels) == ("tokens", 4, 4, 20, None)
        assert source.vocab_size == rows.max() + 1
        found = source.tokens([3, 0, 3])
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, rows[[3, 0, 3]])
        assert isinstance(source, TokenSource)
        assert source.palette is None
        with pytest.raises(ConfigError, match="holds tokens"):
            source.images([0])

    def test_split_and_batches(self, tmp_path: Path) -> None:
        rows = np.arange(20 * 16).reshape(20, 16)
        np.save(tmp_path / "x.npy", rows)
        spec = f"tokens:{tmp_path / 'x.npy'}"
        train, val = open_source(spec, split="train", val_fraction=0.25), open_source(spec, split="val", val_fraction=0.25)
        assert (len(train), len(val)) == (15, 5)
        found = np.concatenate([train.tokens(np.arange(15)), val.tokens(np.arange(5))])
        np.testing.assert_array_equal(np.sort(found[:, 0]), rows[:, 0])
        batches = TokenBatches(train, None, 4, seed=3)
        assert torch.equal(batches.batch(9), torch.from_numpy(train.tokens(order(15, 3, 36, 4))))
        assert torch.equal(batches.at([1]), torch.from_numpy(train.tokens([1])))

    def test_reads_only_the_rows_asked_for(self, tmp_path: Path) -> None:
        with (tmp_path / "x.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**13)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2**33)  # 8 GiB that take no space on the disk
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="train", height=64, width=128)
        assert source.tokens([len(source) - 1]).shape == (1, 2**13)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB

    def test_size(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", self.rows(length=12))
        spec = f"tokens:{tmp_path / 'x.npy'}"
        with pytest.raises(ConfigError, match="12 tokens a row"):
            open_source(spec)
        with pytest.raises(ConfigError, match="not 4 x 4"):
            open_source(spec, height=4, width=4)
        source = open_source(spec, height=2, width=6)
        assert (source.height, source.width) == (2, 6)

    def test_tokens_beyond_the_palette(self, tmp_path: Path) -> None:
        rows = self.rows(top=16)
        rows[17, 5] = 40
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        batches = TokenBatches(source, Palette.uniform(27), 20)
        with pytest.raises(DataError, match=r"row 17 holds token 40, expected 0\.\.26"):
            batches.batch(0)
        assert batches.at([16]).shape == (1, 16)
        rows[17, 5] = -1
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        for read in (lambda: source.tokens([17]), lambda: source.vocab_size):
            with pytest.raises(DataError, match="row 17 holds token -1"):
                read()

    def test_row_numbers_are_those_of_the_file(self, tmp_path: Path) -> None:
        rows = np.zeros((20, 16), np.int64)
        rows[:, 0] = np.arange(20) + 100
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="val", val_fraction=0.2)
        (tmp_path / "x.json").write_text(json.dumps({"height": 4, "width": 4, "vocab": 30}))
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="val", val_fraction=0.2)
        with pytest.raises(DataError) as caught:
            source.tokens([0])
        row = int(str(caught.value).partition("row ")[2].partition(" ")[0])
        assert f"holds token {row + 100}," in str(caught.value)

    @pytest.mark.parametrize(
        ("sidecar", "text"),
        [
            ("[]", "expected an object"),
            ("{", "not readable as JSON"),
            ('{"height": 4, "width": 4}', "vocab must be"),
            ('{"height": 4.0, "width": 4, "vocab": 9}', "height must be"),
            ('{"height": true, "width": 16, "vocab": 9}', "height must be"),
            ('{"height": 5, "width": 4, "vocab": 32}', "does not fit"),
            ('{"height": 4, "width": 4, "vocab": 99999}', "vocab must be"),
            ('{"height": 4, "width": 4, "vocab": 32, "classes": 3}', "classes must be"),
            ("\xff", "not readable as JSON"),
        ],
    )
    def test_malformed_sidecar(self, tmp_path: Path, sidecar: str, text: str) -> None:
        np.save(tmp_path / "x.npy", self.rows())
        (tmp_path / "x.json").write_bytes(sidecar.encode("latin-1"))
        with pytest.raises(DataError, match=text) as caught:
            open_source(f"tokens:{tmp_path / 'x.npy'}")
        assert str(tmp_path / "x.json") in str(caught.value)

    @pytest.mark.parametrize(
        "labels", [np.zeros(19, int), np.zeros((20, 1), int), np.full(20, -1), np.zeros(20), np.full(20, 2)]
    )
    def test_malformed_labels(self, tmp_path: Path, labels: np.ndarray) -> None:
        np.save(tmp_path / "x.npy", self.rows())
        (tmp_path / "x.json").write_text(json.dumps({"height": 4, "width": 4, "vocab": 32, "classes": ["a", "b"]}))
        np.save(tmp_path / "x.labels.npy", labels)
        with pytest.raises(DataError, match=r"x\.labels\.npy"):
            open_source(f"tokens:{tmp_path / 'x.npy'}")


def bad_arrays(trap: Path) -> dict[str, bytes]:
    def saved(array: np.ndarray, allow_pickle: bool = False) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=allow_pickle)
        return buffer.getvalue()

    def headed(text: str, body: bytes = bytes(64)) -> bytes:
        head = text.encode("latin-1") + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body

    good = saved(np.zeros((4, 16), np.uint8))
    zipped = io.BytesIO()
    np.savez(zipped, np.zeros((4, 16), np.uint8))
    cases = {
        "floats": saved(np.zeros((4, 16))),
        "halves": saved(np.zeros((4, 16), np.float16)),
        "booleans": saved(np.zeros((4, 16), bool)),
        "complex": saved(np.zeros((4, 16), complex)),
        "text": saved(np.full((4, 16), "a")),
        "dates": saved(np.zeros((4, 16), "M8[s]")),
        "records": saved(np.zeros((4, 16), [("a", "u1")])),
        "one dimension": saved(np.zeros(16, np.uint8)),
        "three dimensions": saved(np.zeros((4, 4, 4), np.uint8)),
        "no dimension": saved(np.array(3, np.uint8)),
        "no rows": saved(np.zeros((0, 16), np.uint8)),
        "no columns": saved(np.zeros((4, 0), np.uint8)),
        "objects": saved(np.array([[Trap(trap)] * 16] * 4, dtype=object), True),
        "pickle": pickle.dumps(Trap(trap)),
        "archive": zipped.getvalue(),
        "longer": good + b"\0",
        "header of 4 GB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 100,
        "header below zero": b"\x93NUMPY\x01\x00" + struct.pack("<h", -1) + good[10:],
        "later version": good[:6] + b"\x09\x00" + good[8:],
        "header that calls": headed("{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (4, 16)}"),
        "header of another kind": headed("[1, 2]"),
        "header that is no text": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16"),
        "keys missing": headed("{'descr': '|u1', 'shape': (4, 16)}"),
        "unknown type": headed("{'descr': '|q9', 'fortran_order': False, 'shape': (4, 16)}"),
        "object type": headed("{'descr': '|O', 'fortran_order': False, 'shape': (4, 16)}"),
        "huge shape": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 16)}"),
        "overflowing shape": headed("{'descr': '<u8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}"),
        "negative shape": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -16)}"),
        "fractions": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4.0, 16)}"),
        "deep": headed("(" * 5000 + ")" * 5000),
        "long header": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16)}" + " " * 60000),
        "not an array": b"height,width\n4,16\n",
        "empty": b"",
    }
    return cases | {f"first {n} bytes": good[:n] for n in (1, 6, 8, 9, 10, 60, 127, 128, 150, len(good) - 1)}


@pytest.mark.parametrize("name", bad_arrays(Path()))
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_malformed_arrays(name: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "x.npy"
    path.write_bytes(bad_arrays(trap)[name])
    with at_most(SECONDS), pytest.raises(DataError) as tokens:
        open_source(f"tokens:{path}", height=4, width=4)
    with at_most(SECONDS), pytest.raises(CheckpointError) as palette:
        Palette.from_pretrained(path)
    for caught in (tokens, palette):
        assert str(path) in str(caught.value)
    assert not trap.exists()


def test_array_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with at_most(SECONDS), pytest.raises(DataError, match="not a plain file"):
        open_source(f"tokens:{tmp_path / 'x.npy'}")
    np.save(tmp_path / "y.npy", np.zeros((4, 16), np.uint8))
    for name in ("y.json", "y.labels.npy"):
        os.mkfifo(tmp_path / name)
        with at_most(SECONDS), pytest.raises(DataError, match=rf"{name}: not a plain file"):
            open_source(f"tokens:{tmp_path / 'y.npy'}")
        (tmp_path / name).unlink()
