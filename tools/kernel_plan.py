"""Variants of the kernels beside each other on one GPU: ``python -m tools.kernel_plan check`` and then ``time``.

`check` compiles every variant in processes side by side and compares it with the oracle at odd sizes. `time` measures those
that were right, one after another on an idle GPU, between two measurements of the machine itself. Each result is a line of
JSON, written at once. The first of each kernel and head dim is the configuration that ships.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.timing import captured, event_times
from igpt_kernels import layouts, testing, tuning
from igpt_kernels.reference import decode_attention_reference
from tools.kernels import IGNORE_INDEX, KERNELS, LOSS_WIDTH, Inputs
from tools.variants import HEADS, NAMES, PRODUCTS, RADII, SIDE, SPARSE_HEADS, TOKENS, Variant, variants

Config = tuning.Config
DEVICE = "cuda"


class _Nothing:
    """Stands in for a kernel that is not timed."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def only(kernel: str, delta: Tensor) -> Iterator[None]:
    """Inside, a backward launcher launches this one of its kernels; delta is the one given, its partner's result unset."""
    from igpt_kernels._triton import attention_backward, sparse_backward

    module = sparse_backward if kernel.startswith("sparse") else attention_backward
    other = kernel.replace("keys", "queries") if kernel.endswith("keys") else kernel.replace("queries", "keys")
    places = {f"_{other}_kernel": _Nothing(), "launch_flash_delta": lambda grad, out: delta}
    kept = {name: getattr(module, name) for name in places}
    for name, value in places.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def launcher(variant: Variant, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """A call of the variant; the backward partner runs as it ships."""
    call = KERNELS[variant.kernel].prepare(inputs)
    return lambda: call(variant.config, None)


def material(batch: int, heads: int, tokens: int, head_dim: int) -> list[Tensor]:
    """q, k, v and a gradient, random normal, bfloat16, as a fused projection gives them."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    fused = torch.randn(batch, tokens, 4, heads, head_dim, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    return [fused[:, :, i].transpose(1, 2) for i in range(4)]


def error(variant: Variant) -> float:
    """The largest share of its error budget that the variant takes, at odd sizes.

    Raises:
        AssertionError: beyond the budget.
    """
    kernel, worst = KERNELS[variant.kernel], 0.0
    sparse = variant.kernel.startswith("sparse")
    # Descriptors of rows need multiples of four tokens: sizes with and without them, tiles cut at the right and below.
    cases = [(25, 13, True), (17, 20, True), (32, 32, True)] if sparse else [(333, 1, True), (332, 1, False), (1024, 1, True)]
    for height, width, causal in cases:
        tensors = material(1, 2, height * width, variant.head_dim)
        inputs = Inputs(tuple(tensors), {"layout": layouts.local2d(height, width, 7)} if sparse else {"causal": causal})
        ours, exact, eager = launcher(variant, inputs)(), kernel.truth(inputs.to(torch.float64)), kernel.truth(inputs)
        floor = 8 * float(tensors[3].abs().max())
        factor = testing.GRADIENT_FACTOR if kernel.backward else testing.OUTPUT_FACTOR
        for mine, true, low in zip(ours, exact, eager, strict=True):
            worst = max(worst, testing.error_ratio(mine, true, low, factor=factor, floor=floor))
    return worst


def checked(variant: Variant) -> dict[str, object]:
    """The row of a check."""
    start = time.perf_counter()
    try:
        row: dict[str, object] = {"status": "ok", "error_share": round(error(variant), 4)}
    except Exception as failure:  # of the compiler, the launch or the numbers: each is a result
        row = {"status": "failed", "reason": f"{type(failure).__name__}: {str(failure)[:300]}"}
    return {"kind": "check", **variant.row(), **row, "wall_s": round(time.perf_counter() - start, 2)}


class Rows:
    """Lines of JSON, each on disk as soon as it is there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def work(out: Path, chosen: Sequence[Variant], index: int, workers: int, begin: int) -> int | None:
    """Check every variant whose number is `index` modulo `workers`, from number `begin` on.

    A fault on the GPU ends what a process can do there: then the number to begin with in another process, else None.
    """
    rows = Rows(out)
    for number, variant in enumerate(chosen):
        if number % workers != index or number < begin:
            continue
        row = checked(variant)
        rows.write(row)
        if "CUDA error" in str(row.get("reason")) or "Accelerator" in str(row.get("reason")):
            return number + 1
    return None


def check(out: Path, kernels: Sequence[str], seconds: float, workers: int) -> None:
    """Check every variant, in processes side by side."""
    command = [sys.executable, "-m", "tools.kernel_plan", "check", "--out", str(out), "--kernels", *kernels]
    children = [subprocess.Popen([*command, "--share", str(index), str(workers), "0"]) for index in range(workers)]
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    found = [row for row in found if row["kind"] == "check"]
    failed = [row for row in found if row["status"] != "ok"]
    total = len([*variants(kernels)])
    print(
        f"{len(found)} of {total} variants checked, {len(failed)} failed, {deadline - time.monotonic():.0f} s left", flush=True
    )
    for row in failed:
        name = [row[key] for key in NAMES]
        print(*name, row["reason"][:120], flush=True)


def times(run: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call by events, sorted, after two to warm up."""
    for _ in range(2):
        run()
    return sorted(event_times(run, repeats, None))


def graph_times(run: Callable[[], object], calls: int = 20) -> list[float]:
    """Milliseconds of a call inside a CUDA graph of `calls` of them: what is shorter than a launch from Python.

    Inputs beyond the L2 cache stay beyond it, because each call reads all of them.
    """
    return [sample / calls for sample in times(captured(run, calls), 10)]


def columns(samples: Sequence[float], flops: float | None = None, read: float | None = None) -> dict[str, object]:
    """Median and spread in milliseconds, and the rate."""
    median = samples[len(samples) // 2]
    row: dict[str, object] = {
        "median_ms": round(median, 5),
        "p20_ms": round(samples[len(samples) // 5], 5),
        "p80_ms": round(samples[len(samples) * 4 // 5], 5),
        "n": len(samples),
    }
    if flops is not None:
        row["tflops"] = round(flops / median / 1e9, 1)
    if read is not None:
        row["gbs"] = round(read / median / 1e6, 1)
    return row


def time_variant(variant: Variant, repeats: int) -> Iterator[dict[str, object]]:
    """The rows of a variant: one at 16,384 tokens, or for sparse kernels one for each window of 128 x 128 pixels."""
    part = variant.kernel.rsplit("_", 1)[1]
    if not variant.kernel.startswith("sparse"):
        tensors = material(1, HEADS, TOKENS, variant.head_dim)
        run = launcher(variant, Inputs(tuple(tensors), {"causal": True}))
        flops = PRODUCTS[part] * HEADS * variant.head_dim * TOKENS * (TOKENS + 1) / 2
        yield {"tokens": TOKENS, "heads": HEADS, "layout": "causal"} | timed(variant, run, flops, repeats, tensors)
        return
    for radius in RADII:
        layout = layouts.local2d(SIDE, SIDE, radius)
        tensors = material(2, SPARSE_HEADS // 2, SIDE * SIDE, variant.head_dim)
        run = launcher(variant, Inputs(tuple(tensors), {"layout": layout}))
        flops = PRODUCTS[part] * SPARSE_HEADS * variant.head_dim * layout.pairs
        row = {"tokens": SIDE * SIDE, "heads": SPARSE_HEADS, "layout": f"local2d:{radius}"}
        yield row | timed(variant, run, flops, repeats, tensors)


def timed(
    variant: Variant, run: Callable[[], object], flops: float, repeats: int, tensors: Sequence[Tensor]
) -> dict[str, object]:
    """Time of the variant's own kernel alone; of sparse kernels inside a CUDA graph, as they are shorter than their launch."""
    measured = partial(graph_times, calls=5) if variant.kernel.startswith("sparse") else partial(times, repeats=repeats)
    if variant.kernel.endswith("forward"):
        return columns(measured(run), flops)
    from igpt_kernels._triton.attention_backward import launch_flash_delta

    with only(variant.kernel, launch_flash_delta(tensors[3], tensors[0])):  # of the size of delta; q stands for the output
        return columns(measured(run), flops)


def machine_row() -> dict[str, object]:
    """What this GPU reaches now: a bfloat16 product, a copy, reading 32 MiB that lie in the L2 cache; and its clock."""
    from benchmarks.measure import machine

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = times(lambda: a @ b, 10)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    copied = times(lambda: target.copy_(source), 10)
    cached = torch.randn(8 << 20, device="cuda")
    summed = times(lambda: [torch.sum(cached) for _ in range(10)], 10)
    return {
        "kind": "machine",
        "matmul_tflops": columns(product, 2 * 8192**3)["tflops"],
        "copy_gbs": columns(copied, read=2 * source.numel())["gbs"],
        "l2_sum_gbs": columns(summed, read=10 * 4 * cached.numel())["gbs"],
        "clock_mhz": machine.clock_mhz("cuda"),
    }


def peers(head_dim: int, repeats: int) -> Iterator[dict[str, object]]:
    """torch's own attention kernels at the dense shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, grad = material(1, HEADS, TOKENS, head_dim)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    pairs = HEADS * head_dim * TOKENS * (TOKENS + 1) / 2
    for name, backend in (("sdpa-flash", SDPBackend.FLASH_ATTENTION), ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION)):
        row: dict[str, object] = {"kind": "peer", "method": name, "head_dim": head_dim, "tokens": TOKENS, "heads": HEADS}
        try:
            with sdpa_kernel(backend):
                forward = times(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), repeats)
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
                backward = times(partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True), repeats)
            yield row | {"way": "forward"} | columns(forward, 4 * pairs)
            yield row | {"way": "backward"} | columns(backward, 10 * pairs)
        except RuntimeError as failure:
            yield row | {"status": "failed", "reason": str(failure)[:200]}


def decoding() -> Iterator[dict[str, object]]:
    """Decoding at 8 to 512 MiB of cache: tiles of keys, and how many programs share a head."""
    from igpt_kernels._triton.decode import count_splits, launch_decode

    for batch, heads, head_dim, tokens in ((8, 8, 64, 1024), (4, 16, 96, 4096), (16, 8, 64, 4096), (16, 16, 64, 16384)):
        _, k, v, _ = material(batch, heads, tokens, head_dim)
        k, v = k.contiguous(), v.contiguous()
        q = torch.randn(batch, heads, 1, head_dim, dtype=torch.bfloat16, device="cuda")
        shipped = count_splits(batch * heads, tokens, q.device)
        exact = decode_attention_reference(q[:1].double(), k[:1].double(), v[:1].double(), tokens)
        eager = decode_attention_reference(q[:1], k[:1], v[:1], tokens)
        length, scale = tokens, head_dim**-0.5
        for block, warps in ((64, 4), (32, 4), (128, 4), (128, 8), (32, 2), (16, 2)):
            for splits in sorted({shipped, min(64, 2 * shipped), min(64, 4 * shipped)}):
                config = Config(1, block, warps, 2)
                run = partial(launch_decode, q, k, v, length, scale=scale, config=config, splits=splits)
                row: dict[str, object] = {
                    "kind": "time", "kernel": "decode", "head_dim": head_dim, "tokens": tokens, "heads": batch * heads,
                    "block_n": block, "num_warps": warps, "splits": splits, "shipped_splits": shipped,
                }  # fmt: skip
                try:
                    floor = 4 * float(v.abs().max())
                    share = testing.error_ratio(run()[0][:1], exact, eager, factor=2, floor=floor)
                except Exception as failure:
                    yield row | {"status": "failed", "reason": str(failure)[:200]}
                    continue
                read = 2 * k.numel() * k.element_size()
                yield row | {"error_share": round(share, 4), "bytes": read} | columns(graph_times(run), read=read)


def row_kernels() -> Iterator[dict[str, object]]:
    """Norm, activation and loss at Image GPT's widths: what ships and what the tuner would try first."""
    sizes = {"rms_norm": (512, 1024, 1536), "quick_gelu": (2048, 6144), "cross_entropy": (512,)}
    for kernel in (name for name in KERNELS if name.rsplit("_", 1)[0] in sizes):
        name, entry = kernel.rsplit("_", 1)[0], KERNELS[kernel]
        for size in sizes[name]:
            few, inputs = (
                entry.operation.inputs(size, rows, torch.bfloat16, DEVICE, 0) for rows in (500, entry.operation.timed_rows)
            )
            exact, eager = entry.truth(few.to(torch.float64)), entry.truth(few)
            check_run, run = entry.prepare(few), entry.prepare(inputs)
            rows, values = entry.operation.timed_rows, inputs.tensors[0]
            assert values is not None
            shipped = tuning.lookup(kernel, dtype=torch.bfloat16, head_dim=size, device=torch.device("cuda", 0))
            for config in dict.fromkeys([shipped, *row_candidates(kernel, shipped)]):
                row: dict[str, object] = {"kind": "time", "kernel": kernel, "size": size, **asdict(config)}
                try:
                    shares = [
                        testing.error_ratio(mine, true, low, factor=3, floor=8.0)
                        for mine, true, low in zip(check_run(config, config), exact, eager, strict=True)
                    ]
                except Exception as failure:
                    yield row | {"status": "failed", "reason": f"{type(failure).__name__}: {str(failure)[:200]}"}
                    continue
                samples = graph_times(partial(run, config, config))
                flops, read = None, None
                if name == "cross_entropy":
                    flops = 2.0 * rows * LOSS_WIDTH * size * (1 if kernel.endswith("forward") else 3)
                else:
                    read = values.numel() * 2.0 * (2 if kernel.endswith("forward") else 3)
                row |= {"error_share": round(max(shares), 4), "rows": rows}
                yield row | columns(samples, flops, read)


def loss_parts(rows: int = 1 << 18, few: int = 500) -> Iterator[dict[str, object]]:
    """Loss and gradients of a mean, of how many rows at a time; the first `few` are checked."""
    from igpt_kernels._triton.loss import launch_cross_entropy_sum

    colours, entry = 512, KERNELS["cross_entropy_gradient"]
    inputs = entry.operation.inputs(colours, rows, torch.bfloat16, DEVICE, 0)
    hidden, weight, target, grad = (x for x in inputs.tensors if x is not None)
    first = Inputs((hidden[:few], weight, target[:few], grad[:few]))
    exact, eager = entry.truth(first.to(torch.float64))[0], entry.truth(first)[0]
    for chunk in sorted({min(rows, 1 << power) for power in range(13, 19)}):
        run = partial(launch_cross_entropy_sum, hidden, weight, target, IGNORE_INDEX, 0.0, True, chunk=chunk)
        row: dict[str, object] = {"kind": "time", "kernel": "cross_entropy_sum", "size": colours, "rows": rows, "chunk": chunk}
        try:
            row["error_share"] = round(testing.error_ratio(run()[1][:few], exact, eager, factor=3, floor=1 / rows), 4)
        except Exception as failure:
            yield row | {"status": "failed", "reason": f"{type(failure).__name__}: {str(failure)[:200]}"}
            continue
        yield row | columns(times(run, 10), 6.0 * rows * LOSS_WIDTH * colours)


def row_candidates(kernel: str, shipped: Config) -> list[Config]:
    """Neighbours of what ships: half and twice the rows, warps, stages or programs."""
    m, n, w, s = shipped.block_m, shipped.block_n, shipped.num_warps, shipped.num_stages
    if KERNELS[kernel].kind == "product":
        tiles = [(128, 256, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4), (64, 256, 8, 3), (64, 256, 4, 3), (64, 128, 4, 4)]
        return [Config(*values) for values in tiles]
    near = [(2 * m, n, w, s), (2 * m, n, 2 * w, s), (m, n, 2 * w, s), (m, n, max(1, w // 2), s)]
    if m > 1:
        near += [(m // 2, n, w, s), (m // 2, n, max(1, w // 2), s)]
    if kernel.endswith("backward"):
        near += [(m, n, w, s + 1), (m, n, w, s + 2), (m, n, w, max(1, s - 1))]
    return [Config(*values) for values in near]


def measure(rows: Rows, checks: Path, kernels: Sequence[str], seconds: float, repeats: int) -> None:
    """Time what `check` found right, its peers, and the kernels that it does not check: decoding, norm, activation, loss."""
    deadline = time.monotonic() + seconds
    found = [json.loads(line) for line in checks.read_text(encoding="utf-8").splitlines()]
    right = {tuple(row[name] for name in NAMES) for row in found if row["kind"] == "check" and row["status"] == "ok"}
    rows.write(machine_row())
    for head_dim in () if kernels else (64, 128, 96):
        for row in peers(head_dim, repeats):
            rows.write(row)
    for variant in variants(kernels):
        if time.monotonic() > deadline:
            print(f"time is over at {variant}", flush=True)
            break
        if tuple(variant.row()[name] for name in NAMES) not in right:
            continue
        try:
            for row in time_variant(variant, repeats):
                rows.write({"kind": "time", **variant.row(), **row})
        except Exception as failure:
            rows.write({"kind": "time", **variant.row(), "status": "failed", "reason": str(failure)[:200]})
    for name, more in (("decode", decoding), ("rows", row_kernels), ("loss", loss_parts)):
        if not kernels or name in kernels:
            for row in more():
                if time.monotonic() > deadline:
                    break
                rows.write(row)
    rows.write(machine_row())


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or time; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_plan", description="variants of kernels on this GPU")
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--out", type=Path, default=Path("plan.jsonl"), help="lines are appended here")
    parser.add_argument("--seconds", type=float, default=80.0, help="no variant is begun after that")
    parser.add_argument("--kernels", nargs="*", default=[], help="beginnings of names; decode, rows or loss; all when left out")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--share", nargs=3, type=int, metavar=("INDEX", "WORKERS", "FROM"), help="check: of one process")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tools.kernel_plan needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    if options.share:
        index, workers, begin = options.share
        later = work(options.out, [*variants(options.kernels)], index, workers, begin)
        if later is not None:
            command = [sys.executable, "-m", "tools.kernel_plan", "check", "--out", str(options.out), "--kernels"]
            os.execv(sys.executable, [*command, *options.kernels, "--share", str(index), str(workers), str(later)])
    elif options.what == "check":
        check(options.out, options.kernels, options.seconds, options.workers)
    elif not options.out.exists():
        parser.error(f"--out must be the file that check has written, and there is no {options.out}")
    else:
        measure(Rows(options.out), options.out, options.kernels, options.seconds, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
