"""What the compiler makes of every shipped configuration: no spill, shared memory that is there, warpgroup MMAs on sm_90."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tools.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]


# float32 of three tables, and for two of them sizes that are not of Image GPT, are left to `make audit`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "options"),
    [
        ("sm_80", ["--bits", "16", "--models"]),
        ("sm_90", ["--bits", "16"]),
        ("sm_100", ["--bits", "16", "--models"]),
        ("default", []),
    ],
    ids=str,
)
def test_audit_finds_nothing(table: str, options: list[str]) -> None:
    """In a process of its own: the audit puts a chip that is not here in place of Triton's driver."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.audit", table, "--json", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [row for row in rows if row["problems"]] or done.stderr[-3000:]
    assert len(rows) >= 40
    assert {row["kernel"] for row in rows} == {function for kernel in KERNELS.values() for function in kernel.functions}
    if table == "sm_90":
        products = [
            row for row in rows if row["bits"] == 16 and KERNELS.get(row["kernel"], KERNELS["decode"]).kind == "product"
        ]
        assert {(row["kernel"], row["size"]) for row in products if not row["wgmma"]} <= {("sparse_backward_keys", 256)}


@pytest.mark.slow
def test_audit_sees_what_it_looks_for() -> None:
    code = """
        from tools import audit
        from igpt_kernels.tuning import Config
        spilled = audit.audit("sm_90", "flash_backward_keys", 16, 128, Config(128, 128, 8, 2))
        assert "spills" in {row.kernel: row.problems for row in spilled}["flash_backward_keys"], spilled
        large = audit.audit("default", "flash_forward", 16, 128, Config(128, 128, 8, 3))
        assert any("shared memory" in problem for problem in large[0].problems), large
        serial = audit.audit("sm_90", "flash_forward", 16, 192, Config(128, 64, 8, 2))
        assert "WGMMA serialised" in serial[0].problems, serial
        odd = audit.audit("sm_90", "rms_norm_forward", 16, 1001)
        assert all("narrow" in row.problems[0] for row in odd), odd
        crowd = audit.audit("sm_90", "rms_norm_backward", 16, 512, Config(8, 512, 4, 9))
        assert "9 programs of" in {row.kernel: row for row in crowd}["rms_norm_backward"].problems[0], crowd
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_no_pattern_and_no_size_compiles_anew() -> None:
    """Four forms of the forward kernel are all there are: with and without parts before, last or not."""
    code = """
        import torch
        from tools import audit
        from igpt_kernels import layouts
        from igpt_kernels._triton.sparse_forward import launch_sparse_forward
        seen = []
        for text, h, w in [("local2d:1+row+column", 16, 16), ("row_column", 16, 16), ("local2d:9", 20, 20), ("row", 8, 8),
                           ("strided:7", 16, 25), ("fixed:10,3+column", 40, 10), ("local2d:7&strided", 31, 33)]:
            x = torch.empty(2, h * w, 3, 4, 64, dtype=torch.bfloat16)
            q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
            with audit.compile_only(90) as compiled:
                launch_sparse_forward(q, k, v, [(layouts.parse(text, h, w).key, range(4))], scale=0.1)
            seen += [kernel.hash for _, kernel in compiled]
        assert len(seen) >= 12 and len(set(seen)) == 4, (len(seen), len(set(seen)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
