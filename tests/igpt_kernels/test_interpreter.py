"""Every Triton kernel runs in Triton's interpreter, in a process of its own: what is decorated there stays interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {"attention": 500, "sparse": 500, "loss": 250, "fused": 500, "tune": 1, "memory": 10}
MODULES = {
    "attention": ("flash_forward", "flash_backward", "decode"),
    "sparse": ("sparse_forward", "sparse_backward", "sparse_decode"),
    "loss": ("linear_cross_entropy",),
    "fused": ("rms_norm", "quick_gelu", "rows"),
}
TRITON = ROOT / "igpt_kernels" / "_triton"


def kernels(module: str) -> set[str]:
    """The names of the kernels of a module, whose launches have their memory accesses checked one by one."""
    return set(re.findall(r"^def (_\w+_kernel)\(", (TRITON / f"{module}.py").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_kernel_belongs_to_a_room() -> None:
    listed = {module for modules in MODULES.values() for module in modules}
    assert listed == {path.stem for path in TRITON.glob("*.py") if kernels(path.stem)}


@pytest.mark.parametrize("room", CASES)
def test_kernels_in_the_interpreter(room: str) -> None:
    (file,) = (ROOT / "tests" / "interpreter").glob(f"test_{room}*.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= CASES[room]
    assert "skipped" not in done.stdout
    watched = dict(re.findall(r"^watched (\w+): (\d+) accesses$", done.stdout, re.MULTILINE))
    for name in {name for module in MODULES.get(room, ()) for name in kernels(module)}:
        assert int(watched.get(name, 0)) >= 100, f"{name} was hardly watched"
