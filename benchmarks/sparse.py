"""Sparse attention on this CPU: time beside torch's dense and FlexAttention, and peak memory as images grow.

    python -m benchmarks.sparse            # both tables, about five minutes on two cores
    python -m benchmarks.sparse speed
    python -m benchmarks.sparse memory

A case is timed only after its output and gradients were checked against float64 on one head. Every case is a process of its
own. Rows go to ``benchmarks/results/<machine>/sparse.jsonl`` as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_kernels import layouts, testing
from igpt_kernels._torch.attention import free_memory
from igpt_kernels.attention import block_sparse_attention
from igpt_kernels.layouts import SparseLayout
from igpt_kernels.reference import attention_reference

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_DIM = 8, 64  # Image GPT S
SPEED = [("local2d:7", 64), ("local2d:7", 128), ("row_column", 64), ("strided", 64), ("local2d:7", 48), ("row_column", 32)]
MEMORY = [("local2d:7", side) for side in (32, 64, 128, 256)]
METHODS = ("ours", "sdpa", "flex")
WALL = 300  # seconds a case may take
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(heads: int, tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v [1,H,T,D] float32 as views of a fused tensor, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, tokens, 3, heads, HEAD_DIM, generator=generator)
    grad = torch.randn(1, heads, tokens, HEAD_DIM, generator=generator)
    return [fused[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3)], grad


def method(name: str, layout: SparseLayout) -> Attention:
    """One of `METHODS` for a layout: ours, torch's dense causal attention, or FlexAttention with the same mask, compiled."""
    if name == "ours":
        return lambda q, k, v: block_sparse_attention(q, k, v, layout)
    if name == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name == "eager":
        return lambda q, k, v: attention_reference(q, k, v)[0]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = layout.dense_mask()
    block_mask = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, layout.tokens, layout.tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)  # type: ignore[return-value]


def exact(qkv: Sequence[Tensor], grad: Tensor, layout: SparseLayout, dtype: torch.dtype) -> testing.AttentionResult:
    """The oracle at `dtype`, 512 queries at a time: its scores are T x T."""
    q, k, v = (x.detach().to(dtype) for x in qkv)
    parts = []
    for start in range(0, q.shape[2], 512):
        rows = slice(start, min(start + 512, q.shape[2]))
        seen = layout.permits(torch.arange(rows.start, rows.stop)[:, None], torch.arange(k.shape[2])[None])
        some = [q[:, :, rows].requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        out = attention_reference(*some, causal=False, mask=seen)[0]
        parts.append((out.detach(), *torch.autograd.grad(out, some, grad[:, :, rows].to(dtype))))
    outs, dqs, dks, dvs = zip(*parts, strict=True)
    dk, dv = sum(dks, torch.zeros_like(k)), sum(dvs, torch.zeros_like(v))
    return testing.AttentionResult(torch.cat(outs, 2), None, torch.cat(dqs, 2), dk.detach(), dv.detach())


def verify(name: str, layout: SparseLayout) -> float:
    """The share of the error budget that one head uses; AssertionError beyond 1."""
    qkv, grad = inputs(1, layout.tokens)
    shown = layouts.dense(layout.height, layout.width) if name == "sdpa" else layout
    truth, eager = (exact(qkv, grad, shown, dtype) for dtype in (torch.float64, torch.float32))
    if name == "flex":
        # It has no backward pass on the CPU, and refuses inputs that want one.
        out = method(name, layout)(*(x.detach() for x in qkv))
        return testing.error_ratio(out, truth.out, eager.out, factor=testing.OUTPUT_FACTOR)
    return testing.check_attention(testing.attention_result(method(name, layout), qkv, grad), truth, eager, floor=100.0)


def seconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Median, least and most seconds of 5 runs (3 where one takes over 3 s), after one to warm up."""
    start = time.perf_counter()
    run()
    times = []
    for _ in range(3 if time.perf_counter() - start > 3 else 5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def speed(name: str, text: str, side: int) -> dict[str, object]:
    """A row: a method checked and timed, forward, and forward and backward."""
    layout = layouts.parse(text, side, side)
    row: dict[str, object] = {"tile_density": layout.tile_density, "error_ratio": verify(name, layout)}
    qkv, grad = inputs(HEADS, layout.tokens)
    run = method(name, layout)

    plain = [x.detach() for x in qkv]
    row["forward_s"] = seconds(lambda: run(*plain))
    if name != "flex":
        row["both_s"] = seconds(lambda: torch.autograd.grad(run(*qkv), qkv, grad))
    return row


def resident(field: str) -> int:
    """Bytes that this process holds (VmRSS) or held at most since the peak was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def memory(name: str, text: str, side: int) -> dict[str, object]:
    """A row: peak memory of forward and backward beyond the inputs, or what it would be."""
    layout = layouts.parse(text, side, side)
    if name == "eager":
        # Scores, their masked copy, weights and their gradients: four squares at once at the least.
        predicted = 4 * 4 * HEADS * layout.tokens**2
        if predicted > (free_memory(torch.device("cpu")) or 0) // 2:
            return {"status": "oom", "predicted_bytes": predicted}
    warm, grad = inputs(HEADS, 256)
    method(name, layouts.parse(text, 16, 16))(*warm).backward(grad)
    qkv, grad = inputs(HEADS, layout.tokens)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start = time.perf_counter()
    method(name, layout)(*qkv).backward(grad)
    return {"peak_bytes": resident("VmHWM") - before, "both_s": time.perf_counter() - start}


def case(kind: str, name: str, text: str, side: int) -> dict[str, object]:
    """A row from a process of its own, with a limit on its time."""
    command = [sys.executable, "-m", "benchmarks.sparse", "--case", kind, name, text, str(side)]
    facts: dict[str, object] = {"kind": kind, "method": name, "pattern": text, "side": side, "heads": HEADS, "D": HEAD_DIM}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WALL, check=False)
    except subprocess.TimeoutExpired:
        return facts | {"status": "timeout"}
    if done.returncode:
        return facts | {"status": "error", "reason": done.stderr.strip().splitlines()[-1:]}
    return facts | {"status": "ok"} | json.loads(done.stdout.splitlines()[-1])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, object]:
    """Versions, machine and revision."""

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "kind": "environment",
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.sparse " + " ".join(sys.argv[1:]),
        "revision": output("git", "rev-parse", "HEAD"),
        "changed": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "cpu": model,
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _speed_table(write: Callable[[dict[str, object]], None]) -> bool:
    print(f"\nmilliseconds, batch 1, {HEADS} heads of {HEAD_DIM}, float32; x: times as long as ours")
    print("pattern     image    tile density  method  forward       x   forward+backward       x   error/budget")
    good = True
    for text, side in SPEED:
        ours: dict[str, object] = {}
        for name in METHODS:
            row = case("speed", name, text, side)
            write(row)
            good = good and row["status"] == "ok"
            ours = row if name == "ours" else ours
            start = f"{text:11} {side:3} × {side:<3}"
            if row["status"] != "ok":
                print(f"{start}                {name:6}  {row['status']}: {row.get('reason', '')}", flush=True)
                continue
            cells = []
            for way in ("forward_s", "both_s"):
                if way in row and way in ours:
                    mine, theirs = row[way][0], ours[way][0]  # type: ignore[index]
                    cells.append(f"{1e3 * mine:8.1f} {mine / theirs:7.2f}")
                else:
                    cells.append("       -       -")
            print(
                f"{start} {row['tile_density']:12.3f}  {name:6} {cells[0]}          {cells[1]}   {row['error_ratio']:12.2f}",
                flush=True,
            )
    return good


