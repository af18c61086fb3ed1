"""Building from a bare source tree: with a compiler, with a broken one, and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a build needs, and nothing that was built."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "csrc", target / "csrc")
    shutil.copytree(ROOT / "igpt_kernels", target / "igpt_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "IGPT_REQUIRE_EXT")}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env={**clean, **environment}, capture_output=True, text=True, timeout=300)


def _sentence(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("igpt-kernels: the compiled extension was not built (")]
    assert len(lines) == 1, output
    return lines[0]


def test_a_broken_compiler_leaves_a_pure_wheel(tree: Path) -> None:
    stale = tree / "build" / "lib.stale" / "igpt_kernels" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    done = _setup(tree, "build_ext", "--build-lib", "build/lib.stale", "bdist_wheel", CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/bin/false" in _sentence(done.stdout)
    assert not stale.exists()
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "igpt_kernels/palette.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_an_absent_compiler_is_named(tree: Path) -> None:
    done = _setup(tree, "build_ext", "--inplace", CXX="no-such-compiler++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no C++ compiler 'no-such-compiler++'; install one, or name it in CXX" in _sentence(done.stdout)


def test_a_required_extension_fails_the_build(tree: Path) -> None:
    done = _setup(tree, "build_ext", "--inplace", CXX="/bin/false", IGPT_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "/bin/false" in done.stderr


@pytest.mark.parametrize("required", [False, True])
def test_without_torch(tree: Path, tmp_path: Path, required: bool) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {"PYTHONPATH": str(tmp_path), **({"IGPT_REQUIRE_EXT": "1"} if required else {})}
    done = _setup(tree, "build", **environment)
    assert (done.returncode != 0) == required, done.stdout + done.stderr
    assert "torch cannot be imported: no torch here; install torch first" in _sentence(done.stdout + done.stderr)


def test_a_compiler_gives_one_wheel_for_all_pythons(tree: Path) -> None:
    """The whole way of a user: build in place from a bare tree, load, look up; then the wheel of the same build."""
    done = _setup(tree, "build_ext", "--inplace", "bdist_wheel", IGPT_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    assert "igpt_kernels/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()
    code = (
        "import torch, igpt_kernels; table = igpt_kernels.PaletteTable([[0, 0, 0], [250, 250, 250]], backend='ext'); "
        "assert table.lookup(torch.tensor([[9, 8, 7], [255, 255, 200]], dtype=torch.uint8)).tolist() == [0, 1]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True)
