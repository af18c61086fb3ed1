"""A case in a process of its own: what happens inside, and the watch that is kept over it.

Children are forked from a server that has loaded torch once. So a case costs no start-up, and none inherits what another left
behind. A child sends its rows as they come; whatever becomes of it, the parent has a reason.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.plans import CASE_MODULES
from benchmarks.registry import Case

Message = dict[str, Any]
Send = Callable[[Message], None]
POLL = 0.02
"""Seconds between looks at a child's memory: at 5 GB/s it takes 100 MB in between."""
PRELOADED = [
    "torch",
    "benchmarks.measure.timing",
    "benchmarks.measure.machine",
    *(f"benchmarks.cases.{name}" for name in CASE_MODULES),
]
"""What the server has loaded that children are forked from: 1 s of imports that no case pays. `preload` adds to it."""


@dataclass(frozen=True)
class Limits:
    """What a child may take: wall seconds, bytes of resident memory, seconds of timing for each way."""

    seconds: float
    memory: int
    budget: float


@dataclass(frozen=True)
class Outcome:
    """How a child ended: ``ok``, ``oom``, ``timeout`` or ``error``, and why."""

    status: str
    reason: str = ""


def _enter(writer: Connection, log: str, function: Callable[[Any, Send], None], argument: Any) -> None:
    """What runs in the child: `function(argument, send)`, its output in a file."""
    target = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(
            "1000", encoding="utf-8"
        )  # where memory ends, this process is stopped first
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    function(argument, lambda message: writer.send_bytes(json.dumps(message).encode()))
    writer.close()


def preload(modules: Iterable[str]) -> None:
    """Have the server load `modules` too, if it does not run yet; what cannot be imported is left to the cases.

    transformers' model takes 2.4 s, which two dozen cases would spend each.
    """
    PRELOADED.extend(module for module in dict.fromkeys(modules) if module not in PRELOADED)


def context() -> multiprocessing.context.BaseContext:
    """How children are made: forked from a server that has torch, where the system knows that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


def run_child(function: Callable[[Any, Send], None], argument: Any, limits: Limits, receive: Send) -> Outcome:
    """Run ``function(argument, send)`` in a child, hand its messages to `receive`, and end it at its limits.

    Both arguments must be importable by name or plain data. Returns how it ended; never raises for what the child did.
    """
    made = context()
    reader, writer = made.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace", suffix=".log") as log:
        child = made.Process(target=_enter, args=(writer, log.name, function, argument))  # type: ignore[attr-defined]
        child.start()
        writer.close()
        try:
            end = _watch(child, reader, limits, receive)
        finally:
            if child.is_alive():
                child.kill()
            child.join()
            reader.close()
        return end if end is not None else _verdict(child.exitcode, log)


def _watch(child: Any, reader: Connection, limits: Limits, receive: Send) -> Outcome | None:
    """Hand on what the child sends until it hangs up (None) or is at a limit."""
    from benchmarks.measure.timing import resident

    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            while reader.poll(POLL):
                receive(json.loads(reader.recv_bytes()))
        except (EOFError, OSError):
            child.join(timeout=5)
            return None
        held = resident("VmRSS", child.pid) or 0
        if held > limits.memory:
            return Outcome("oom", f"held {held / 2**30:.1f} GiB, the limit is {limits.memory / 2**30:.1f} GiB")
        if time.monotonic() > deadline:
            return Outcome("timeout", f"not done after {limits.seconds:.0f} s")


def _verdict(code: int | None, log: Any) -> Outcome:
    """How a child that hung up by itself ended."""
    if code == 0:
        return Outcome("ok")
    last = [line.strip() for line in log.read().splitlines() if line.strip()][-1:] or [""]
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return Outcome("error", f"the process died of {name} {last[0]}".strip())
    return Outcome("error", f"the process ended with code {code}: {last[0]}")


@dataclass(frozen=True)
class Job:
    """What a child is to measure: ways of one case, within a budget; what it may allocate on a GPU.

    With `times_only` it neither compares with the oracle nor looks at memory and the machine's rates: for a case that was
    measured in full before.
    """

    case: Case
    ways: tuple[str, ...]
    budget: float
    memory: int
    times_only: bool = False


def run_job(order: Job, send: Send) -> None:
    """The child's work: measure each way, and send ``{"way": ..., "started": true}`` before and the columns after."""
    for message in measure(order):
        send(message)


