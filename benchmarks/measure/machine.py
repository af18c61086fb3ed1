"""The machine of a run: its name, versions, clocks and revision, and what a matrix product and a copy reach on it now."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from igpt_kernels import tuning
from igpt_kernels.memory import free_memory

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("torch", "triton", "numpy", "transformers", "scipy", "pillow", "scikit-learn")


def output(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cores() -> int:
    """Cores that this process may use. Not taken from igpt: revisions that are compared with may not have it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(field: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def slug(device: str) -> str:
    """The folder name of a machine: ``cpu-x86_64-2-cores``, ``nvidia-h200``."""
    return tuning.slug(torch.cuda.get_device_name()) if device == "cuda" else f"cpu-{platform.machine()}-{cores()}-cores"


def clock_mhz(device: str) -> float | None:
    """What the chip runs at now; None where it does not say."""
    if device == "cuda":
        text = output(
            "nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", str(torch.cuda.current_device())
        )
        with contextlib.suppress(ValueError, IndexError):
            return float(text.splitlines()[0])
        return None
    clocks = [float(text) for text in _cpuinfo("cpu MHz")]
    return round(statistics.mean(clocks)) if clocks else None


def versions() -> dict[str, str]:
    """Versions of what is measured and of its peers, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["torch"] = torch.__version__  # with its build, +cpu or +cu130
    return found


def environment(device: str, command: Sequence[str]) -> dict[str, object]:
    """Everything that numbers depend on, and `id`, a name for it that rows carry."""
    revision = os.environ.get("REVISION") or output("git", "rev-parse", "HEAD")  # a copy of the tree is told which it is
    facts: dict[str, object] = {
        "machine": slug(device),
        "processor": next(iter(_cpuinfo("model name")), platform.processor()),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "revision": revision or "unknown",
        "changed": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["table"] = tuning.table_for(torch.device("cuda", 0))
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "kind": "environment",
        "id": name,
        "date": now,
        "command": " ".join(command),
        "clock_mhz": clock_mhz(device),
        **facts,
    }


def available(device: str) -> int:
    """Bytes a case may take: what is free."""
    free = free_memory(torch.device(device))
    return 8 << 30 if free is None else free


def _seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    if device == "cuda":
        from benchmarks.measure.timing import milliseconds

        return milliseconds(run, repeats)[0] / 1e3
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a square matrix product on random normal values, and GB/s of a copy (read and written), now.

    Zeros would multiply 13 % faster than normal values on a GPU.
    """
    side = 8192 if device == "cuda" else 1024
    if not dtype.is_floating_point:
        dtype = torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = 2 * side**3 / _seconds(lambda: a @ b, device, 10 if device == "cuda" else 5)
    source = torch.empty((1 << 30 if device == "cuda" else 1 << 27), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _seconds(lambda: target.copy_(source), device, 10 if device == "cuda" else 3)
    return {"matmul_tflops": float(f"{matmul / 1e12:.4g}"), "copy_gbs": float(f"{copied / 1e9:.4g}")}
