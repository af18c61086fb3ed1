"""The fit finds constants that made the times, and states its error on rows that it has not seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from igpt_kernels.tuning import Config
from tools import calibrate, speed


def test_the_fit_finds_what_made_the_times() -> None:
    rows = [dict(row) for row in speed.calibration()["rows"] if row["head_dim"] == 64 and row["cycles"]]
    for row in rows:
        row["ms"] = calibrate.time_of(row, {"dense": 1.5, "sparse": 1.25}[speed.family(row["kernel"])], 4000.0)
    assert calibrate.fit(rows) == ({"dense": 1.5, "sparse": 1.25}, 4000.0)
    error = calibrate.errors(rows, {"dense": 1.5, "sparse": 1.25}, 4000.0)
    assert error["dense"]["largest"] == error["sparse"]["largest"] == 0
    assert error["dense"]["spearman"] == error["sparse"]["spearman"] == 1
    assert calibrate.errors(rows, {"dense": 1.2, "sparse": 1.25}, 4000.0)["dense"]["median"] == pytest.approx(0.2, abs=0.001)


def test_the_stated_error_is_that_of_the_rows() -> None:
    fitted = speed.calibration()
    modelled = [row for row in fitted["rows"] if row["cycles"]]
    assert fitted["error"] == calibrate.errors(modelled, fitted["clock_ghz"], fitted["start_cycles"])
    for name, median, largest in (("dense", 0.10, 0.15), ("sparse", 0.15, 0.30)):
        assert fitted["error"][name]["held_out"] >= 35
        assert fitted["error"][name]["median"] <= median
        assert fitted["error"][name]["p80"] <= largest
    assert fitted["error"]["dense"]["spearman"] >= 0.75
    fit = [row for row in modelled if not row["held_out"]]
    assert calibrate.fit(fit) == (fitted["clock_ghz"], fitted["start_cycles"])


def test_ranks_share_the_places_of_equals() -> None:
    assert calibrate.ranks([5, 1, 5, 9]) == [1.5, 0, 1.5, 3]
    assert calibrate.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert calibrate.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)


def test_rows_of_todays_kernels_are_taken(tmp_path: Path) -> None:
    base = {"kind": "time", "head_dim": 64, "block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 0}
    rows = [
        {**base, "kernel": "flash_forward", "layout": "causal", "median_ms": 1.0, "tflops": 9.0, "dp_first": False},
        {**base, "kernel": "flash_forward", "layout": "causal", "median_ms": 2.0, "tflops": 8.0},
        {**base, "kernel": "flash_backward_keys", "layout": "causal", "median_ms": 3.0, "tflops": 7.0, "dp_first": False},
        {**base, "kernel": "flash_backward_keys", "layout": "causal", "median_ms": 4.0, "tflops": 6.0, "dp_first": True},
        {**base, "kernel": "sparse_forward", "layout": "local2d:7", "status": "failed"},
        {**base, "kernel": "rms_norm_forward", "median_ms": 1.0, "tflops": 1.0},
        {**base, "kernel": "flash_forward", "kind": "check"},
    ]
    path = tmp_path / "plan.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = Config(64, 64, 4, 3)
    assert {key: dict(value) for key, value in calibrate.timed_rows([path]).items()} == {
        ("flash_forward", 64, config): {"causal": [(1.0, 9.0), (2.0, 8.0)]},
        ("flash_backward_keys", 64, config): {"causal": [(4.0, 6.0)]},
    }


def test_every_timed_variant_is_in_the_calibration() -> None:
    timed = calibrate.timed_rows(sorted(calibrate.RESULTS.glob("*/plan*.jsonl")))
    rows = speed.calibration()["rows"]
    found = {(row["kernel"], row["head_dim"], tuple(row["config"]), row["layout"]): row for row in rows}
    assert len(found) == len(rows) >= 200
    wanted = {
        (kernel, dim, tuple(c.entry), layout): t for (kernel, dim, c), each in timed.items() for layout, t in each.items()
    }
    assert set(found) <= set(wanted)
    assert len(found) >= 0.95 * len(wanted), "some have no loop of warpgroup products"
    for key, row in found.items():
        assert row["ms"] == pytest.approx(sum(ms for ms, _ in wanted[key]) / len(wanted[key]), abs=1e-5)


def test_main_fits_anew_or_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "calibration.json"
    shutil.copy(speed.CALIBRATION, copy)
    assert calibrate.main(["--refit", "--out", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == speed.CALIBRATION.read_text(encoding="utf-8")
    monkeypatch.setattr(calibrate, "TRITON", "0.0")
    assert calibrate.main(["--out", str(copy)]) == 2
    assert "compiled by triton 0.0" in capsys.readouterr().err