def _memory_table(write: Callable[[dict[str, object]], None]) -> bool:
    print(f"\npeak memory of forward and backward beyond the inputs, MiB; batch 1, {HEADS} heads of {HEAD_DIM}, float32")
    print("pattern     image      tokens      ours  bytes a token   sdpa (dense, fused)   eager (dense)")
    good = True
    for text, side in MEMORY:
        cells = []
        for name in ("ours", "sdpa", "eager"):
            row = case("memory", name, text, side)
            write(row)
            if "peak_bytes" in row:
                cells.append(f"{int(row['peak_bytes']) / 2**20:.0f}")  # type: ignore[call-overload]
                if name == "ours":
                    cells.append(f"{int(row['peak_bytes']) / side**2:.0f}")  # type: ignore[call-overload]
            elif "predicted_bytes" in row:
                cells.append(f"{int(row['predicted_bytes']) / 2**20:,.0f} predicted")  # type: ignore[call-overload]
            else:
                good = good and (name == "sdpa" and row["status"] == "timeout")
                cells.append(str(row["status"]))
        print(
            f"{text:11} {side:3} × {side:<3} {side * side:8,} {cells[0]:>9} {cells[1]:>14} {cells[2]:>21} {cells[3]:>15}",
            flush=True,
        )
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if a case failed."""
    parser = argparse.ArgumentParser(description="sparse attention on this CPU: time and memory")
    parser.add_argument("tables", nargs="*", default=["speed", "memory"], help="speed, memory; both when none is named")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        kind, name, text, side = options.case
        print(json.dumps({"speed": speed, "memory": memory}[kind](name, text, int(side))))
        return 0
    for table in options.tables:
        if table not in ("speed", "memory"):
            parser.error(f"tables must be of speed, memory; got {table}")
    facts = environment()
    folder = RESULTS / f"cpu-{platform.machine()}-{cores()}-cores"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}")
    with (folder / "sparse.jsonl").open("a", encoding="utf-8") as file:

        def write(row: dict[str, object]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        write(facts)
        good = [{"speed": _speed_table, "memory": _memory_table}[table](write) for table in options.tables]
    print(f"\nrows are in {folder / 'sparse.jsonl'}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
