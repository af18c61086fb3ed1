"""Two sides in turn: the test of their medians, when it is decided, and the process that measures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import plans
from benchmarks.measure import rounds
from benchmarks.measure.rounds import LEAST, LEVEL, MOST, Pair, Side
from benchmarks.measure.worker import Job, Limits, Message
from benchmarks.plans import Selection
from benchmarks.registry import Case

ROOT = Path(__file__).resolve().parents[3]
CASE = Case("fused", "rms_norm", "ours", "S", 32, 1, 8, 64, 16, "float32", "cpu")
LIMITS = Limits(120.0, 1 << 50, 0.01)


class Planned(Side):
    """A side with given times instead of a process; infinity is a failure."""

    def __init__(self, times: list[float]) -> None:
        self.times = list(times)
        self.asked = 0

    def measure(self, job: Job, limits: Limits) -> dict[str, Message]:
        self.asked += 1
        time = self.times[(self.asked - 1) % len(self.times)]
        row = (
            {"status": "ok", "median_s": 9 * time, "times_s": [9 * time, time]}
            if math.isfinite(time)
            else {"status": "error", "reason": "lost"}
        )
        return {way: dict(row) for way in job.ways}


def judged(old: list[float], new: list[float], percent: float = 10.0) -> Pair:
    pair = Pair("x/forward", CASE, "forward")
    rounds.run(Planned(old), Planned(new), [pair], LIMITS, percent, lambda text: None)
    return pair


def test_chance_is_that_of_the_exact_test() -> None:
    assert rounds.chance([1, 2, 3], [4, 5, 6]) == 1 / 20
    assert rounds.chance([4, 5, 6], [1, 2, 3]) == 1.0
    assert rounds.chance(range(8), range(8, 16)) == 1 / math.comb(16, 8) < LEVEL < 1 / math.comb(14, 7)
    scipy = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(10):
        old, new = generator.random(6), generator.random(6)
        wanted = scipy.mannwhitneyu(new, old, alternative="greater", method="exact").pvalue
        assert rounds.chance(old.tolist(), new.tolist()) == pytest.approx(wanted)


def test_equal_sources_pass_and_a_slowdown_is_found() -> None:
    """Times with the spread of a shared machine: 8 % from process to process, and one in ten takes half as long again."""
    generator = np.random.default_rng(1)

    def times(factor: float) -> list[float]:
        slow = generator.random(MOST) < 0.1
        return (factor * np.exp(generator.normal(0, 0.08, MOST)) * np.where(slow, 1.5, 1.0)).tolist()

    wrong = sum(judged(times(1.0), times(1.0)).is_slower(10.0) for _ in range(300))
    found = sum(judged(times(1.0), times(1.3)).is_slower(10.0) for _ in range(100))
    assert wrong == 0
    assert found > 85


def test_when_it_is_decided() -> None:
    same = judged([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    assert (len(same.new), same.verdict, same.is_slower(10.0)) == (LEAST, "same", False)
    slow = judged([1.0 + 0.01 * i for i in range(8)], [1.3 + 0.01 * i for i in range(8)])
    assert (len(slow.new), slow.verdict, slow.is_slower(10.0)) == (8, "slower", True)
    assert not slow.is_slower(40.0)
    noise = judged([1.0, 2.0], [1.2, 2.4])
    assert len(noise.new) == MOST
    assert (noise.verdict, noise.is_slower(10.0)) == ("same", False)
    fast = judged([2.0, 2.1, 2.2], [1.0, 1.1, 1.2])
    assert (len(fast.new), fast.is_slower(10.0)) == (LEAST, False)


def test_failures() -> None:
    lost = judged([1.0], [math.inf])
    assert lost.verdict == "ok -> error"
    assert lost.is_slower(10.0)
    assert not judged([math.inf], [math.inf]).is_slower(10.0)
    assert judged([math.inf], [math.inf]).verdict == "same"
    assert not judged([1.0, math.inf, 1.0], [math.inf]).is_slower(10.0), "it did not always run then"
    assert not judged([math.inf], [1.0]).is_slower(10.0)


def test_sides_take_turns() -> None:
    order: list[str] = []

    class Noted(Planned):
        def __init__(self, name: str) -> None:
            super().__init__([1.0])
            self.name = name

        def measure(self, job: Job, limits: Limits) -> dict[str, Message]:
            order.append(self.name + job.ways[0][0])
            return super().measure(job, limits)

    pairs = [Pair(way, CASE, way) for way in ("forward", "both")]
    rounds.run(Noted("old"), Noted("new"), pairs, LIMITS, 10.0, lambda text: None)
    assert order == ["oldf", "newf", "newf", "oldf"] * 2, "one case with all its ways, the first side by turns"
    assert all(len(pair.old) == len(pair.new) == LEAST for pair in pairs)


@pytest.mark.slow
def test_a_process_measures_a_case() -> None:
    (case,) = plans.plan(Selection("cpu", suites=("fused",), ops=("quick_gelu",), methods=("ours",), shape=(1, 2, 64, 16)))
    with Side(ROOT) as side:
        rows = side.measure(Job(case, ("forward", "both"), 0.01, 1 << 40), LIMITS)
        assert {way: row["status"] for way, row in rows.items()} == {"forward": "ok", "both": "ok"}
        assert all(row["median_s"] > 0 for row in rows.values())
        short = side.measure(Job(case, ("forward",), 0.01, 1 << 40), Limits(0.01, 1 << 50, 0.01))
        assert short["forward"]["status"] == "timeout"
        elsewhere = replace(case, suite="palette", op="lookup", method="pillow", device="cuda")
        refused = side.measure(Job(elsewhere, ("forward",), 0.01, 1), LIMITS)
        assert refused["forward"]["status"] == "skipped"
        assert side._process is not None
        side._process.kill()
        side._process.wait()
        with pytest.raises(RuntimeError, match="ended"):
            side.measure(Job(case, ("forward",), 0.01, 1 << 40), LIMITS)
