"""Time and memory of one call, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FLUSH = 256 << 20
"""Bytes written before each timed call on a GPU: more than any L2 holds (H200: 60 MB)."""
SHORT = 300e-6
"""Seconds below which events may time Python and not the work: then a CUDA graph is timed as well.

On an H100 a call of `flash_attention` with one small image took 109 µs by events, of which the kernel needs less than 10.
"""


@dataclass(frozen=True)
class Times:
    """Seconds of single calls; `graph` is that of one call inside a CUDA graph."""

    samples: tuple[float, ...]
    graph: float | None = None

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The sample that `share` of them do not exceed."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * (len(ordered) - 1) + 0.5))]

    def columns(self) -> dict[str, object]:
        """As columns of a row, six digits."""
        rounded = [float(f"{value:.6g}") for value in self.samples]
        row: dict[str, object] = {
            "median_s": statistics.median(rounded),
            "p20_s": float(f"{self.quantile(0.2):.6g}"),
            "p80_s": float(f"{self.quantile(0.8):.6g}"),
            "n": len(rounded),
            "times_s": rounded,
        }
        return row | ({} if self.graph is None else {"graph_s": float(f"{self.graph:.6g}")})


def measure(run: Callable[[], object], device: str, budget: float, *, cold: bool = False) -> Times:
    """Time `run`, which was called before, within about `budget` seconds: at least 2 calls on a CPU, 5 on a GPU.

    Single calls on a GPU find its L2 cache flushed. Those in a CUDA graph do only if `cold`.
    """
    return gpu_times(run, budget, cold=cold) if device == "cuda" else cpu_times(run, budget)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection in the middle of a call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cpu_times(run: Callable[[], object], budget: float, most: int = 40) -> Times:
    """Seconds of each call, at least 3 of them (2 above 1.5 s); calls far below a millisecond are timed several at once."""
    with _uncollected():
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        inner = max(1, int(5e-4 / max(first, 1e-9)))
        count = min(max(int(budget / max(first * inner, 1e-9)), 3 if first < 1.5 else 2), most)
        samples = [] if inner > 1 or first < budget / 10 else [first]  # a long call needs no warm-up beyond the check's
        while len(samples) < count:
            start = time.perf_counter()
            for _ in range(inner):
                run()
            samples.append((time.perf_counter() - start) / inner)
    return Times(tuple(samples))


def event_times(run: Callable[[], object], repeats: int, flush: torch.Tensor | None) -> list[float]:
    """Milliseconds of each call by events. All are launched before any is waited for, so that the GPU never idles."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        if flush is not None:
            flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def gpu_times(run: Callable[[], object], budget: float, *, cold: bool = False) -> Times:
    """GPU time of each call by events, the L2 cache flushed before each; and in a CUDA graph where it is short."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    with _uncollected():
        first = statistics.median(event_times(run, 3, flush)) / 1e3
        for _ in range(min(25, int(budget / 2 / max(first, 1e-5)))):
            run()
        repeats = min(max(int(budget / max(first, 2e-4)), 5), 100)
        samples = [ms / 1e3 for ms in event_times(run, repeats, flush)]
    graph = graph_time(run, flush if cold else None) if statistics.median(samples) < SHORT else None
    return Times(tuple(samples), graph)


def captured(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """`calls` calls of `run` in a CUDA graph: what is returned replays them, without a launch from Python for each.

    Raises:
        RuntimeError: the call cannot be captured: it waits for the device, or allocates what a graph may not.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    replay: Callable[[], None] = graph.replay
    return replay


def graph_time(run: Callable[[], object], flush: torch.Tensor | None = None, calls: int = 20) -> float | None:
    """Seconds of a call inside a CUDA graph of `calls` of them; None where the call cannot be captured.

    With `flush`, that tensor is written before each call. The time of a graph that only writes it is taken off.
    """

    def seconds(call: Callable[[], object]) -> float:
        return statistics.median(event_times(captured(call, calls), 20, None)) / 1e3 / calls

    try:
        if flush is None:
            return seconds(run)
        return max(0.0, seconds(lambda: (flush.zero_(), run())) - seconds(flush.zero_)) or None
    except RuntimeError:
        return None


def milliseconds(run: Callable[[], object], repeats: int = 20) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of GPU time of `repeats` calls, by events, after 5 to warm up, caches warm."""
    for _ in range(5):
        run()
    times = sorted(event_times(run, repeats, None))
    return times[repeats // 2], times[repeats // 5], times[repeats * 4 // 5]


def resident(field: str = "VmRSS", pid: int | str = "self") -> int | None:
    """Bytes that a process holds (VmRSS), or held at most since its peak was reset (VmHWM); None if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), None)


def give_back_freed() -> None:
    """Hand freed memory back to the system, so that it is not taken for memory in use (glibc only)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bytes_of(result: object) -> int:
    """Bytes of the tensors in what a call returned."""
    if isinstance(result, torch.Tensor):
        return result.nbytes
    return sum(map(bytes_of, result)) if isinstance(result, (tuple, list)) else 0


def peak_memory(run: Callable[[], object], device: str) -> tuple[int | None, Any]:
    """Bytes that `run` took beyond what was there before, at its peak, and what it returned; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    give_back_freed()
    held = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again from what is held now
    except OSError:
        return None, run()
    result = run()
    most = resident("VmHWM")
    return (None if held is None or most is None else max(most - held, 0)), result
