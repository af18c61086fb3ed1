"""What the compiler makes of every shipped configuration: no spill, shared memory that is there, warpgroup MMAs on sm_90."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from igpt_kernels import tuning
from tools import audit
from tools.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]


Cases = list[tuple[str, str, int, int]]
AMD = [chip for chip, target in audit.TARGETS.items() if target.table == tuning.AMD]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Cases:
    """What would be compiled, and nothing is; bits below 0 stand for tensors that allow no wide load."""
    seen: Cases = []

    def note(*case: Any, aligned: bool) -> list[audit.Row]:
        seen.append(case if aligned else (*case[:2], -case[2], case[3]))
        return []

    monkeypatch.setattr(audit, "audit", note)
    return seen


def test_options_say_which_configurations_are_compiled(cases: Cases) -> None:
    def listed(bits: int, sizes_of_models: bool, others: bool, *chips: str) -> Cases:
        sizes = {
            (chip, kernel): {
                *(KERNELS[kernel].operation.sizes if sizes_of_models else ()),
                *(map(int, tuning.table(audit.TARGETS[chip].table)[kernel][str(bits)]) if others else ()),
            }
            for chip in chips
            for kernel in KERNELS
        }
        return [(chip, kernel, bits, size) for (chip, kernel), found in sizes.items() for size in found]

    unaligned = [("sm_90", kernel, -16, 64) for kernel in KERNELS if kernel.startswith(("flash", "sparse", "decode"))]
    assert audit.main(["--json", "--models", "--bits", "16", "--", "sm_90"]) == 0
    assert sorted(cases) == sorted(listed(16, True, False, "sm_90") + unaligned)
    cases.clear()
    assert audit.main(["--json", "--models", "--aligned", "--bits", "16", "--", "sm_90"]) == 0
    assert sorted(cases) == sorted(listed(16, True, False, "sm_90"))
    cases.clear()
    assert audit.main(["sm_80", "sm_120", "gfx942", "--json", "--bits", "32"]) == 0
    assert sorted(cases) == sorted(listed(32, True, True, "sm_80", "sm_120", "gfx942"))
    cases.clear()
    assert audit.main(["--json"]) == 0
    both = [case for bits in (16, 32) for case in listed(bits, True, True, *audit.TARGETS)]
    assert sorted(cases) == sorted(both + unaligned)


def test_every_shipped_table_is_audited_on_a_chip() -> None:
    """Tables that ``make tune`` writes for one device by name are not: that device timed them."""
    assert {target.table for target in audit.TARGETS.values()} == {*tuning.FAMILIES.values(), "default", tuning.AMD}
    assert tuple(AMD) == tuning.AMD_CHIPS
    assert {audit.TARGETS[chip].gpu.warp_size for chip in AMD} == {64}


def test_a_chip_that_is_none_is_refused(cases: Cases, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["sm_90", "sm_10"], ["--bits", "8"]):
        with pytest.raises(SystemExit) as stop:
            audit.main([*arguments, "--json"])
        assert stop.value.code == 2
    assert (
        "chips must be of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx90a, gfx942, gfx950; got sm_10"
        in capsys.readouterr().err
    )
    assert not cases


@pytest.mark.parametrize("problems", [(), ("spills",)])
def test_a_problem_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problems: tuple[str, ...]
) -> None:
    row = audit.Row("sm_90", "decode", 16, 64, (1, 16, 4, 2), 40, 0, 1024, 0, 0, 0, 8, 0, problems)
    monkeypatch.setattr(audit, "audit", lambda *case, aligned: [row])
    assert audit.main(["sm_90", "--json"]) == (1 if problems else 0)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {tuple(row["problems"]) for row in rows} == {problems}


# The whole audit takes half an hour of two cores: `make audit`, after every change of a kernel or a table. Here each
# kernel of sm_90 at the sizes of Image GPT, and on the other chips each kernel at one size, on one chip after another.
@pytest.mark.slow
def test_audit_finds_nothing() -> None:
    """In a process of its own: the audit puts a chip that is not here in place of Triton's driver."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.audit", "sm_90", "--json", "--bits", "16", "--models", "--aligned"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [row for row in rows if row["problems"]] or done.stderr[-3000:]
    compiled_only = {function for kernel in KERNELS.values() for function in kernel.compiled_only}
    assert {row["kernel"] for row in rows} == compiled_only | {
        function for kernel in KERNELS.values() for function in kernel.functions
    }
    products = [row for row in rows if KERNELS.get(row["kernel"], KERNELS["decode"]).kind == "product"]
    assert all(row["wgmma"] for row in products)
    rated = {(row["kernel"], row["size"]) for row in rows if row["measured"]}
    assert len(rated) >= 18, "of six kernels and three head dims of Image GPT at least"
    assert any(row["predicted"] for row in products)
    assert all(row["notes"] == [] or audit.timed("sm_90", row["kernel"], row["size"]) for row in products)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 32])
