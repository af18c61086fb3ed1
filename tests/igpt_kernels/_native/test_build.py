"""Building from a bare source tree and after an install: with tools, with broken ones, and without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from igpt_kernels._native import build

ROOT = Path(__file__).parents[3]
VARIABLES = ("CXX", "IGPT_REQUIRE_EXT", "IGPT_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "IGPT_JIT")
LOOK_UP = (
    "import torch, igpt_kernels; table = igpt_kernels.PaletteTable([[0, 0, 0], [250, 250, 250]], backend='ext'); "
    "assert table.lookup(torch.tensor([[9, 8, 7], [255, 255, 200]], dtype=torch.uint8)).tolist() == [0, 1]; "
    "print(igpt_kernels.__file__)"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a build needs, and nothing that was built."""
    target = tmp_path / "source"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "csrc", target / "csrc")
    for package in ("igpt", "igpt_kernels"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env={**clean, **environment}, capture_output=True, text=True, timeout=300)


def _sentence(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("igpt-kernels: the compiled extension was not built (")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_absent_compiler_is_named(tree: Path) -> None:
    done = _setup(tree, "build_ext", "--inplace", CXX="no-such-compiler++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no C++ compiler 'no-such-compiler++'; install one, or name it in CXX" in _sentence(done.stdout)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(bool(build.toolkit().reason), reason=f"no CUDA toolkit: {build.toolkit().reason}")
def test_one_wheel_for_all_pythons_and_torches(tree: Path, tmp_path: Path) -> None:
    """The whole way of a user, CUDA library included: build in place, a wheel, a fresh environment, an answer.

    By its symbols each library loads in torch 2.10 and every later one, and asks for no CUDA library of any version.
    """
    done = _setup(tree, "build_ext", "--inplace", "bdist_wheel", IGPT_REQUIRE_EXT="1", IGPT_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("-gencode") == 0 or "arch=compute_120,code=compute_120" in done.stdout
    (wheel,) = (tree / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"igpt_kernels/_C.abi3.so", "igpt_kernels/_C_cuda.abi3.so", "igpt_kernels/csrc/palette.cu"} <= set(names)

    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # the same torch, and nothing else of ours
    pip = [sys.executable, "-m", "pip", "--python", fresh / "bin" / "python", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, wheel], cwd=tmp_path, check=True)
    code = LOOK_UP + (
        "; from igpt_kernels._native import load; torch.ops.load_library(load._LIBRARIES['cuda']); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "assert all(has(f'igpt_kernels::{name}', 'CUDA') for name in load._OPERATORS['cuda'])"
    )
    command = [fresh / "bin" / "python", "-c", code]
    found = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(site))
    told = subprocess.run([fresh / "bin" / "igpt", "info"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert f"extension     cpu: loaded: {site / 'igpt_kernels' / '_C.abi3.so'}" in told

    for library in site.glob("igpt_kernels/*.so"):
        needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
        assert not re.search(r"NEEDED.*(cuda|torch_python|libpython)", needed)
        if sys.version_info >= (3, 11):
            command = [Path(sys.executable).with_name("torch-abi-audit"), "--json", library]
            audit = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            (found_torch,) = (part["torch"] for part in audit["bundled_libs"])
            assert found_torch["stable"]
            assert found_torch["min_torch_version"] == "2.10.0"
            assert not found_torch["unknown_shim_symbols"]


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a toolkit of a given version, reached through a wrapper in PATH that lies elsewhere."""

    def make(release: str = "13.0", known: str = "compute_80 compute_120", cudart: bool = True) -> Path:
        root, wrapper = tmp_path / "toolkit", tmp_path / "bin" / "nvcc"
        for folder in (root / "bin", root / "lib64", wrapper.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if cudart:
            (root / "lib64" / "libcudart_static.a").touch()
        real = root / "bin" / "nvcc"
        real.write_text(
            f'#!/bin/sh\ncase $1 in --version) echo "release {release}, V{release}.88";; '
            f'--dryrun) echo "#$ TOP={root}/bin/.." >&2;; --list-gpu-arch) echo {known};; esac\n'
        )
        wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        real.chmod(0o755)
        wrapper.chmod(0o755)
        return root

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return make


class _Torch:
    """As much of torch as decides whether a CUDA library is built."""

    __version__ = "2.11.0"

    def __init__(self, cuda: str | None) -> None:
        self.version = SimpleNamespace(cuda=cuda)


def test_a_toolkit_is_found_through_a_wrapper(fake_nvcc: Callable[..., Path]) -> None:
    root = fake_nvcc()
    assert build.cuda(_Torch("13.0")) == build.Tool(str(root), "13.0")
    assert build.cuda(_Torch("13.2")).version == "13.0"
    assert build.architectures(build.toolkit()) == ("8.0", "12.0+PTX")
    fake_nvcc(known="compute_80 compute_90")
    assert build.architectures(build.toolkit()) == ("8.0", "9.0+PTX")


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "options", "words"),
    [
        ("auto", None, {}, r"torch 2.11.0 has no CUDA; IGPT_CUDA=1 builds for other machines"),
        (
            "auto",
            "12.6",
            {},
            r"nvcc is of CUDA 13.0, and torch 2.11.0 of CUDA 12.6; the major versions must be equal: install CUDA 12",
        ),
        ("1", "12.6", {}, r"the major versions must be equal"),
        ("1", None, {"known": "compute_70"}, r"nvcc 13.0 knows none of the architectures 8.0, 9.0, .* it is too old"),
        ("1", None, {"cudart": False}, r"has no libcudart_static.a; install its development files"),
        ("1", None, {"release": "unknown"}, r"does not answer as nvcc does"),
        ("0", "13.0", {}, "IGPT_CUDA=0"),
        ("yes", "13.0", {}, "IGPT_CUDA must be auto, 0 or 1; got 'yes'"),
    ],
)
def test_why_there_is_no_cuda_library(
    fake_nvcc: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    wish: str,
    torch_cuda: str | None,
    options: dict[str, Any],
    words: str,
) -> None:
    fake_nvcc(**options)
    monkeypatch.setenv("IGPT_CUDA", wish)
    assert re.search(words, build.cuda(_Torch(torch_cuda)).reason)


def test_no_nvcc_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.toolkit().reason == (
        f"there is no nvcc in CUDA_HOME={tmp_path}; install a CUDA toolkit, or name it in CUDA_HOME"
    )


@pytest.mark.slow
def test_a_broken_nvcc_leaves_the_cpu_library(tree: Path, fake_nvcc: Callable[..., Path], tmp_path: Path) -> None:
    """The fake compiles nothing and says it did: the link fails, and only the CUDA library is left out."""
    fake_nvcc()
    done = _setup(tree, "build_ext", "--inplace", IGPT_CUDA="1", CUDA_HOME=str(tmp_path / "toolkit"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "igpt-kernels: the CUDA library was not built (" in done.stdout
    assert "the compiled extension was not built" not in done.stdout
    assert [path.name for path in (tree / "igpt_kernels").glob("*.so")] == ["_C.abi3.so"]
    required = _setup(tree, "build_ext", "--inplace", IGPT_CUDA="1", IGPT_REQUIRE_EXT="1", CUDA_HOME=str(tmp_path / "none"))
    assert required.returncode != 0
    assert "IGPT_CUDA and IGPT_REQUIRE_EXT=1 ask for the CUDA library" in required.stderr
