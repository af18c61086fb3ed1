"""Configurations: every shipped one is found, valid, and compiles into a kernel without spills."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from igpt_kernels import tuning

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))
PRODUCTS = {f"{kind}_{way}" for kind in ("flash", "sparse") for way in ("forward", "backward_keys", "backward_queries")}
LOSS = {"cross_entropy_forward", "cross_entropy_backward"}
MOVERS = {"rms_norm_forward", "rms_norm_backward", "quick_gelu_forward", "quick_gelu_backward"}
KERNELS = sorted({*PRODUCTS, *LOSS, *MOVERS, "decode", "sparse_decode"})


def test_families_have_tables() -> None:
    assert {"sm_80", "sm_90", "sm_100", "default"} <= set(TABLES)
    assert set(tuning.FAMILIES.values()) <= set(TABLES)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_size_has_a_configuration(table: str, kernel: str) -> None:
    configs = tuning.table(table)
    assert set(configs) == set(KERNELS)
    largest = 8192 if kernel in LOSS | MOVERS else 256
    for bits in (16, 32):
        for size in range(1, largest + 1):
            tuning.nearest(configs, kernel, bits, size)
    with pytest.raises(ValueError, match=f"head_dim {largest + 1}"):
        tuning.nearest(configs, kernel, 16, largest + 1)


def test_the_smallest_entry_that_fits_is_taken() -> None:
    small, large = tuning.Config(16, 16, 4, 1), tuning.Config(32, 32, 4, 1)
    configs = {"k": {"16": {"64": small, "128": large}}}
    assert [tuning.nearest(configs, "k", 16, d) for d in (1, 64, 65, 128)] == [small, small, large, large]
    assert tuning.lookup("decode", dtype=torch.float16, head_dim=64, device=torch.device("cpu")) == tuning.nearest(
        tuning.table("default"), "decode", 16, 64
    )


def test_entries_that_a_device_timed_are_entries() -> None:
    assert tuning.measured("default") == {}
    for table in TABLES:
        for kernel, sizes in tuning.measured(table).items():
            assert sizes <= {int(size) for size in tuning.table(table)[kernel]["16"]}
    assert tuning.table("sm_90")["flash_forward"]["16"]["96"].options == {"num_warps": 8, "num_stages": 3, "maxnreg": 128}


def test_bad_tables_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "odd.json").write_text(json.dumps({"kernels": {"k": {"16": {"64": [48, 64, 4, 1]}}}}))
    with pytest.raises(ValueError, match=r"block_m must be a power of two.*48"):
        tuning.table("odd")
    (tmp_path / "short.json").write_text(json.dumps({"kernels": {"k": {"16": {"64": [64, 64]}}}}))
    with pytest.raises(ValueError, match=r"short\.json"):
        tuning.table("short")


def test_a_device_takes_its_own_table_then_its_family_then_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for capability, name in (((9, 0), "sm_90"), ((8, 9), "default"), ((10, 3), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        tuning.table_for.cache_clear()
        assert tuning.table_for(torch.device("cuda:0")) == name
    (tmp_path / "nvidia-h200.json").write_text("{}")
    tuning.table_for.cache_clear()
    assert tuning.table_for(torch.device("cuda:0")) == "nvidia-h200"
    tuning.table_for.cache_clear()


@pytest.mark.parametrize("table", ["sm_80", "sm_90", "sm_100", "default"])
def test_audit_finds_nothing(table: str) -> None:
    """In a process of its own: the audit puts a chip that is not here in place of Triton's driver."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit", table, "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [row for row in rows if row["problems"]] or done.stderr[-3000:]
    assert len(rows) >= 100
    assert {row["kernel"] for row in rows} == {*KERNELS, "decode_merge", "quick_gelu_flat", "sum_partials"}
    if table == "sm_90":
        products = [row for row in rows if row["bits"] == 16 and row["kernel"] in PRODUCTS | LOSS]
        assert {(row["kernel"], row["size"]) for row in products if not row["wgmma"]} <= {("sparse_backward_keys", 256)}


def test_audit_sees_what_it_looks_for() -> None:
    code = """
        from benchmarks import audit
        from igpt_kernels.tuning import Config
        spilled = audit.audit("sm_90", "flash_backward_keys", 16, 128, Config(128, 128, 8, 2))
        assert "spills" in spilled[0].problems, spilled
        large = audit.audit("default", "flash_forward", 16, 128, Config(128, 128, 8, 3))
        assert any("shared memory" in problem for problem in large[0].problems), large
        serial = audit.audit("sm_90", "flash_forward", 16, 192, Config(128, 64, 8, 2))
        assert "WGMMA serialised" in serial[0].problems, serial
        odd = audit.audit("sm_90", "rms_norm_forward", 16, 1001)
        assert all("narrow" in row.problems[0] for row in odd), odd
        crowd = audit.audit("sm_90", "rms_norm_backward", 16, 512, Config(8, 512, 4, 9))
        assert "9 programs of" in crowd[0].problems[0], crowd
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_pattern_and_no_size_compiles_anew() -> None:
    """Four forms of the forward kernel are all there are: with and without parts before, last or not."""
    code = """
        import torch
        from benchmarks import audit
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
