"""The registry for pytest-benchmark: ``pytest benchmarks --benchmark-only [-k "attention and 64"]``.

Each case runs in a child process, as in ``python -m benchmarks``; its times are handed to pytest-benchmark through a timer
that replays them, memory and ratios through extra_info.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import run
from benchmarks.measure.worker import Message
from benchmarks.plans import Selection, operations, plan
from benchmarks.registry import Case
from benchmarks.report import tables


class Replay:
    """A timer: the host's clock, or, while there are some, times that were measured elsewhere."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self) -> float:
        return self.ticks.pop(0) if self.ticks else time.perf_counter()

    def load(self, seconds: list[float]) -> None:
        """Let the next rounds take these seconds: two readings of the clock for each."""
        self.ticks = [reading for value in seconds for reading in (0.0, value)]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parameters() -> Iterator[Any]:
    for case in plan(Selection(_device())):
        for way in operations()[case.suite, case.op].ways_on(case.device):
            clock = Replay()
            row = {"suite": case.suite, "op": case.op, "preset": case.preset, "resolution": case.resolution, "way": way}
            mark = pytest.mark.benchmark(group=tables.group_of({**row, "tokens": case.tokens}), timer=clock)
            yield pytest.param(case, way, clock, id=f"{case.key}-{way}".replace("/", "-"), marks=mark)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> run.Runner:
    """One run for the whole session: ratios need the rows of the peers, which come first."""
    settings = run.Settings(Path(tmp_path_factory.mktemp("bench")), seconds=60.0, budget=0.6)
    return run.Runner(settings, run.probe_machine(_device()), lambda row: None)


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[list[Message]]:
    """Rows to print in the end, with the columns that pytest-benchmark's table does not show."""
    rows: list[Message] = []
    yield rows
    plugins = request.config.pluginmanager
    quiet = plugins.getplugin("capturemanager")
    with quiet.global_and_fixture_disabled() if quiet is not None else contextlib.nullcontext():
        show = tables.Printer()
        for row in rows:
            show(row)


@pytest.mark.parametrize(("case", "way", "clock"), _parameters())
def test_case(
    benchmark: BenchmarkFixture, runner: run.Runner, table: list[Message], case: Case, way: str, clock: Replay
) -> None:
    runner.run([case])
    row = next(row for row in runner.rows if row["key"] == f"{case.key}/{way}")
    table.append(row)
    if row["status"] == "error":
        pytest.fail(row["reason"])
    if row["status"] != "ok":
        pytest.skip(f"{row['status']}: {row['reason']}")
    clock.load(row["times_s"])
    benchmark.pedantic(lambda: None, rounds=len(row["times_s"]))  # type: ignore[no-untyped-call]
    benchmark.extra_info.update({name: value for name, value in row.items() if name != "times_s"})