def measure(order: Job) -> Iterator[Message]:
    """Columns of each way of a case: peak memory first, then the check against the oracle, then time.

    Memory comes first because the check would leave freed memory behind, which is taken again unseen. A way that fails is
    a row that says so; without the check nothing is timed.
    """
    import torch

    from benchmarks import plans
    from benchmarks.measure import machine, timing

    case = order.case
    torch.manual_seed(0)
    if case.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, order.memory / total))
    operation, method = plans.find(case)
    yield {"way": order.ways[0], "started": True}
    peaks: dict[str, int | None] = {}
    returned: dict[str, int] = {}
    failed: dict[str, Message] = {}
    try:
        subject = method.make(case)
        work = operation.prepare(case, subject)
        if work.warm is not None:
            work.warm()
        if order.times_only:
            for way in order.ways:
                yield {"way": way, "started": True}
                work.calls[way]()
                cold = operation.cost(case, way).bound == "memory"
                times = timing.measure(work.calls[way], case.device, order.budget, cold=cold)
                yield {"way": way, "status": "ok", "reason": "", **times.columns()}
            return
        for way in order.ways:
            if way == "backward":
                continue  # needs the graph that a forward call keeps; its memory is that of "both"
            yield {"way": way, "started": True}
            try:
                if method.compiled:
                    work.calls[way]()
                peaks[way], result = timing.peak_memory(work.calls[way], case.device)
                returned[way] = timing.bytes_of(result)
                del result
            except Exception as error:
                failed[way] = failure(error)
        yield {"way": order.ways[0], "started": True}
        left = [way for way in order.ways if way not in failed]
        verify = (left == ["forward"] and operation.verify_forward) or operation.verify
        ratio = verify(case, subject) if left else 0.0
        rates = machine.rates(case.device, getattr(torch, case.dtype))
    except Exception as error:
        for way in order.ways:
            yield {"way": way, **(failed.get(way) or failure(error))}
        return
    for way in sorted(order.ways, key=lambda way: way == "backward"):
        yield {"way": way, "started": True}
        if way in failed:
            yield {"way": way, **failed[way]}
            continue
        try:
            if way == "backward" and method.compiled:
                _keep_compiled_graphs()
            cost = operation.cost(case, way)
            times = timing.measure(work.calls[way], case.device, order.budget, cold=cost.bound == "memory")
        except Exception as error:
            yield {"way": way, **failure(error)}
            continue
        row: Message = {"way": way, "status": "ok", "reason": "", **times.columns(), "peak_bytes": peaks.get(way)}
        row["result_bytes"] = returned.get(way)
        row |= {"error_ratio": float(f"{ratio:.4g}"), "config": work.config, "clock_mhz": machine.clock_mhz(case.device)}
        yield row | rates | _achieved(cost, times, rates) | (work.facts or {})


def _keep_compiled_graphs() -> None:
    """Let a compiled graph run backward more than once: compiled anew, it gives none of its buffers away.

    Until then it may, because that saves memory, which is measured.
    """
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False


def _achieved(cost: Any, times: Any, rates: dict[str, float]) -> Message:
    """What a time comes to: TFLOP/s, GB/s, things a second, and the share of the machine's matrix product or copy."""
    seconds = times.median if times.graph is None else times.graph
    row = {**asdict(cost), "tflops": cost.flops / seconds / 1e12, "gbs": cost.bytes / seconds / 1e9}
    if cost.bound == "compute":
        row["of_machine"] = row["tflops"] / rates["matmul_tflops"]
    else:
        row["of_machine"] = row["gbs"] / rates["copy_gbs"]
    if cost.per:
        row["rate"] = cost.count / seconds
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def failure(error: BaseException) -> Message:
    """Status and reason of an exception: out of memory, refused, wrong, or an error."""
    import torch

    from igpt_kernels.backends import BackendUnavailable

    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return {"status": "oom", "reason": text or "out of memory"}
    if isinstance(error, BackendUnavailable):
        return {"status": "skipped", "reason": text}
    if isinstance(error, AssertionError):
        return {"status": "error", "reason": f"wrong result, not timed: {text}"}
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(place[0].filename).name}:{place[0].lineno})" if place else ""
    return {"status": "error", "reason": f"{type(error).__name__}: {text}{where}"}
