"""The loop of a run: which cases are worth starting, and a row in the file for each, whatever becomes of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plans
from benchmarks.measure import worker
from benchmarks.measure.worker import Job, Limits, Message, Outcome
from benchmarks.registry import Case
from benchmarks.report import tables
from igpt.errors import DataError
from igpt.files import json_lines

CALLS = 5
"""Calls of the slowest way that a case takes, for each of its ways: for memory, for the check, two or three that are timed."""
MARGIN = 1.5
"""How far below the machine's matrix product a lower bound of time is taken: a turbo clock must not hide a feasible case."""


@dataclass(frozen=True)
class Settings:
    """How cases are run.

    Attributes:
        out: folder of ``results.jsonl``.
        seconds: wall seconds a case may take.
        budget: seconds of timing for each way.
        memory: bytes a case may take; None: 80 % of what is free.
        minutes: no case is started after that long; None: all are.
        resume: go on with the file that is there.
    """

    out: Path
    seconds: float
    budget: float
    memory: int | None = None
    minutes: float | None = None
    resume: bool = False


# A case compares its result with the oracle before it is timed. The check at first use would compile more in every child.
os.environ.setdefault("IGPT_KERNELS_SELF_CHECK", "0")


def probe(device: str, send: worker.Send) -> None:
    """A child's look at the machine, so that the parent holds no GPU memory: environment, rates, free bytes."""
    import torch

    from benchmarks.measure import machine

    facts = machine.environment(device, ["python", "-m", "benchmarks"])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    send({"environment": facts, "rates": machine.rates(device, dtype), "available": machine.available(device)})


def probe_machine(device: str) -> Message:
    """What `probe` finds.

    Raises:
        RuntimeError: the device does not answer, with the child's last words.
    """
    found: Message = {}
    end = worker.run_child(probe, device, Limits(180, 1 << 50, 0), found.update)
    if end.status != "ok" or not found:
        raise RuntimeError(f"device {device} does not answer: {end.reason or 'no reply'}")
    return found


def read(path: Path) -> list[Message]:
    """The lines of a results file; a last line that a crash cut short is dropped.

    Raises:
        ValueError: a line in the middle is no JSON object.
    """
    try:
        return [row for _, row in json_lines(path)]
    except DataError as error:
        raise ValueError(str(error)) from error


class File:
    """``results.jsonl``, to which lines are added one by one, each on disk before the next case begins."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read(path) if resume and path.exists() else []
        if self.rows:  # without the line that a crash cut short
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, row: Message) -> None:
        """Append a line."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()


