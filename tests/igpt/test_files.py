"""Files are replaced whole or not at all, and what is said to be on the disk is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from igpt.errors import DataError
from igpt.files import atomic_path, describe, flush_to_disk, json_lines, read_json, replacing, write_durably, write_json


def test_a_durable_write_is_on_the_disk_before_it_has_its_name_and_then_the_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(handle: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def rename(source: Path, target: Path) -> None:
        done.append(f"-> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    write_durably(tmp_path / "a", b"1")
    assert done == [".tmp-a", "-> a", tmp_path.name]
    done.clear()
    write_json(tmp_path / "b", 1)
    assert done[1:] == ["-> b"]
    assert done[0].endswith("-b")


def test_two_processes_that_write_one_file_do_not_share_their_unfinished_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    with atomic_path(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with atomic_path(path) as theirs:
            assert theirs != mine
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": [1, None]})
    assert read_json(path) == {"x": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    with pytest.raises(KeyError), replacing(path):
        raise KeyError
    assert read_json(path) == {"x": [1, None]}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(DataError, match=r"a\.json.x: cannot be written \(\w+: "):
        write_json(path / "x", 1)


@pytest.mark.parametrize(
    ("number", "folder", "raised"),
    [
        (errno.EINVAL, True, False),
        (errno.ENOTSUP, True, False),
        (errno.EIO, True, True),
        (errno.EINVAL, False, True),
        (errno.EIO, False, True),
    ],
)
def test_only_a_folder_may_be_impossible_to_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder: bool, raised: bool
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    path = tmp_path if folder else tmp_path / "file"
    handles = len(os.listdir("/proc/self/fd"))
    flush_to_disk(path)
    monkeypatch.setattr(os, "fsync", refuse)
    if raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            flush_to_disk(path)
    else:
        flush_to_disk(path)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_reason_is_one_line() -> None:
    assert describe(OSError(errno.EIO, "Input\n  output")) == "OSError: Input output"
    assert describe(ValueError("a\n\tb" + "c" * 300)) == "ValueError: a b" + "c" * 197
    assert describe(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ('{"a": 1}\n', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a"', [{"a": 1}]),
        ('{"a"', []),
    ],
)
def test_only_the_last_line_may_be_cut_short(tmp_path: Path, text: str, found: list[Any]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert [row for _, row in json_lines(path)] == found
    path.write_text('{"a"\n' + text)
    if text:
        with pytest.raises(DataError, match="line 1 is not a JSON object: "):
            json_lines(path)


def test_a_number_is_wanted_in_every_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n{"b": 3}\n')
    with pytest.raises(DataError, match="line 1 is not a JSON object with a b: "):
        json_lines(path, number="b")
    path.write_text('{"b": 2.0}\n{"b": null}\n')
    assert [row for _, row in json_lines(path, number="b")] == [{"b": 2}]
