"""Every Triton kernel runs in Triton's interpreter, in a process of its own: what is decorated there stays interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = {"attention": 500, "sparse": 500, "loss": 250, "fused": 500, "tune": 1}


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
