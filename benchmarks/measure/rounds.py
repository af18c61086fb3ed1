"""Two checkouts measured case by case, old and new in turn, until it is decided which is slower.

A machine's speed drifts over minutes, and all calls of one process have the same places in memory. So each side is a process
of its own checkout. A round times one case on both, one right after the other, in new children. A test compares the times
of all rounds.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

from benchmarks import plans
from benchmarks.measure import worker
from benchmarks.measure.worker import Job, Limits, Message
from benchmarks.registry import Case

LEAST = 4
"""Rounds of every case; even, because the side that is timed first in a round is the slower one."""

MOST = 20
"""Rounds of a case that is not decided before."""

LEVEL = 0.0002
"""How rarely times of equal sources may lie so by chance, in one look at one case; 8 rounds are the fewest that can.

Simulated: one process in ten takes half as long again, the others spread by 8 %. Then a case of equal sources fails 1 time in
2,000, and one that is slower by 30 % is found 9 times in 10.
"""


def chance(old: Sequence[float], new: Sequence[float]) -> float:
    """How often times of one distribution would lie like these, or `new` longer still: Mann-Whitney's test, exact."""
    above = sum(a < b for a in old for b in new)
    counts = _orders(len(old), len(new))
    return sum(counts[above:]) / sum(counts)


@functools.cache
def _orders(old: int, new: int) -> tuple[int, ...]:
    """Of all orders of so many times: how many have 0, 1, 2, ... pairs in which the new time is the longer."""
    if not old or not new:
        return (1,)
    # The longest time is an old one, which adds no pair; or a new one, which adds one for each old time.
    without, with_new = _orders(old - 1, new), (0,) * old + _orders(old, new - 1)
    return tuple(a + b for a, b in itertools.zip_longest(without, with_new, fillvalue=0))


@dataclass
class Pair:
    """One way of a case on both sides: a row a round."""

    key: str
    case: Case
    way: str
    old: list[Message] = field(default_factory=list)
    new: list[Message] = field(default_factory=list)

    @property
    def both_ok(self) -> bool:
        """Whether there are times of both in each round."""
        return bool(self.old) and all(row["status"] == "ok" for row in (*self.old, *self.new))

    @property
    def times(self) -> tuple[list[float], list[float]]:
        """Old and new, a time a round: that of its fastest call, because other load only ever adds time."""
        old, new = ([float(min(row["times_s"])) for row in rows] for rows in (self.old, self.new))
        return old, new

    @property
    def medians(self) -> tuple[float, float]:
        """The middle one of the rounds' times, old and new."""
        old, new = self.times
        return statistics.median(old), statistics.median(new)

    @property
    def ratio(self) -> float:
        """New time over old time: the middle one of the rounds' ratios, because a round is timed within seconds."""
        return statistics.median(new / old for old, new in zip(*self.times, strict=True))

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` beyond chance, else ``same``; a status that changed is its own verdict."""
        if not self.both_ok:
            before, now = ("/".join(sorted({row["status"] for row in rows})) for rows in (self.old, self.new))
            return "same" if before == now else f"{before} -> {now}"
        old, new = self.times
        if chance(old, new) <= LEVEL:
            return "slower"
        return "faster" if chance(new, old) <= LEVEL else "same"

    def is_slower(self, percent: float) -> bool:
        """Slower by more than `percent`, beyond chance; or what always ran then and never does now."""
        if self.both_ok:
            return self.ratio > 1 + percent / 100 and self.verdict == "slower"
        ran = all(row["status"] == "ok" for row in self.old)
        return ran and all(row["status"] in ("error", "oom", "timeout") for row in self.new)

    def is_decided(self, percent: float) -> bool:
        """Whether more rounds are not worth their time: after `LEAST` where it is nowhere near slower, else when it is sure."""
        rounds = len(self.new)
        if rounds < LEAST or rounds % 2:
            return False
        near = self.both_ok and self.ratio > 1 + percent / 200
        return not near or rounds >= MOST or self.is_slower(percent)


class Side:
    """A checkout that measures: a process that runs there as long as this object is entered.

    Args:
        path: the checkout.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Side:
        # The checkout comes first on the path, so that its packages win over the installed ones.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.measure.rounds"],
            cwd=self._path,
            env={**os.environ, "PYTHONPATH": str(self._path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def measure(self, job: Job, limits: Limits) -> dict[str, Message]:
        """A row for each way of a case.

        Raises:
            RuntimeError: the process ended.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"job": asdict(job), "limits": asdict(limits)}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the process that measures {self._path} ended")
        found: dict[str, Message] = json.loads(answer)
        return found


def run(
    old: Side, new: Side, pairs: Sequence[Pair], limits: Limits, percent: float, show: Callable[[str], None]
) -> Sequence[Pair]:
    """Measure pairs in turn, case by case, round by round, until all are decided."""
    cases: dict[Case, list[Pair]] = {}
    for pair in pairs:
        cases.setdefault(pair.case, []).append(pair)
    for number in range(MOST):
        left = {case: mine for case, mine in cases.items() if not all(pair.is_decided(percent) for pair in mine)}
        if not left:
            break
        show(f"round {number + 1}: {len(left)} cases")
        for case, mine in left.items():
            job = Job(case, tuple(pair.way for pair in mine), limits.budget, limits.memory, times_only=True)
            turn = ((old, "old"), (new, "new")) if number % 2 == 0 else ((new, "new"), (old, "old"))
            for side, name in turn:
                rows = side.measure(job, limits)
                for pair in mine:
                    getattr(pair, name).append(rows[pair.way])
    return pairs


def measured(job: Job, limits: Limits) -> dict[str, Message]:
    """A row for each way of a case, from one child of this process."""
    refused = {way: plans.unavailable_reason(job.case, way) for way in job.ways}
    rows: dict[str, Message] = {way: {"status": "skipped", "reason": why} for way, why in refused.items() if why}
    ways = tuple(way for way in job.ways if way not in rows)
    if not ways:
        return rows

    def receive(message: Message) -> None:
        way = message.pop("way")
        if not message.pop("started", False):
            rows[way] = message

    if job.case.device != "cpu":  # its memory is limited by its allocator
        limits = Limits(limits.seconds, 1 << 50, limits.budget)
    end = worker.run_child(worker.run_job, replace(job, ways=ways), limits, receive)
    status = "error" if end.status == "ok" else end.status
    lost: Message = {"status": status, "reason": end.reason or "the process ended without a result"}
    return {way: rows.get(way, lost) for way in job.ways}


def serve() -> None:
    """Answer each line of stdin, a job and its limits, by a line of rows. What a child prints goes elsewhere."""
    for line in sys.stdin:
        order = json.loads(line)
        job = Job(**{**order["job"], "case": Case(**order["job"]["case"]), "ways": tuple(order["job"]["ways"])})
        worker.preload(plans.find(job.case)[1].loads)
        print(json.dumps(measured(job, Limits(**order["limits"]))), flush=True)


if __name__ == "__main__":
    serve()
