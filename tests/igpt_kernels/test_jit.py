"""A build after the install: asked for only, published whole, and never waiting for the dead."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from igpt_kernels import _build, _ext, _jit

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("IGPT_JIT", "CXX", "IGPT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "igpt-kernels"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands for the compiler: the folders that were built."""
    folders: list[Path] = []

    def build_into(target: Path, wanted: Sequence[str]) -> str:
        time.sleep(0.3)
        target.mkdir()
        for name in wanted:
            (target / name).touch()
        folders.append(target)
        return ""

    monkeypatch.setattr(_jit, "_build_into", build_into)
    return folders


def test_an_installed_package_builds_when_it_is_asked_by_name(tmp_path: Path, cache: Path) -> None:
    """From a package without libraries, in a process of its own: "auto" compiles nothing, "ext" does, once."""
    package = tmp_path / "site" / "igpt_kernels"
    shutil.copytree(ROOT / "igpt_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", package / "csrc")
    code = (
        "import torch; from igpt_kernels import PaletteTable, _ext; colors = [[0, 0, 0], [250, 250, 250]]; "
        "pixels = torch.tensor([[9, 8, 7], [255, 255, 200]], dtype=torch.uint8); "
        "assert PaletteTable(colors).lookup(pixels).tolist() == [0, 1]; assert not _ext.status().loaded; "
        "assert PaletteTable(colors, backend='ext').lookup(pixels).tolist() == [0, 1]; print(_ext.status().path)"
    )
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert done.stdout.strip() == str(folder / "_C.abi3.so")
    assert {path.name for path in cache.iterdir()} == {folder.name, f"{folder.name}.log"}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler++")
    assert _jit.build(["_C.abi3.so"]) == "there is no C++ compiler 'no-such-compiler++'; install one, or name it in CXX"
    monkeypatch.setenv("CXX", "/bin/false")
    problem = _jit.build(["_C.abi3.so"])
    assert problem.startswith("the build failed; its output is in ")
    assert "/bin/false" in Path(problem.rpartition(" ")[2]).read_text()
    assert [path.suffix for path in cache.iterdir()] == [".log"]  # no lock, no half of a build
    monkeypatch.setenv("IGPT_JIT", "0")
    assert _jit.build(["_C.abi3.so"]) == "IGPT_JIT=0 forbids it"
    monkeypatch.delenv("IGPT_JIT")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
    assert _jit.build(["_C.abi3.so"]).startswith("/proc/no-such-folder/igpt-kernels: ")


def test_other_sources_are_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = _jit.folder()
    copy = tmp_path / "csrc"
    shutil.copytree(_build.sources(), copy)
    monkeypatch.setattr(_build, "sources", lambda: copy)
    assert _jit.folder() == before
    (copy / "palette.h").write_text("changed")
    assert _jit.folder() != before


def test_one_builds_and_the_others_wait(made: list[Path]) -> None:
    answers: list[str] = []
    callers = [threading.Thread(target=lambda: answers.append(_jit.build(["_C.abi3.so"]))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    assert answers == [""] * 4
    assert made == [_jit.folder()]


def test_a_file_that_is_wanted_now_is_built_beside_the_old_ones(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _jit.build(["_C.abi3.so"]) == ""
    monkeypatch.setattr(_jit, "_build_into", lambda target, wanted: f"asked for {len(wanted)}")
    assert _jit.build(["_C.abi3.so"]) == ""
    assert _jit.build(["_C.abi3.so", "_C_cuda.abi3.so"]) == "asked for 2"


@pytest.mark.parametrize("kind", ["dead", "empty", "old", "elsewhere", "binary"])
def test_a_stale_lock_holds_nobody(kind: str, made: list[Path], cache: Path) -> None:
    cache.mkdir()
    lock = _jit.folder().with_suffix(".lock")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    content = {
        "dead": f"{socket.gethostname()} {dead.pid}",
        "empty": "",
        "old": f"{socket.gethostname()} {os.getpid()}",
        "elsewhere": f"another-host {os.getpid()}",
        "binary": "",
    }[kind]
    lock.write_text(content)
    if kind == "binary":
        lock.write_bytes(b"\xff\xfe")
    if kind != "dead":
        age = time.time() - (10 if kind == "empty" else _jit.LIMIT + 1)
        os.utime(lock, (age, age))
    start = time.monotonic()
    assert _jit.build(["_C.abi3.so"]) == ""
    assert time.monotonic() - start < 20
    assert len(made) == 1
    assert not lock.exists()


def test_a_living_owner_is_waited_for(made: list[Path], cache: Path) -> None:
    cache.mkdir()
    lock = _jit.folder().with_suffix(".lock")
    lock.write_text(f"{socket.gethostname()} {os.getpid()}")
    builder = threading.Thread(target=_jit.build, args=(["_C.abi3.so"],))
    builder.start()
    time.sleep(0.5)
    assert not made
    lock.unlink()
    builder.join(timeout=30)
    assert len(made) == 1


def test_a_failed_build_is_tried_once_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tries: list[object] = []

    def fail(wanted: Sequence[str]) -> str:
        tries.append(wanted)
        return "the compiler is on holiday"

    monkeypatch.setattr(_jit, "build", fail)
    monkeypatch.setattr(_ext, "_LIBRARIES", {device: tmp_path / path.name for device, path in _ext._LIBRARIES.items()})
    monkeypatch.setattr(_ext, "_statuses", {})
    monkeypatch.setattr(_ext, "_tried_to_build", False)
    for _ in range(2):
        status = _ext.build()
        assert not status.loaded
        assert status.reason.endswith("(it cannot be built now: the compiler is on holiday)")
    assert len(tries) == 1
