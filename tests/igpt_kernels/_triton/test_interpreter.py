"""Every Triton kernel runs in Triton's interpreter, in a process of its own: what is decorated there stays interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[3]
CASES = {
    "attention": 500, "sparse": 350, "loss": 250, "norm": 300, "activation": 250, "rows": 7, "catalogue": 40, "memory": 10
}  # fmt: skip
"""File of tests/interpreter -> the least number of tests in it."""


def test_every_test_file_is_run() -> None:
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "interpreter").glob("test_*.py")} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name: str) -> None:
    file = ROOT / "tests" / "interpreter" / f"test_{name}.py"
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
    assert int(passed.group(1)) >= CASES[name]
    assert "skipped" not in done.stdout
    watched = dict(re.findall(r"^watched _(\w+)_kernel: (\d+) accesses$", done.stdout, re.MULTILINE))
    for function in {each for kernel in KERNELS.values() if kernel.operation.name == name for each in kernel.functions}:
        assert int(watched.get(function, 0)) >= 100, f"{function} was hardly watched"


def test_every_triton_function_is_in_the_catalogue() -> None:
    """So that no kernel is left out of the audit, of tuning, of the sanitizer and of the watch over accesses."""
    folder = ROOT / "igpt_kernels" / "_triton"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    assert set(re.findall(r"^def _(\w+)_kernel\(", text, re.MULTILINE)) == {
        function for kernel in KERNELS.values() for function in (*kernel.functions, *kernel.compiled_only)
    }
