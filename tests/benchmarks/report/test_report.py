"""Ratios, sentences, tables, plots, pytest-benchmark's schema, comparisons and targets, on rows made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import parser
from benchmarks.measure.worker import Limits
from benchmarks.report import compare, pages, plots, tables, targets, units
from tests.benchmarks.measure.test_run import FACTS
from tests.benchmarks.misbehave import ok_row

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**FACTS["environment"], **FACTS["rates"]}


def row(method: str, side: int, seconds: float = 1.0, *, way: str = "both", **changes: Any) -> dict[str, Any]:
    suite = changes.pop("suite", "attention")
    base = {
        "kind": "row",
        "suite": suite,
        "op": "causal",
        "method": method,
        "preset": "S",
        "resolution": side,
        "batch": 1,
        "heads": 8,
        "tokens": side * side,
        "head_dim": 64,
        "dtype": "float32",
        "device": "cpu",
        "way": way,
        **ok_row(seconds),
        "ratio": {},
        "memory_ratio": {},
        **changes,
    }
    key = "/".join(str(base[name]) for name in ("suite", "op", "method", "preset", "batch", "tokens", "dtype", "way"))
    return {**base, "key": key}


def gone(method: str, side: int, status: str, **changes: Any) -> dict[str, Any]:
    return row(method, side, **changes) | {"status": status, "reason": f"{method} at {side}² is {status}"}


ROWS = [
    row("eager", 32, 4.0, peak_bytes=8 << 20),
    row("sdpa", 32, 1.0, peak_bytes=1 << 20),
    row("flash", 32, 0.5, peak_bytes=2 << 20),
    row("eager", 64, 64.0),
    gone("eager", 128, "oom", predicted_bytes=32 << 30),
    row("flash", 64, 8.0),
    row("flash", 128, 128.0),
    gone("flash", 256, "timeout", predicted_s=2048.0),
    row("sparse", 64, 1.0, suite="sparse", op="local2d:7"),
    row("sparse", 256, 16.0, suite="sparse", op="local2d:7"),
]


def test_ratios_are_the_peers_time_and_memory_over_ones_own() -> None:
    assert tables.ratios(ROWS[2], ROWS[:2]) == {
        "ratio": {"eager": 8.0, "sdpa": 2.0},
        "memory_ratio": {"eager": 4.0, "sdpa": 0.5},
    }
    assert tables.ratios(ROWS[8], ROWS) == {"ratio": {"eager": 64.0}, "memory_ratio": {"eager": 1.0}}
    assert tables.ratios(ROWS[4], ROWS) == {}
    assert tables.ratios(row("flash", 32, way="forward"), ROWS)["ratio"] == {}
    assert tables.ratios(row("flash", 32, dtype="bfloat16"), ROWS)["ratio"] == {}


def test_the_sentence_that_users_quote() -> None:
    [sentence] = tables.largest(ROWS)
    assert "eager 64² (128²: out of memory, 32 GiB needed)" in sentence
    assert "flash 128² (256²: 2048 s a call)" in sentence
    assert "Image GPT S, forward + backward, batch 1" in sentence
    unstopped = [one for one in ROWS if one["method"] != "flash" or one["status"] == "ok"]
    assert "flash at least 128²" in tables.largest(unstopped)[0]
    assert tables.largest(ROWS[:3]) == []  # nothing was stopped


def test_every_row_is_in_the_markdown_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = tables.markdown(ROWS)
    assert text.count("\n| ") + text.startswith("| ") == len(ROWS) + 2, text  # and a head for each table
    show = tables.Printer()
    for one in ROWS:
        show(one)
    printed = capsys.readouterr().out
    assert "oom: eager at 128² is oom" in printed
    assert printed.count("median") == 8  # a heading where the size changes


def test_units() -> None:
    assert [units.seconds(value) for value in (2.5, 0.0123, 4.56e-5, 7e-8)] == ["2.5 s", "12.3 ms", "45.6 µs", "70 ns"]
    assert [units.size(value) for value in (3 << 30, 5 << 20, 1010 << 20, 4 << 10, None)] == [
        "3 GiB", "5 MiB", "0.986 GiB", "4 KiB", "-",
    ]  # fmt: skip
    assert [units.digits(value) for value in (0.01234, 12.34, 999.4, 999.6, 4586.2)] == [
        "0.0123",
        "12.3",
        "999",
        "1,000",
        "4,586",
    ]


def test_pytest_benchmark_reads_the_json(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tables.pytest_json(ROWS, [ENVIRONMENT])))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median,rounds", "--group-by=group"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention/causal/flash" in done.stdout
    benchmark = json.loads(path.read_text())["benchmarks"][0]
    assert benchmark["group"] == "attention causal S 32² forward + backward"
    assert benchmark["extra_info"]["peak_bytes"] == 8 << 20
    assert benchmark["stats"]["median"] == 4.0


def test_plots_have_lines_crosses_and_labels(tmp_path: Path) -> None:
    from igpt.plots.curves import new_figure

    assert plots.draw(ROWS, tmp_path) == ["attention-S-both.png", "sparse-local2d-7-S-both.png"]
    assert (tmp_path / "attention-S-both.png").stat().st_size > 10_000
    axes = new_figure(5, 4).subplots()
    plots._panel(axes, [one for one in ROWS if one["suite"] == "attention"], "median_s", "predicted_s", "time (s)")
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"eager", "sdpa", "flash"} <= set(lines)
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[128], [256]]
    assert list(crosses[0].get_ydata()) == [pytest.approx(64.0 * 16)]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "pixels" in axes.get_xlabel()
    assert axes.get_ylabel() == "time (s)"


@pytest.mark.parametrize(
    ("column", "values", "labels"),
    [
        ("median_s", (1.6e-3, 2.0e-2), {"2 ms", "5 ms", "10 ms", "20 ms"}),
        ("median_s", (0.084, 0.085), {"50 ms", "100 ms"}),
        ("median_s", (0.01, 100.0), {"100 ms", "1 s"}),
        ("peak_bytes", (549 << 20, 805 << 20), {"512 MiB", "1 GiB"}),
        ("peak_bytes", (4 << 10, 4 << 10), {"4 KiB"}),
    ],
)
def test_every_axis_has_numbers_with_units(column: str, values: tuple[float, float], labels: set[str]) -> None:
    from igpt.plots.curves import new_figure

    axes = new_figure(5, 4).subplots()
    rows = [row("flash", side, 1.0) | {column: value} for side, value in zip((32, 64), values, strict=True)]
    plots._panel(axes, rows, column, "predicted", "what")
    low, high = axes.get_ylim()
    shown = {axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks() if low <= tick <= high}
    assert labels <= shown


def test_making_lists_is_not_drawn_beside_attention() -> None:
    built = [row("lists", side, 1.0) | {"suite": "sparse", "op": "build"} for side in (64, 256)]
    dense = [row("flash", side, 1.0) for side in (64, 128)]
    (name,) = (name for name in plots.panels(built + dense) if "build" in name)
    assert plots.panels(built + dense)[name] == built


def test_a_line_goes_through_batches_of_one_load() -> None:
    loads = [(32, 1), (32, 128), (64, 4), (64, 32), (128, 8)]
    rows = [row("flash", side, 1.0) | {"batch": batch, "tokens": side * side} for side, batch in loads]
    assert [one["batch"] for one in plots.comparable(rows)] == [128, 32, 8]
    assert plots.comparable(rows[::2]) == rows[::2], "one row a size: all are drawn"


def planted(factor: float) -> list[dict[str, Any]]:
    return [ENVIRONMENT, row("flash", 32, 0.5 * factor), row("flash", 64, 8.0), row("sdpa", 32, 1.0)]


@pytest.mark.parametrize(
    ("factor", "verdict", "fails"), [(1.0, "same", False), (1.15, "same", False), (1.5, "slower", True), (0.5, "faster", False)]
)
def test_a_planted_regression_is_found(factor: float, verdict: str, fails: bool, tmp_path: Path) -> None:
    found = compare.changes(planted(1.0), planted(factor))
    assert [change.verdict for change in found] == [verdict, "same", "same"]
    assert found[0].ratio == pytest.approx(factor)
    assert bool(compare.slower(found, 10.0)) == fails
    assert not compare.slower(found, 60.0)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in planted(1.0)))
    assert compare.command(str(tmp_path), planted(factor), "slower:10%", 1.0, 0.1) == fails


def test_what_ran_and_fails_now_is_a_regression() -> None:
    found = compare.changes([row("flash", 64)], [gone("flash", 64, "oom")])
    assert found[0].verdict == "ok -> oom"
    assert compare.slower(found, 1000.0)
    assert not compare.slower(compare.changes([gone("flash", 64, "oom")], [gone("flash", 64, "oom")]), 0.0)


def test_other_conditions_are_warned_of() -> None:
    assert compare.differences([ENVIRONMENT], [ENVIRONMENT]) == []
    other = {**ENVIRONMENT, "machine": "elsewhere", "versions": {"python": "3", "torch": "3"}, "matmul_tflops": 50.0}
    text = "\n".join(compare.differences([ENVIRONMENT], [other]))
    for word in ("machine differs", "torch differs: 2 and 3", "100 TFLOP/s then and 50 now"):
        assert word in text


def test_a_comparison_with_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results\.jsonl"):
        compare.read_run(tmp_path)
    with pytest.raises(ValueError, match="neither a folder of results nor a git revision"):
        compare.measure_revision("no-such-revision", [row("flash", 32)], Limits(1, 1, 1), 10.0)
    with pytest.raises(ValueError, match="this run has no case of ours"):
        compare.measure_revision("HEAD", [row("sdpa", 32)], Limits(1, 1, 1), 10.0)
    with pytest.raises(ValueError, match="--compare: no-such-revision is neither a folder of results nor a git revision"):
        compare.check("no-such-revision")
    with pytest.raises(ValueError, match=r"holds no results\.jsonl"):
        compare.check(str(tmp_path))
    (tmp_path / "results.jsonl").write_text(json.dumps(row("sdpa", 32)) + "\n")
    compare.check(str(tmp_path))
    with pytest.raises(ValueError, match="no case in common"):
        compare.command(str(tmp_path), [row("flash", 32)], None, 1.0, 0.1)


def test_help_reads_as_it_is_meant() -> None:
    text = parser().format_help()
    assert "%%" not in text
    assert text.rstrip().endswith("--fail-if slower:10%")
    assert "80 % of what is free" in " ".join(text.split())


def test_peers_are_not_judged() -> None:
    found = compare.changes([row("sdpa", 64, 1.0), row("flash", 64, 1.0)], [row("sdpa", 64, 2.0), row("flash", 64, 2.0)])
    assert [change.new["method"] for change in compare.slower(found, 10.0)] == ["flash"]
    lines = [row("sdpa", 64), row("flash", 64), gone("flash", 32, "skipped"), gone("sparse", 32, "error")]
    assert [(pair.case.method, pair.way) for pair in compare.pairs_of(lines)] == [("flash", "both"), ("sparse", "both")]


def test_sources_in_folders_count_when_an_extension_is_taken_over(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "csrc" / "cpu").mkdir(parents=True)
        (tmp_path / name / "csrc" / "cpu" / "a.inc").write_text("same")
    one, two = tmp_path / "one", tmp_path / "two"
    assert compare._sources(one) == compare._sources(two) != {}
    (two / "csrc" / "cpu" / "a.inc").write_text("other")
    assert compare._sources(one) != compare._sources(two)


@pytest.mark.slow
def test_a_revision_gets_todays_benchmarks_and_goes_away(tmp_path: Path) -> None:
    with compare.worktree("HEAD") as path:
        assert (path / "igpt_kernels" / "attention.py").exists()
        assert (path / "benchmarks" / "registry.py").read_bytes() == (ROOT / "benchmarks" / "registry.py").read_bytes()
        code = "import igpt_kernels; print(igpt_kernels.__file__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(path))
    assert not path.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(path) not in listed


def on_gpu(method: str, seconds: float, **changes: Any) -> dict[str, Any]:
    base = {"device": "cuda", "dtype": "bfloat16", "batch": 32, "way": "forward", "flops": 500e9, "bytes": 256 << 20}
    return row(method, changes.pop("side", 64), seconds, **{**base, **changes})


def test_targets_are_data_and_find_their_rows() -> None:
    everything = {target["name"]: target for target in targets.load()}
    assert len(everything) == len(targets.load()) > 85
    assert {target["section"][:2] for target in everything.values()} == {"8a", "8b", "8c", "8d"}
    rows = [
        on_gpu("flash", 1e-3),  # 500 TF
        on_gpu("sdpa-flash", 1.55e-3),
        on_gpu("sparse", 0.2e-3, suite="sparse", op="local2d:15", side=128, batch=8, density=0.05, touched_forward=2_000_000),
        on_gpu("flash", 2e-3, side=128, batch=8),
        on_gpu("flex", 0.5e-3, suite="sparse", op="local2d:15", side=128, batch=8),
        on_gpu("decode", 1e-4, suite="decode", op="dense", bytes=400e6, copy_gbs=4300.0),
        on_gpu("decode", 1e-4, suite="decode", op="dense", bytes=400e6, copy_gbs=5000.0, batch=64),
        on_gpu("ours", 1e-3, suite="fused", op="linear_cross_entropy", way="both", peak_bytes=51 << 20, result_bytes=50 << 20),
        on_gpu(
            "eager", 2e-3, suite="fused", op="linear_cross_entropy", way="both", peak_bytes=150 << 20, result_bytes=50 << 20
        ),
        on_gpu("torch", 1e-3, suite="palette", op="lookup", dtype="uint8", count=1 << 25),
        on_gpu("kernels", 0.9e-3, suite="sample", op="pixel", preset="L", batch=1, side=32),
    ]
    expected = {
        "forward, D 64, 4,096 tokens": (500.0, "stretch"),
        "sdpa-flash, forward, D 64": (1.55, "ambitious"),
        "forward on touched tiles, D 64, 128² and 256²": (4 * 8 * 8 * 2e6 * 64 / 0.2e-3 / 1e12, "below"),
        "local R >= 15, 128² up, speed-up over FLOP reduction, fwd": (50.0, "ambitious"),
        "FlexAttention, same mask, local, 128² and 256², forward": (2.5, "ambitious"),
        "decode attention, 64 MiB of keys and values and more": (80.0, "must"),
        "linear + cross entropy, eager over ours": (2.0, "must"),
        "linear + cross entropy, memory of eager's": (1.0, "stretch"),
        "palette, 4 million pixels and more": (33.554432, "must"),
        "decode step, Image GPT L, batch 1, 32²": (0.9, "ambitious"),
    }
    for name, (value, reached) in expected.items():
        got = targets.measured(everything[name], rows)
        assert got == pytest.approx(value), name
        assert targets.level(everything[name], got) == reached, name
    # The worst of several rows counts, one that failed does not, and where there is none nothing is claimed.
    name = "forward, D 64, 4,096 tokens"
    assert (
        targets.measured(everything[name], [rows[0], on_gpu("flash", 2e-3), on_gpu("flash", 9.0) | {"status": "error"}]) == 250
    )
    assert targets.measured(everything[name], [on_gpu("flash", 1e-3, batch=1)]) is None
    text = targets.summary(list(everything.values()), rows)
    assert "500 TF, stretch" in text
    assert text.count("not measured") > 50


def test_targets_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(tmp_path)]) == 2
    assert "no results.jsonl" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [ENVIRONMENT, on_gpu("flash", 1e-3)]))
    assert targets.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "500 TF, stretch" in text
    assert len(text.splitlines()) < 40  # one screen


def test_a_target_without_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    for entry in ({"name": "x"}, {"section": "a", "name": "x", "metric": "speed", "match": {}, "must": 1}):
        path.write_text(json.dumps({"targets": [entry]}))
        with pytest.raises(ValueError, match="target 'x'"):
            targets.load(path)


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_and_data_agree(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.MARKED.search(text), f"{page} asks for no numbers"
    results = pages.Results(compare.read_run(pages.RESULTS))
    made = pages.filled(text, results, pages.Results(compare.read_run(pages.newest(pages.GPU_RESULTS))))
    assert made == text, f"{page} is not what python -m benchmarks.report.pages writes"


def test_pages_are_filled_from_rows() -> None:
    results = pages.Results([ENVIRONMENT, *ROWS])
    text = pages.filled("a\n<!-- numbers: attention -->\nold\n<!-- end -->\nb\n", results)
    assert "old" not in text
    assert "| 4 s | 64 s | out of memory (32 GiB) |" in " ".join(text.split("\n"))
    with pytest.raises(ValueError, match="no part 'weather'"):
        pages.filled("<!-- numbers: weather -->\n<!-- end -->", results)
    for part in pages.PARTS.values():
        assert part(results)
    with pytest.raises(ValueError, match="no part 'gpu'"):
        pages.filled("<!-- numbers: gpu -->\n<!-- end -->", results)


def test_the_table_of_a_gpu(tmp_path: Path) -> None:
    facts = {"kind": "environment", "gpu": "A GPU", "matmul_tflops": 700.4, "copy_gbs": 3000.2}
    facts["versions"] = {"torch": "2", "triton": "3"}
    case = {"kind": "row", "suite": "attention", "op": "causal", "preset": "S", "resolution": 64, "batch": 4}
    case |= {"tokens": 4096, "dtype": "bfloat16", "status": "ok"}
    timed = (("flash", "both", 2.0), ("flash", "forward", 0.5), ("sdpa-cudnn", "both", 1.0), ("sdpa-cudnn", "forward", 7.0))
    rows = [case | {"key": f"{name} {way}", "method": name, "way": way, "median_s": time} for name, way, time in timed]
    rows.append(case | {"key": "flex", "method": "flex", "way": "both", "status": "oom"})
    for day, folder, more in (("2026-01-02", "new", rows), ("2026-01-01", "old", [])):
        (tmp_path / folder).mkdir()
        lines = [facts | {"id": day, "date": day}, *more]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / folder / "results.jsonl").write_text(text, encoding="utf-8")
    assert pages.newest(tmp_path).name == "new"
    run = pages.Results(compare.read_run(tmp_path / "new"))
    assert run.facts["date"] == "2026-01-02"
    table = pages.gpu(run)
    assert "2026-01-02 on an A GPU, torch 2, Triton 3, bfloat16; a matrix product reached 700 TFLOP/s" in table
    (line,) = [line for line in table.splitlines() if line.startswith("| attention causal")]
    assert line == (
        "| attention causal, S, 64², batch 4, forward + backward | 2 s | - | - | - | 1 s (0.5×) | out of memory |"
    ), "one line: both ways, the peer of the same case"
