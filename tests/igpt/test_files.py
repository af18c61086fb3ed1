"""Files are replaced whole or not at all, and what is said to be on the disk is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from igpt.errors import DataError
from igpt.files import (
    atomic_path,
    describe,
    flush_to_disk,
    json_lines,
    link_target,
    make_folder,
    open_npy,
    open_plain,
    read_bytes,
    read_json,
    reason,
    replacing,
    write_durably,
    write_json,
    write_text,
)
from tests.hostile import SECONDS, SPOILED, at_most, deep_folder, spoil


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
            list(json_lines(path))


def test_a_number_is_wanted_in_every_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n{"b": 3}\n')
    with pytest.raises(DataError, match="line 1 is not a JSON object with a b: "):
        list(json_lines(path, number="b"))
    path.write_text('{"b": 2.0}\n{"b": null}\n')
    assert [row for _, row in json_lines(path, number="b")] == [{"b": 2}]


READERS: dict[str, Any] = {
    "json": read_json,
    "strict json": lambda path: read_json(path, limit=1000, strict=True),
    "bytes": lambda path: read_bytes(path, 10),
    "lines": lambda path: [row["step"] for _, row in json_lines(path, number="step")],
    "npy": lambda path: open_npy(path, ndim=1, kinds="f"),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("reader", READERS)
def test_whatever_stands_there_is_one_error_in_bounded_time(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "x"
    spoil(path, kind)
    if (reader, kind) in {("bytes", "empty"), ("bytes", "no text")} or (reader == "lines" and kind in ("empty", "huge number")):
        READERS[reader](path)  # nothing is wrong with it, or only with a last line
        return
    if reader == "lines" and kind == "no text":
        assert READERS[reader](path) == []
        return
    with at_most(SECONDS), pytest.raises(DataError, match=str(path)) as raised:
        READERS[reader](path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' is given twice"),
        ('[{"a": {"b": 1, "b": 2}}]', "the key 'b' is given twice"),
        ("NaN", "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ("1e400", "1e400 is too large a number"),
        ("-1e400", "-1e400 is too large a number"),
    ],
)
def test_strict_json(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    read_json(path)
    with pytest.raises(DataError, match=words):
        read_json(path, strict=True)
    path.write_text('{"a": [1, 1e300, null]}')
    assert read_json(path, strict=True) == {"a": [1, 1e300, None]}


def test_many_keys_are_compared_quickly(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{" + ",".join(f'"{number}":0' for number in range(10**5)) + ',"99999":1}')
    with at_most(SECONDS), pytest.raises(DataError, match="'99999' is given twice"):
        read_json(path, strict=True)


def test_a_link_is_written_through_and_a_durable_one_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to("there/target")
    assert link_target(link) == target
    write_text(link, "new \udcff")
    assert link.is_symlink()
    assert target.read_text() == "new \\udcff"
    write_durably(link, b"mine")
    assert not link.is_symlink()
    assert target.read_text() == "new \\udcff"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DataError, match="symbolic links"):
        write_json(tmp_path / "a", 1)


def test_a_link_with_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in (".tmp-x", f".tmp-{os.getpid()}-x"):
        (tmp_path / name).symlink_to("precious")
    write_durably(tmp_path / "x", b"1")
    write_json(tmp_path / "x", 2)
    assert (tmp_path / "precious").read_text() == "precious"
    assert read_json(tmp_path / "x") == 2


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "漢" * 85])
def test_names_as_long_as_file_systems_take(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, 1)
    write_durably(tmp_path / name, b"2")
    assert read_json(tmp_path / name) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_are_made_at_any_depth(tmp_path: Path) -> None:
    with deep_folder(tmp_path, 1100) as deep:
        make_folder(tmp_path / deep)
        make_folder(tmp_path / deep)
        assert (tmp_path / deep).is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(FileExistsError):
            make_folder(path)


def test_what_is_opened_is_closed_when_it_is_refused(tmp_path: Path) -> None:
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="not a plain file"):
        open_plain(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_read_only_disk_comes_with_advice() -> None:
    assert reason(OSError(errno.EROFS, "Read-only file system")) == "Read-only file system: name a place elsewhere"
    assert reason(OSError("odd")) == "odd"
    assert describe(OSError(errno.EROFS, "x")) == "OSError: x: name a place elsewhere"
