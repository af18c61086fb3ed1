"""Attention on a GPU: TFLOP/s of ours beside torch's flash, cuDNN and eager, forward and backward; part of ``make gpu``.

A case is timed only after its output and gradients were checked against float64. A matrix product of the same minute says
what the chip gives today. Rows go to ``benchmarks/results/<device>/<date>-<revision>/attention.jsonl`` as they come.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from igpt_kernels import testing, tuning
from igpt_kernels._ops_attention import attention_pairs
from igpt_kernels.attention import flash_attention
from igpt_kernels.reference import attention_reference

RESULTS = Path(__file__).parent / "results"
# Image GPT S, M and L: heads, head dim.
MODELS = {"S": (8, 64), "L": (16, 96), "M": (8, 128)}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    """Causal scaled_dot_product_attention by one of torch's kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


METHODS: dict[str, Attention] = {
    "triton": lambda q, k, v: flash_attention(q, k, v, backend="triton"),
    "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "eager": lambda q, k, v: attention_reference(q, k, v)[0],
}


def inputs(batch: int, heads: int, tokens: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    """Random normal q, k, v as views of a fused [B,T,3,H,D] bfloat16 tensor, and a gradient; zeros would run 13 % faster."""
    fused = torch.randn(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    qkv = [fused[:, :, i].transpose(1, 2).requires_grad_() for i in range(3)]
    return qkv, torch.randn(batch, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def verify(method: Attention, heads: int, head_dim: int) -> float:
    """The error ratio at 1,000 tokens: at most 1, or AssertionError."""
    qkv, grad = inputs(1, heads, 1000, head_dim)
    exact = testing.attention_result(lambda q, k, v: attention_reference(q, k, v)[0], [x.double() for x in qkv], grad.double())
    eager = testing.attention_result(lambda q, k, v: attention_reference(q, k, v)[0], qkv, grad)
    return testing.check_attention(testing.attention_result(method, qkv, grad), exact, eager)


def milliseconds(run: Callable[[], object], repeats: int = 20) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of GPU time, by events, after 5 warm-up calls."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return times[repeats // 2], times[repeats // 5], times[repeats * 4 // 5]


def matmul_teraflops() -> float:
    """bfloat16 8192³ on random normal values: what the chip gives in this minute."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return float(2 * 8192**3 / milliseconds(lambda: a @ b)[0] / 1e9)


def cases(quick: bool) -> Iterator[tuple[str, int]]:
    """Model and image side."""
    for model in MODELS:
        for side in (32, 64) if quick else (32, 48, 64, 96, 128):
            yield model, side


def measure(name: str, model: str, side: int) -> dict[str, object]:
    """One row: a method at one model's heads and one image size, checked and timed, or why not."""
    heads, head_dim = MODELS[model]
    tokens = side * side
    batch = max(1, 2**20 // (heads * tokens))
    row: dict[str, object] = {"method": name, "model": model, "side": side, "shape": [batch, heads, tokens, head_dim]}
    scores = 4 * batch * heads * tokens * tokens
    if name == "eager" and scores > torch.cuda.mem_get_info()[0] // 4:
        return row | {"status": "oom", "reason": f"predicted: scores of {scores / 2**30:.0f} GiB"}
    try:
        row["error_ratio"] = verify(METHODS[name], heads, head_dim)
        qkv, grad = inputs(batch, heads, tokens, head_dim)
        out = METHODS[name](*qkv)
        forward = milliseconds(lambda: METHODS[name](*qkv))
        backward = milliseconds(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True))
    except torch.cuda.OutOfMemoryError as error:
        return row | {"status": "oom", "reason": str(error).splitlines()[0]}
    except (RuntimeError, AssertionError) as error:
        return row | {"status": "error", "reason": str(error).splitlines()[0]}
    unit = batch * heads * head_dim * attention_pairs(tokens, tokens, True) / 1e9
    row |= {"status": "ok", "forward_ms": forward, "backward_ms": backward}
    return row | {"forward_tflops": 4 * unit / forward[0], "backward_tflops": 10 * unit / backward[0]}


def environment() -> dict[str, object]:
    """Versions, device, clocks and revision, for every file of results."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    import triton

    return {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": output("git", "rev-parse", "HEAD"),
        "device": torch.cuda.get_device_name(),
        "clocks": output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "table": tuning.table_for(torch.device("cuda", 0)),
    }


def results_folder(facts: dict[str, object]) -> Path:
    """Where the rows of this run go, made if missing: device, date and revision."""
    stamp = f"{str(facts['date'])[:10]}-{str(facts['revision'])[:7] or 'unknown'}"
    folder = RESULTS / tuning.slug(torch.cuda.get_device_name()) / stamp
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print rows as they come and keep them; 1 if ours failed somewhere, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="TFLOP/s of causal attention, ours and torch's, on this GPU")
    parser.add_argument("--full", action="store_true", help="all image sizes from 32 to 128, not just 32 and 64")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_attention needs an NVIDIA GPU; none is visible", file=sys.stderr)
        return 2
    facts = environment()
    folder = results_folder(facts)
    facts["matmul_tflops"] = matmul_teraflops()
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, matmul {facts['matmul_tflops']:.0f} TFLOP/s")
    print("model side method      forward (ms)  TFLOP/s  x ours   backward (ms)  TFLOP/s  x ours  error/budget")
    failed = False
    with (folder / "attention.jsonl").open("a", encoding="utf-8") as file:
        for model, side in cases(quick=not options.full):
            ours: dict[str, object] = {}
            for name in METHODS:
                row = measure(name, model, side)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if name == "triton":
                    ours, failed = row, failed or row["status"] != "ok"
                print(f"{model:5} {side:4} {name:11} {cells(row, ours)}", flush=True)
    print(f"rows are in {folder}")
    return 1 if failed else 0


def cells(row: dict[str, object], ours: dict[str, object]) -> str:
    """Times, rates and ratios of a row for a table, or why there are none."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    parts = []
    for way in ("forward", "backward"):
        time = row[f"{way}_ms"][0]  # type: ignore[index]
        ratio = time / ours[f"{way}_ms"][0] if ours.get("status") == "ok" else float("nan")  # type: ignore[index]
        parts.append(f"{time:12.3f} {row[f'{way}_tflops']:8.0f} {ratio:7.2f}")
    return "   ".join(parts) + f"  {row['error_ratio']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