def _words(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


class Runner:
    """Runs the cases of a selection; `show` is called with each row."""

    def __init__(self, settings: Settings, facts: Message, show: Callable[[Message], None]) -> None:
        self.settings = settings
        self.show = show
        self.environment: Message = facts["environment"]
        self.rates: dict[str, float] = facts["rates"]
        self.memory = int(0.8 * facts["available"]) if settings.memory is None else settings.memory
        self.file = File(settings.out / "results.jsonl", resume=settings.resume)
        if not any(row.get("id") == self.environment["id"] for row in self.file.rows):
            self.file.add({**self.environment, "limits": {"seconds": settings.seconds, "memory": self.memory}, **self.rates})
        self.left = 0

    @property
    def rows(self) -> list[Message]:
        """Rows of measurements, those of earlier runs into the same file included."""
        return [row for row in self.file.rows if row.get("kind") == "row"]

    def run(self, cases: Sequence[Case]) -> list[Message]:
        """Every case that has no row yet; `left` counts those for which time ran out."""
        began = time.monotonic()
        done = {row["key"] for row in self.rows}
        for place, case in enumerate(cases):
            operation, _ = plans.find(case)
            ways = [way for way in operation.ways_on(case.device) if f"{case.key}/{way}" not in done]
            if not ways:
                continue
            if self.settings.minutes is not None and time.monotonic() - began > 60 * self.settings.minutes:
                self.left = len(cases) - place
                break
            self._case(case, ways)
        return self.rows

    def _add(self, case: Case, way: str, columns: Message) -> None:
        row = {"kind": "row", "key": f"{case.key}/{way}", **asdict(case), "way": way, **columns}
        row["environment"], row["revision"] = self.environment["id"], self.environment["revision"]
        row |= tables.ratios(row, self.rows)
        self.file.add(row)
        self.show(row)

    def _case(self, case: Case, ways: list[str]) -> None:
        """Rows for some ways of a case: refused, predicted, or measured in a child."""
        left = []
        for way in ways:
            columns = self._foreseen(case, way)
            if columns is None:
                left.append(way)
            else:
                self._add(case, way, columns)
        while left:
            since, ended = [time.monotonic()], [left[0]]
            finished: list[str] = []

            def receive(message: Message) -> None:
                way = message.pop("way")
                if message.pop("started", False):
                    ended[0] = way  # noqa: B023 - called within this turn of the loop
                    return
                finished.append(way)  # noqa: B023
                now = time.monotonic()
                self._add(case, way, {**message, "wall_s": round(now - since[0], 1)})  # noqa: B023
                since[0] = now  # noqa: B023

            order = Job(case, tuple(left), self.settings.budget, self.memory)
            end = worker.run_child(worker.run_job, order, self._limits(case), receive)
            left = [way for way in left if way not in finished]
            if left:  # the child was stopped or died in one of them; the others get a child of their own
                blamed = ended[0] if ended[0] in left else left[0]
                self._add(case, blamed, _columns(end, time.monotonic() - since[0]))
                left.remove(blamed)

    def _limits(self, case: Case) -> Limits:
        resident = self.memory if case.device == "cpu" else 1 << 50  # a GPU's memory is limited by its allocator
        return Limits(self.settings.seconds, resident, self.settings.budget)

    def _foreseen(self, case: Case, way: str) -> Message | None:
        """Columns of a case that is not worth starting, or None."""
        operation, method = plans.find(case)
        reason = plans.unavailable_reason(case, way)
        if reason:
            return {"status": "skipped", "reason": reason}
        if method.memory is not None and way != "backward":
            size, what = method.memory(case, way)
            if size > self.memory:
                words = f"predicted: {what} take {_words(size)}, the limit is {_words(self.memory)}"
                return {"status": "oom", "reason": words, "predicted_bytes": size}
        cost = operation.cost(case, way)
        limit = self.settings.seconds / (CALLS * len(operation.ways))
        by_smaller = self._by_smaller(case, way, cost.flops or cost.bytes or cost.count, limit)
        if by_smaller is not None:
            return by_smaller
        least = cost.flops / 1e12 / self.rates["matmul_tflops"] / MARGIN if cost.bound == "compute" else 0.0
        if least > limit:
            words = f"predicted: {cost.flops / 1e12:.3g} TFLOP take over {least:.0f} s a call here, the limit is {limit:.0f} s"
            return {"status": "timeout", "reason": words, "predicted_s": float(f"{least:.4g}")}
        return None

    def _by_smaller(self, case: Case, way: str, work: float, limit: float) -> Message | None:
        """The time that the largest smaller image of the same method leads to expect, if it is too long."""
        alike = ("suite", "op", "method", "preset", "dtype", "device")
        smaller = [
            row
            for row in self.rows
            if row["way"] == way and row["tokens"] < case.tokens and all(row[name] == getattr(case, name) for name in alike)
        ]
        if not smaller:
            return None
        last = max(smaller, key=lambda row: row["tokens"])
        seconds = last.get("median_s") or last.get("predicted_s")
        if last["status"] == "timeout" and not seconds:
            return {"status": "timeout", "reason": f"predicted: {last['resolution']}² already was: {last['reason']}"}
        if not seconds:
            return None
        operation, _ = plans.find(case)
        before = operation.cost(Case.of(last), way)
        expected = seconds * work / (before.flops or before.bytes or before.count)
        if expected <= limit:
            return None
        words = f"predicted: {expected:.0f} s a call by the time of {last['resolution']}², the limit is {limit:.0f} s"
        return {"status": "timeout", "reason": words, "predicted_s": float(f"{expected:.4g}")}


def _columns(end: Outcome, wall: float) -> Message:
    if end.status == "ok":
        return {"status": "error", "reason": "the process ended without a result"}
    return {"status": end.status, "reason": end.reason, "wall_s": round(wall, 1)}


def named(rows: Sequence[Message], **wanted: Any) -> list[Message]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
