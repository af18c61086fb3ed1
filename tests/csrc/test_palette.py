"""The C++ by itself: fuzzed under sanitizers, GPU code included, and what nvcc makes of the GPU code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from igpt_kernels._native import build

ROOT = Path(__file__).resolve().parents[2]
NO_TOOLKIT = build.toolkit().reason
needs_nvcc = pytest.mark.skipif(bool(NO_TOOLKIT), reason=f"no CUDA toolkit: {NO_TOOLKIT}")


@pytest.mark.slow
def test_fuzz(tmp_path: Path) -> None:
    """Random cases under AddressSanitizer and UndefinedBehaviorSanitizer for some seconds; `make soak` takes minutes."""
    program = tmp_path / "fuzz"
    subprocess.run(["make", "--no-print-directory", "-C", ROOT, f"FUZZ={program}", program], check=True)
    done = subprocess.run([program, "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) >= 10


@needs_nvcc
@pytest.mark.slow
def test_every_chip_has_wide_loads_and_no_spill() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.audit_cuda", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["chip"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert len(rows) == 4 * (1 + 3 * 4 + 5)
    (row,) = (row for row in rows if row["chip"] == "sm_90" and row["kernel"] == "lookup packed uint16")
    assert (row["wide_loads"], row["wide_stores"]) == (3, 2)


@needs_nvcc
@pytest.mark.slow
def test_the_audit_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import audit_cuda

    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    header = copy / "palette_device.h"
    text = header.read_text()
    text = text.replace("  if (misalignment(bytes, 16) == 0) {", "  if (false) {")
    text = text.replace("if (misalignment(to, 16) == 0) {", "if (false) {")
    header.write_text(
        text.replace("        if (i < length - begin)\n", "").replace(
            "i < kUnit; ++i)\n      for (int channel", "i < length - begin; ++i)\n      for (int channel"
        )
    )
    monkeypatch.setattr(build, "sources", lambda: copy)
    monkeypatch.setattr(build, "NVCC_FLAGS", tuple(flag for flag in build.NVCC_FLAGS if flag != "-fmad=false"))
    rows = audit_cuda.audit("90", audit_cuda.compile_for("90", build.toolkit(), tmp_path))
    problems = {row.kernel: row.problems for row in rows}
    assert problems["table"] == ("fused multiply-add",)
    assert problems["lookup packed int32"] == ("0 loads of 16 bytes, 3 wanted", "0 stores of 16 bytes, 4 wanted")
    assert "spills" in problems["decode int64"]
    assert problems["lookup strided int64"] == ()
