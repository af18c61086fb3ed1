"""Sparse attention on a GPU beside FlexAttention with the same mask, our dense kernel and cuDNN's; part of ``make gpu``.

TFLOP/s count the pairs in touched tiles, which is what is computed; "useful" counts visible pairs. A case is timed only after
output and gradients were checked against float64. Rows go to ``benchmarks/results/<device>/<date>-<revision>/sparse.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu_attention import (
    MODELS,
    Attention,
    cells,
    environment,
    inputs,
    matmul_teraflops,
    milliseconds,
    results_folder,
    sdpa,
)
from igpt_kernels import layouts, testing, tuning
from igpt_kernels._ops_attention import attention_pairs
from igpt_kernels.attention import block_sparse_attention, flash_attention
from igpt_kernels.layouts import SparseLayout
from igpt_kernels.reference import attention_reference

METHODS = ("sparse", "flex", "dense", "cudnn")


def method(name: str, layout: SparseLayout) -> Attention:
    """One of `METHODS`: block-sparse Triton, FlexAttention compiled with the same mask, dense Triton, dense cuDNN."""
    if name == "sparse":
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton")
    if name == "dense":
        return lambda q, k, v: flash_attention(q, k, v, backend="triton")
    if name == "cudnn":
        return sdpa(SDPBackend.CUDNN_ATTENTION)
    return flex(layout)


def flex(layout: SparseLayout) -> Attention:
    """FlexAttention; its mask is that of the definition, on its own blocks of 128 tokens of raster order."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return layout.pattern.permits(q, k) & (k <= q)

    # Compiled: else a T x T mask is made, 4 GiB of bools at 256².
    make = torch.compile(create_block_mask)
    block_mask = make(visible, None, None, layout.tokens, layout.tokens, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)  # type: ignore[return-value]


def verify(name: str, text: str, heads: int, head_dim: int) -> float:
    """The error ratio on an image of 30 x 32: at most 1, or AssertionError."""
    layout = layouts.parse(text, 30, 32)
    qkv, grad = inputs(1, heads, layout.tokens, head_dim)
    mask = layout.dense_mask("cuda") if name in ("sparse", "flex") else None

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, mask=mask)[0]

    exact = testing.attention_result(oracle, [x.double() for x in qkv], grad.double())
    eager = testing.attention_result(oracle, qkv, grad)
    q, k, v = qkv
    floor = testing.cancelling_terms(q, k, v, grad, head_dim**-0.5)
    return testing.check_attention(testing.attention_result(method(name, layout), qkv, grad), exact, eager, floor=floor)


def touched(kernel: str, layout: SparseLayout, head_dim: int, device: torch.device) -> int:
    """Pairs of elements in the tiles that a kernel reads, image or not."""
    config = tuning.lookup(kernel, dtype=torch.bfloat16, head_dim=head_dim, device=device)
    return sum(lists.blocks for lists in layout.block_lists(config.block_m, config.block_n)) * config.block_m * config.block_n


def cases(quick: bool) -> Iterator[tuple[str, str, int]]:
    """Model, pattern, image side."""
    for model in ("S",) if quick else MODELS:
        for text in ("local2d:7", "row_column") if quick else ("local2d:3", "local2d:7", "local2d:15", "row_column", "strided"):
            for side in (64, 128, 256):
                yield model, text, side


def measure(name: str, model: str, text: str, side: int) -> dict[str, object]:
    """One row: a method on one pattern and size, checked and timed, or why not."""
    heads, head_dim = MODELS[model]
    layout = layouts.parse(text, side, side)
    batch = max(1, 2**19 // (heads * layout.tokens))
    row: dict[str, object] = {"method": name, "model": model, "pattern": text, "side": side}
    row |= {"shape": [batch, heads, layout.tokens, head_dim], "tile_density": layout.tile_density, "density": layout.density}
    try:
        row["error_ratio"] = verify(name, text, heads, head_dim)
        qkv, grad = inputs(batch, heads, layout.tokens, head_dim)
        run = method(name, layout)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run(*qkv)
        torch.autograd.grad(out, qkv, grad, retain_graph=True)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        forward = milliseconds(lambda: run(*qkv))
        backward = milliseconds(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True))
    except torch.cuda.OutOfMemoryError as error:
        return row | {"status": "oom", "reason": str(error).splitlines()[0]}
    except Exception as error:
        # A peer may fail in its compiler; that is a row, not the end of the table.
        return row | {
            "status": "error",
            "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }
    row |= {"status": "ok", "forward_ms": forward, "backward_ms": backward}
    dense = attention_pairs(layout.tokens, layout.tokens, True)
    pairs = (dense, dense) if name in ("dense", "cudnn") else (layout.pairs, layout.pairs)
    if name == "sparse":
        device = qkv[0].device
        pairs = (touched("sparse_forward", layout, head_dim, device), touched("sparse_backward_keys", layout, head_dim, device))
    unit = batch * heads * head_dim / 1e9
    row |= {"forward_tflops": 4 * unit * pairs[0] / forward[0], "backward_tflops": 10 * unit * pairs[1] / backward[0]}
    return row | {"useful_forward_tflops": 4 * unit * layout.pairs / forward[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases; 1 if ours failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="sparse attention on a GPU beside FlexAttention and dense kernels")
    parser.add_argument("--full", action="store_true", help="every model and pattern instead of the quick selection")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_sparse needs an NVIDIA GPU; none is visible", file=sys.stderr)
        return 2
    facts = environment()
    folder = results_folder(facts)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, matmul {matmul_teraflops():.0f} TFLOP/s")
    print("model pattern     side method forward (ms)  TFLOP/s  x ours   backward (ms)  TFLOP/s  x ours  error/budget")
    failed = False
    with (folder / "sparse.jsonl").open("a", encoding="utf-8") as file:
        for model, text, side in cases(quick=not options.full):
            ours: dict[str, object] = {}
            for name in METHODS:
                row = measure(name, model, text, side)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if name == "sparse":
                    ours, failed = row, failed or row["status"] != "ok"
                print(f"{model:5} {text:11} {side:4} {name:6} {cells(row, ours)}", flush=True)
    print(f"rows are in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