def test_audit_finds_nothing_on_other_chips(bits: int) -> None:
    chips = [chip for chip in audit.TARGETS if chip != "sm_90"]
    cases = [
        (chips[(i * 3 + shift) % len(chips)], kernel, bits, entry.operation.sizes[(i + shift) % len(entry.operation.sizes)])
        for i, (kernel, entry) in enumerate(KERNELS.items())
        for shift in range(2 if bits == 16 else 1)
    ]
    code = f"""
        import json
        from dataclasses import asdict
        from tools import audit
        print(json.dumps([asdict(row) for case in {cases!r} for row in audit.audit(*case)]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert not [row for row in rows if row["problems"]]
    assert {row["kernel"] for row in rows} == {function for kernel in KERNELS.values() for function in kernel.functions}
    assert {row["chip"] for row in rows} == {*chips}
    products = [row for row in rows if row["kernel"] in KERNELS and KERNELS[row["kernel"]].kind == "product"]
    assert all(row["mma"] for row in products if row["chip"] in AMD and bits == 16)


@pytest.mark.slow
def test_audit_sees_what_it_looks_for() -> None:
    code = """
        from tools import audit, speed
        from igpt_kernels._triton import sparse_forward
        from igpt_kernels.tuning import Config
        spilled = audit.audit("sm_90", "flash_backward_keys", 16, 128, Config(128, 128, 8, 2))
        assert "spills" in {row.kernel: row.problems for row in spilled}["flash_backward_keys"], spilled
        large = audit.audit("sm_86", "flash_forward", 16, 128, Config(128, 128, 8, 3))
        assert any("shared memory" in problem for problem in large[0].problems), large
        serial = audit.audit("sm_90", "flash_forward", 16, 192, Config(128, 64, 8, 2))
        assert "WGMMA serialised" in serial[0].problems, serial
        assert "20 waits for 3 products" in serial[0].problems, serial
        exposed = audit.audit("sm_90", "flash_forward", 16, 64, Config(128, 64, 8, 2))
        assert exposed[0].problems == ("loads are waited for with no product in between",), exposed
        narrow = audit.audit("sm_90", "flash_forward", 16, 64, Config(64, 64, 8, 3))
        assert "products of 32 columns" in narrow[0].problems, narrow
        good = audit.audit("sm_90", "flash_forward", 16, 64)
        assert not good[0].problems and not good[0].notes and good[0].measured, good
        assert abs(good[0].predicted / good[0].measured - 1) < 0.2 and exposed[0].predicted < good[0].predicted / 1.5
        scalar = audit.audit("sm_90", "flash_forward", 16, 64, aligned=False)
        assert not scalar[0].problems and not scalar[0].aligned and scalar[0].narrow > 64, scalar
        assert scalar[0].registers > good[0].registers, scalar
        odd = audit.audit("sm_90", "rms_norm_forward", 16, 1001)
        assert all("narrow" in row.problems[0] for row in odd), odd
        crowd = audit.audit("sm_90", "rms_norm_backward", 16, 512, Config(8, 512, 4, 9))
        assert "9 programs of" in {row.kernel: row for row in crowd}["rms_norm_backward"].problems[0], crowd
        crowd = audit.audit("gfx942", "rms_norm_backward", 16, 512, Config(8, 512, 4, 9))
        assert "9 programs of" in {row.kernel: row for row in crowd}["rms_norm_backward"].problems[0], crowd
        spilled = audit.audit("gfx942", "flash_forward", 16, 128, Config(128, 128, 8, 1))
        assert spilled[0].spills and "scratch memory" in spilled[0].problems[0], spilled
        large = Config(128, 256, 8, 3)
        for chip, fits in (("gfx942", False), ("gfx950", True)):
            (row,) = audit.audit(chip, "cross_entropy_forward", 16, 512, large)[:1]
            assert (row.shared <= audit.TARGETS[chip].shared) == fits == (not row.problems), row
        sparse_forward.takes_own_box = lambda head_dim: True  # what was wrong on an H100; see takes_own_box
        (wrong, _) = audit.audit("sm_90", "sparse_forward", 16, 64)
        assert wrong.problems == (speed.OVERWRITTEN,), wrong
        audit.TARGETS["sm_90"] = audit.Target("sm_90", 90, 1 << 10)
        tight = audit.audit("sm_90", "flash_forward", 16, 64, aligned=False)
        assert "the chip has 1024" in tight[0].problems[0], tight
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
            with audit.compile_only("sm_90") as compiled:
                launch_sparse_forward(q, k, v, [(layouts.parse(text, h, w).key, range(4))], scale=0.1)
            seen += [kernel.hash for _, kernel in compiled]
        assert len(seen) >= 12 and len(set(seen)) == 4, (len(seen), len(set(seen)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
