"""A build after the install: asked for only, published whole, and never waiting for the dead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import pytest

from igpt_kernels._native import build, cache, load

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
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

    monkeypatch.setattr(cache, "_build_into", build_into)
    return folders


@pytest.mark.slow
def test_an_installed_package_builds_when_it_is_asked_by_name(tmp_path: Path, cache_folder: Path) -> None:
    """From a package without libraries, in a process of its own: "auto" compiles nothing, "ext" does, once."""
    package = tmp_path / "site" / "igpt_kernels"
    shutil.copytree(ROOT / "igpt_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", package / "csrc")
    code = (
        "import torch; from igpt_kernels import PaletteTable; from igpt_kernels._native import load; "
        "colors = [[0, 0, 0], [250, 250, 250]]; "
        "pixels = torch.tensor([[9, 8, 7], [255, 255, 200]], dtype=torch.uint8); "
        "assert PaletteTable(colors).lookup(pixels).tolist() == [0, 1]; assert not load.status().loaded; "
        "assert PaletteTable(colors, backend='ext').lookup(pixels).tolist() == [0, 1]; print(load.status().path)"
    )
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in cache_folder.iterdir() if path.is_dir())
    assert done.stdout.strip() == str(folder / "_C.abi3.so")
    assert {path.name for path in cache_folder.iterdir()} - {f"{folder.name}.lock"} == {folder.name, f"{folder.name}.log"}


@pytest.mark.slow
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler++")
    assert (
        cache.build_libraries(["_C.abi3.so"]) == "there is no C++ compiler 'no-such-compiler++'; install one, or name it in CXX"
    )
    monkeypatch.setenv("CXX", "/bin/false")
    problem = cache.build_libraries(["_C.abi3.so"])
    assert problem.startswith("the build failed; its output is in ")
    assert "/bin/false" in Path(problem.rpartition(" ")[2]).read_text()
    assert {path.suffix for path in cache_folder.iterdir()} <= {".log", ".lock"}  # no half of a build
    monkeypatch.setenv("IGPT_JIT", "0")
    assert cache.build_libraries(["_C.abi3.so"]) == "IGPT_JIT=0 forbids it"
    monkeypatch.delenv("IGPT_JIT")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
    assert cache.build_libraries(["_C.abi3.so"]).startswith("/proc/no-such-folder/igpt-kernels: ")


def test_other_sources_are_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = cache.folder()
    copy = tmp_path / "csrc"
    shutil.copytree(build.sources(), copy)
    monkeypatch.setattr(build, "sources", lambda: copy)
    assert cache.folder() == before
    (copy / "palette.h").write_text("changed")
    assert cache.folder() != before


def test_one_builds_and_the_others_wait(made: list[Path]) -> None:
    answers: list[str] = []
    callers = [threading.Thread(target=lambda: answers.append(cache.build_libraries(["_C.abi3.so"]))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    assert answers == [""] * 4
    assert made == [cache.folder()]


def test_a_file_that_is_wanted_now_is_built_beside_the_old_ones(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.build_libraries(["_C.abi3.so"]) == ""
    monkeypatch.setattr(cache, "_build_into", lambda target, wanted: f"asked for {len(wanted)}")
    assert cache.build_libraries(["_C.abi3.so"]) == ""
    assert cache.build_libraries(["_C.abi3.so", "_C_cuda.abi3.so"]) == "asked for 2"


@pytest.mark.parametrize("content", [b"", b"another-host 1", b"\xff\xfe"])
def test_a_lock_file_that_nobody_holds_is_free(content: bytes, made: list[Path], cache_folder: Path) -> None:
    cache_folder.mkdir()
    cache.folder().with_suffix(".lock").write_bytes(content)
    assert cache.build_libraries(["_C.abi3.so"]) == ""
    assert len(made) == 1


def test_the_lock_of_a_dead_process_is_free(made: list[Path], cache_folder: Path) -> None:
    cache_folder.mkdir()
    lock = cache.folder().with_suffix(".lock")
    code = f"import filelock, os; lock = filelock.FileLock({str(lock)!r}); lock.acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert cache.build_libraries(["_C.abi3.so"]) == ""
    assert len(made) == 1


def test_a_living_owner_is_waited_for(made: list[Path], cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_folder.mkdir()
    lock = filelock.FileLock(cache.folder().with_suffix(".lock"))
    builder = threading.Thread(target=cache.build_libraries, args=(["_C.abi3.so"],))
    with lock:
        builder.start()
        time.sleep(0.5)
        assert not made
    builder.join(timeout=30)
    assert len(made) == 1
    monkeypatch.setattr(cache, "LIMIT", 0.1)
    with lock:
        assert "another process has been building" in cache.build_libraries(["other.so"])


def test_a_failed_build_is_tried_once_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tries: list[object] = []

    def fail(wanted: Sequence[str]) -> str:
        tries.append(wanted)
        return "the compiler is on holiday"

    monkeypatch.setattr(cache, "build_libraries", fail)
    monkeypatch.setattr(load, "_LIBRARIES", {device: tmp_path / path.name for device, path in load._LIBRARIES.items()})
    monkeypatch.setattr(load, "_statuses", {})
    monkeypatch.setattr(load, "_tried_to_build", False)
    for _ in range(2):
        status = load.build()
        assert not status.loaded
        assert status.reason.endswith("(it cannot be built now: the compiler is on holiday)")
    assert len(tries) == 1
