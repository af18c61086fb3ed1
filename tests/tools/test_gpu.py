"""`make gpu` where there is no GPU: that a part which fails, hangs or is missing costs that part only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpt_kernels import backends, tuning
from tools import gpu, sanitize
from tools.gpu import Part
from tools.kernels import OPERATIONS

PYTHON = sys.executable


def part(name: str, *code: str, share: float = 0.2) -> Part:
    return Part(name, tuple((PYTHON, "-c", one) for one in code), share)


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_that_part(tmp_path: Path) -> None:
    chosen = [
        part("good", "print('fine')"),
        part("bad", "raise SystemExit(3)", "print('after it')"),
        Part("absent", (("no-such-tool",), (PYTHON, "-c", "print('after it')")), 0.2),
        part("slow", "import time; time.sleep(600)", "print('after it')", share=0.0),
        part("last", "print('last')"),
    ]
    outcomes = {outcome.name: outcome for outcome in gpu.run_all(chosen[:3], tmp_path, 1.0)}
    assert [outcomes[name].status for name in ("good", "bad", "absent")] == ["ok", "failed", "failed"]
    assert "exit code 3" in outcomes["bad"].reason
    assert "no-such-tool does not start" in outcomes["absent"].reason
    assert "after it" in (tmp_path / "bad.log").read_text()
    assert "after it" in (tmp_path / "absent.log").read_text()
    slow = gpu.run(chosen[3], tmp_path, 4.0)
    assert slow.status == "timeout"
    assert slow.reason.startswith("not done after 2 s: ")
    assert "after it\n" in (tmp_path / "slow.log").read_text().splitlines(keepends=True)
    assert gpu.run(chosen[4], tmp_path, 10.0).status == "ok"
    assert [row["name"] for row in json.loads((tmp_path / "report.json").read_text())] == ["good", "bad", "absent"]


@pytest.mark.slow
def test_children_of_a_part_end_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run(part("parent", code), tmp_path, 1.0).status == "timeout"
    import time

    time.sleep(3)
    assert not mark.exists()


def test_time_that_is_left_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run(part: Part, folder: Path, seconds: float) -> gpu.Outcome:
        limits.append(seconds)
        return gpu.Outcome(part.name, "ok", 4.0, "", "")

    monkeypatch.setattr(gpu, "run", run)
    gpu.run_all([part("first", share=0.5), part("second", share=0.25), part("third", share=0.25)], tmp_path, 1.0)
    assert limits == [30.0, 15.0 + 26.0, 15.0 + 37.0]


def test_parts_together_fit_the_time_and_name_what_there_is(tmp_path: Path) -> None:
    every = gpu.parts(tmp_path)
    assert [one.name for one in every] == ["build", "plan", "adopt", "tests", "sanitizer", "bench", "summary"]
    shares = {one.name: one.share for one in every}
    assert shares["bench"] + shares["summary"] <= 1.0
    assert sum(shares.values()) - shares["bench"] - shares["summary"] <= 1.1
    assert torch.cuda.is_available() or gpu.main(["--parts", "build"]) == 2
    tests = [word for word in every[3].commands[0] if word.endswith(".py")]
    marked = {
        str(path.relative_to(gpu.ROOT)) for path in (gpu.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()
    }
    assert set(tests) == {path for path in marked if path != "tests/tools/test_gpu.py"}


def test_every_public_operation_goes_under_the_sanitizer() -> None:
    assert {name.rpartition(" ")[2] for name in OPERATIONS} | {"palette_lookup"} == set(backends.IMPLEMENTATIONS)
    assert set(sanitize.GROUPS) == {operation.name for operation in OPERATIONS.values()} | {"palette"}
    assert set(gpu.TOOLS) == {"memcheck", "racecheck", "initcheck", "synccheck"}


def test_every_call_under_the_sanitizer_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by the torch backend and the table of another chip: sizes, forms and gradients fit together."""
    monkeypatch.setattr(tuning, "table_for", lambda device: "sm_90")
    monkeypatch.setattr(backends, "choose", lambda backend, table, op: "torch")
    monkeypatch.setattr(backends, "select", lambda op, backend, tensors, size=None: "torch")
    calls = 0
    for operation in {id(operation): operation for operation in OPERATIONS.values()}.values():
        for form in range(operation.forms):
            size = min(sanitize.listed_sizes("sm_90", operation, 16))
            inputs = operation.inputs(size, operation.odd_rows, torch.bfloat16, "cpu", form)
            assert all(bool(torch.isfinite(x).all()) for x in operation.public(inputs))
            calls += 1
    assert calls == sum(operation.forms for operation in OPERATIONS.values())


def test_the_calls_under_the_sanitizer_are_split_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Child:
        def __init__(self, command: list[str]) -> None:
            started.append(command[3:])

        def wait(self) -> int:
            return -9 if started[-1][0] == "norm" else 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", Child)
    assert sanitize.main(["attention", "palette", "--at-once"]) == 0
    assert started == [["attention", "--bits", "16"], ["attention", "--bits", "32"], ["palette", "--bits", "16"]]
    assert sanitize.main(["norm", "--bits", "32", "--at-once"]) == 1
