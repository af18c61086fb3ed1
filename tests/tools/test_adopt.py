"""Winners of timed variants become a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpt_kernels import tuning
from igpt_kernels.tuning import Config
from tools import adopt

SHIPPED = tuning.nearest(tuning.table("sm_90"), "sparse_forward", 16, 64)
OTHER = Config(64, 16, 4, 3, whole_head=True)


def row(config: Config, layout: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "time",
        "kernel": "sparse_forward",
        "head_dim": 64,
        **vars(config),
        "layout": layout,
        "median_ms": ms,
        **more,
    }


def plan(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def test_the_fastest_over_all_layouts_wins(tmp_path: Path) -> None:
    rows = [row(SHIPPED, "a", 1.0), row(SHIPPED, "b", 2.0), row(OTHER, "a", 1.2), row(OTHER, "b", 1.5)]
    times = adopt.timed([plan(tmp_path / "one", *rows, {"kind": "machine"})])
    assert times == {("sparse_forward", 64): {SHIPPED: 2.0, OTHER: pytest.approx(1.8)}}
    made = adopt.table("sm_90", times, "a chip")
    assert made["kernels"]["sparse_forward"]["16"]["64"] == [64, 16, 4, 3, "whole_head"]
    assert made["kernels"]["decode"]["16"]["64"] == tuning.table("sm_90")["decode"]["16"]["64"].entry
    assert made["measured"]["device"] == "a chip"
    assert 64 in made["measured"]["kernels"]["sparse_forward"]


def test_what_ships_stays_within_the_spread_and_half_a_time_is_none(tmp_path: Path) -> None:
    close = [row(SHIPPED, "a", 1.0), row(OTHER, "a", 0.985)]
    assert adopt.winner(adopt.timed([plan(tmp_path / "two", *close)])["sparse_forward", 64], SHIPPED) == SHIPPED
    half = [row(SHIPPED, "a", 1.0), row(SHIPPED, "b", 1.0), row(OTHER, "a", 0.1)]
    assert OTHER not in adopt.timed([plan(tmp_path / "three", *half)])["sparse_forward", 64]
    assert adopt.winner({OTHER: 1.0}, SHIPPED) == OTHER, "what was not timed does not stay"


def test_the_command_writes_a_table_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plan(tmp_path / "four", row(SHIPPED, "a", 1.0), row(OTHER, "a", 0.5), row(OTHER, "a", 0.6))
    assert adopt.main([str(path), "--device", "Some Chip", "--table", "sm_90", "--out", str(tmp_path / "some-chip.json")]) == 0
    assert "0.50 of its time" in capsys.readouterr().out
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert tuning.table("some-chip")["sparse_forward"]["16"]["64"] == OTHER
    assert tuning.measured("some-chip")["sparse_forward"] >= {64}
    assert adopt.main([str(plan(tmp_path / "none", {"kind": "machine"}))]) == 2


def test_the_command_names_what_is_wrong_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = plan(tmp_path / "good", row(SHIPPED, "a", 1.0)), tmp_path / "out.json"
    (tmp_path / "text").write_text("no plan", encoding="utf-8")
    (tmp_path / "row").write_text(json.dumps({"kind": "time", "layout": "a", "median_ms": 1.0}), encoding="utf-8")
    for plans, table, said in (
        (tmp_path / "gone", "sm_90", "plans must be files"), (tmp_path / "text", "sm_90", "JSONDecodeError"),
        (tmp_path / "row", "sm_90", "TypeError"), (good, "sm_91", "--table must be one of amd, default"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            adopt.main([str(plans), "--table", table, "--device", "x", "--out", str(out)])
        assert said in capsys.readouterr().err
        assert not out.exists()


def test_without_a_gpu_it_asks_for_what_a_gpu_would_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    good = plan(tmp_path / "good", row(SHIPPED, "a", 1.0))
    for given in ([], ["--table", "sm_90"], ["--device", "x"]):
        with pytest.raises(SystemExit):
            adopt.main([str(good), *given])
        assert "--device and --table must be given where no GPU is visible" in capsys.readouterr().err


def test_what_ships_may_be_untimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plan(tmp_path / "five", row(OTHER, "a", 1.0))
    assert adopt.main([str(path), "--table", "sm_90", "--device", "x", "--out", str(tmp_path / "x.json")]) == 0
    assert f"was not timed -> {OTHER}" in capsys.readouterr().out
