"""The loop: rows at once, resumed without a repetition, predictions instead of suffering, a crash costs one way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plans
from benchmarks.__main__ import main
from benchmarks.measure import worker
from benchmarks.measure.run import Runner, Settings, read
from benchmarks.plans import Selection, plan
from benchmarks.registry import Case
from tests.benchmarks import misbehave

FACTS: dict[str, Any] = {
    "environment": {
        "kind": "environment",
        "id": "here",
        "machine": "test",
        "processor": "test",
        "cores": 2,
        "threads": 2,
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3", "torch": "2"},
        "revision": "abc",
        "changed": False,
    },
    "rates": {"matmul_tflops": 100.0, "copy_gbs": 10.0},
    "available": 16 << 30,
}


def runner(out: Path, **changes: Any) -> tuple[Runner, list[str]]:
    shown: list[str] = []
    settings = replace(Settings(out, seconds=60.0, budget=0.1), **changes)
    return Runner(settings, FACTS, lambda row: shown.append(row["key"])), shown


def cases(*resolutions: int, methods: tuple[str, ...] = ("sdpa", "flash")) -> list[Case]:
    return list(plan(Selection("cpu", suites=("attention",), presets=("S",), resolutions=resolutions, methods=methods)))


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_job", misbehave.pretend)


@pytest.mark.slow
def test_a_row_for_each_way_is_in_the_file_at_once(tmp_path: Path) -> None:
    run, _ = runner(tmp_path)
    seen: list[int] = []
    run.show = lambda row: seen.append(len(read(tmp_path / "results.jsonl")))
    run.run(cases(32))
    assert seen == [2, 3, 4, 5]  # the environment comes first
    rows = run.rows
    assert [row["way"] for row in rows] == ["forward", "both"] * 2
    assert {row["environment"] for row in rows} == {"here"}
    assert all(Case.of(row).key + "/" + row["way"] == row["key"] for row in rows)
    assert rows[-1]["ratio"] == {"sdpa": 1.0}


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    run, _ = runner(tmp_path)
    run.run(cases(32))
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"kind": "row", "key": "cut sho')
    again, shown = runner(tmp_path, resume=True)
    again.run(cases(32, 64))
    assert {key.split("/")[4] for key in shown} == {"1x8x4096x64"}
    lines = read(path)
    keys = [row["key"] for row in lines if row["kind"] == "row"]
    assert len(keys) == len(set(keys)) == 8
    assert sum(row["kind"] == "environment" for row in lines) == 1


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "row"}\n{"kind\n{"kind": "row"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


def test_a_way_that_kills_its_process_costs_that_way(tmp_path: Path) -> None:
    run, _ = runner(tmp_path)
    run.run(cases(48))
    statuses = {(row["method"], row["way"]): row["status"] for row in run.rows}
    assert statuses == {(m, w): "ok" if w == "forward" else "error" for m in ("sdpa", "flash") for w in ("forward", "both")}
    assert "SIGKILL" in next(row["reason"] for row in run.rows if row["status"] == "error")


def test_when_time_is_up_the_rest_is_left_for_resume(tmp_path: Path) -> None:
    run, shown = runner(tmp_path, minutes=0.0)
    run.run(cases(32, 64))
    assert (shown, run.left) == ([], 4)


def test_out_of_memory_is_predicted_in_bytes(tmp_path: Path) -> None:
    run, _ = runner(tmp_path)
    run.run(cases(256, methods=("eager",)))
    for row, copies in zip(run.rows, (2, 3), strict=True):
        assert row["status"] == "oom"
        assert row["predicted_bytes"] == copies * 4 * 8 * 65536**2
        assert "12.8 GiB" in row["reason"]


def test_time_is_predicted_by_the_machine_and_by_smaller_images(tmp_path: Path) -> None:
    run, _ = runner(tmp_path, seconds=60.0)
    run.rates = {"matmul_tflops": 0.01, "copy_gbs": 10.0}
    run.run(cases(128, methods=("flash",)))
    assert [row["status"] for row in run.rows] == ["timeout", "timeout"]
    assert "TFLOP take over" in run.rows[0]["reason"]
    other, _ = runner(tmp_path / "other", seconds=60.0)
    other.run(cases(32, 64, 96, 128, methods=("flash",)))  # a second for a thousand tokens, squared: 17 s for 64²
    assert [(row["resolution"], row["status"]) for row in other.rows if row["way"] == "both"] == [
        (32, "ok"),
        (64, "timeout"),
        (96, "timeout"),
        (128, "timeout"),
    ]
    assert other.rows[2]["predicted_s"] == pytest.approx(misbehave.ok_row(1024**2 / 1e6)["median_s"] * 16, rel=0.01)


def test_what_cannot_run_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = runner(tmp_path)
    run.run(cases(32, methods=("sdpa-cudnn", "flex")))
    reasons = {(row["method"], row["way"]): row["reason"] for row in run.rows if row["status"] == "skipped"}
    assert reasons["sdpa-cudnn", "forward"] == "needs cuda"
    assert "no backward pass" in reasons["flex", "both"]
    case = cases(32)[1]
    monkeypatch.setattr("igpt_kernels.__all__", ["PaletteTable"])
    assert plans.unavailable_reason(case, "forward") == "not in this version: igpt_kernels has no flash_attention"
    monkeypatch.setattr(plans.importlib.util, "find_spec", lambda name: None)
    [palette] = plan(Selection("cpu", suites=("palette",), resolutions=(32,), methods=("scipy",)))
    assert plans.unavailable_reason(palette, "forward") == "scipy is not installed"


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()  # the real measurement
    out = tmp_path / "run"
    arguments = ["--device", "cpu", "--quick", "--shape", "1", "2", "64", "16", "--suite", "attention", "--out", str(out)]
    assert main([*arguments, "--methods", "eager", "flash"]) == 0
    text = capsys.readouterr().out
    assert "64 tokens" in text
    assert "×eager" in text
    rows = [row for row in read(out / "results.jsonl") if row["kind"] == "row"]
    assert str(tmp_path) not in (out / "results.jsonl").read_text()  # where results lie says nothing about them
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert rows[-1]["ratio"]["eager"] > 0
    assert main([*arguments, "--methods", "eager"]) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert main([*arguments, "--methods", "eager", "--resume", "--compare", str(out), "--fail-if", "slower:10%"]) == 0
    assert "0 changed beyond the spread" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["benchmarks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-if", "slower:10%"], "needs --compare"),
        (["--compare", "x", "--fail-if", "faster"], "slower:PERCENT"),
        (["--report"], "needs --out"),
        (["--suite", "nothing"], "invalid choice"),
        (["--quick", "--full"], "not allowed"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_empty_selection_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--suite", "palette", "--methods", "flash"]) == 2
    assert "no case fits" in capsys.readouterr().err


@pytest.mark.slow
def test_igpt_bench_hands_its_options_on(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from igpt.commands import bench, main

    assert main.main(["bench", "--device", "cpu", "--quick", "--list", "--suite", "attention"]) == 0
    listed = capfd.readouterr().out.split()
    assert listed == [case.key for case in plan(Selection("cpu", "quick", suites=("attention",)))]
    monkeypatch.setattr(bench, "ROOT", Path("/nowhere"))
    assert main.main(["bench"]) == 2
    assert "needs the source tree" in capfd.readouterr().err


def test_cases_are_plain_data() -> None:
    case = cases(32)[0]
    assert Case(**json.loads(json.dumps(asdict(case)))) == case
