"""Cases of attention, dense and block-sparse, at the shapes of Image GPT S, M and L."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.registry import Case, Cost, Method, Operation, Workload
from igpt_kernels import backends, layouts, testing, tuning
from igpt_kernels._ops.attention import attention_pairs
from igpt_kernels.layouts import SparseLayout
from igpt_kernels.reference import attention_reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
PATTERNS = ("local2d:3", "local2d:7", "local2d:15", "local2d:31", "row_column", "strided", "fixed")
BUILT = "local2d:7"
"""The pattern whose lists of tiles are built."""
CHECKED = 1 << 24
"""Pairs of scores that the oracle computes for a head: all of them up to 4,096 tokens, beyond that those of 8 runs of rows."""


def inputs(
    batch: int, heads: int, tokens: int, head_dim: int, *, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> tuple[list[Tensor], Tensor]:
    """Random normal q, k, v as views of a fused [B,T,3,H,D] tensor, and a gradient; zeros would run 13 % faster on a GPU."""
    fused = torch.randn(batch, tokens, 3, heads, head_dim, device=device).to(dtype)
    qkv = [fused[:, :, i].transpose(1, 2).requires_grad_() for i in range(3)]
    return qkv, torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype).transpose(1, 2)


def layout_of(case: Case) -> SparseLayout:
    """The pattern of a case; dense for the operations that have none."""
    return layouts.parse({"causal": "dense", "dense": "dense", "build": BUILT}.get(case.op, case.op), *case.size)


def _inputs_of(case: Case, tokens: int | None = None) -> tuple[list[Tensor], Tensor]:
    count = case.tokens if tokens is None else tokens
    return inputs(case.batch, case.heads, count, case.head_dim, dtype=getattr(torch, case.dtype), device=case.device)


def prepare(case: Case, subject: Attention) -> Workload:
    """One layer on random inputs: forward without a graph, both passes, and the backward pass over a graph that is kept."""
    qkv, grad = _inputs_of(case)
    plain = [x.detach() for x in qkv]
    graph: list[Tensor] = []

    def forward() -> object:
        return subject(*plain)

    def both() -> object:
        return torch.autograd.grad(subject(*qkv), qkv, grad)

    def backward() -> object:
        if not graph:
            graph.append(subject(*qkv))
        return torch.autograd.grad(graph[0], qkv, grad, retain_graph=True)

    def warm() -> object:
        if case.op != "causal":
            return None  # a pattern belongs to its image
        small, of_small = _inputs_of(case, 256)
        return torch.autograd.grad(subject(*small), small, of_small)

    compiled = case.method == "flex"
    facts = _facts(case)
    return Workload(
        {"forward": forward, "both": both, "backward": backward},
        None if compiled else warm,
        configuration(case),
        compiled,
        facts,
    )


def _facts(case: Case) -> dict[str, object]:
    if case.op == "causal":
        return {}
    layout = layout_of(case)
    facts: dict[str, object] = {"density": float(f"{layout.density:.4g}"), "tile_density": float(f"{layout.tile_density:.4g}")}
    if case.method == "sparse" and case.device == "cuda":
        for way, kernel in (("forward", "sparse_forward"), ("backward", "sparse_backward_keys")):
            config = _config(kernel, case)
            lists = layout.block_lists(config.block_m, config.block_n)
            facts[f"touched_{way}"] = sum(one.blocks for one in lists) * config.block_m * config.block_n
    return facts


def _config(kernel: str, case: Case) -> tuning.Config:
    dtype = getattr(torch, case.dtype)
    return tuning.lookup(kernel, dtype=dtype, head_dim=case.head_dim, device=torch.device(case.device))


OPS = {"flash": "flash_attention", "sparse": "block_sparse_attention", "decode": "decode_attention"}


def configuration(case: Case) -> str:
    """Which kernel really runs, and how."""
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    if case.method in OPS:
        name = OPS[case.method]
        backend = backends.choose("auto", backends.explain(name, dtype=dtype, device=device, head_dim=case.head_dim), name)
        if backend != "triton":
            return backend
        kernel = {"flash": "flash_forward", "sparse": "sparse_forward", "decode": "decode"}[case.method]
        if case.method == "decode" and case.op != "dense":
            kernel = "sparse_decode"
        config = _config(kernel, case)
        return f"triton {config.block_m},{config.block_n},{config.num_warps},{config.num_stages}"
    if case.method == "sdpa":
        return sdpa_backend(case)
    return {"flex": "compiled, blocks of 128", "eager": "matmul, mask, softmax, matmul"}.get(case.method, "")


def sdpa_backend(case: Case) -> str:
    """The kernel that scaled_dot_product_attention takes for a case, in torch's words."""
    small = [x.detach() for x in _inputs_of(case, min(case.tokens, 256))[0]]
    query = small[0][:, :, -1:] if case.suite == "decode" else small[0]
    choice = torch._fused_sdp_choice(query, small[1], small[2], is_causal=case.suite != "decode")
    return SDPBackend(choice).name.lower()


def _oracle(
    qkv: Sequence[Tensor], grad: Tensor, layout: SparseLayout, rows: Sequence[slice], dtype: torch.dtype
) -> testing.AttentionResult:
    """The oracle at `dtype` for some runs of queries, whose gradient alone is not zero; dK and dV are those of all keys."""
    q, k, v = (x.detach().to(dtype) for x in qkv)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    outs = []
    position = torch.arange(k.shape[2], device=k.device)
    for run in rows:
        seen = layout._permits(position[run, None], position[None])
        some = [q[:, :, run].requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        out = attention_reference(*some, causal=False, mask=seen)[0]
        parts = torch.autograd.grad(out, some, grad[:, :, run].to(dtype))
        outs.append(out.detach())
        dq[:, :, run] = parts[0]
        dk, dv = dk + parts[1], dv + parts[2]
    return testing.AttentionResult(torch.cat(outs, 2), None, dq, dk, dv)


def runs_of_rows(tokens: int) -> list[slice]:
    """The queries that are checked: all, in runs of 512; beyond `CHECKED` pairs 8 runs, the first and the last among them."""
    if tokens * tokens <= CHECKED:
        return [slice(start, min(start + 512, tokens)) for start in range(0, tokens, 512)]
    length = max(CHECKED // tokens // 8, 1)
    return [slice(start, start + length) for start in (round(i * (tokens - length) / 7) for i in range(8))]


def _checked_heads(case: Case) -> list[tuple[slice, slice]]:
    """The first head of the first image, and the last of the last."""
    return [(slice(b, b + 1), slice(h, h + 1)) for b, h in {(0, 0), (case.batch - 1, case.heads - 1)}]


def verify(case: Case, subject: Attention) -> float:
    """Output and gradients of the first and the last head at full size against float64; the share of the budget used."""
    qkv, grad = _inputs_of(case)
    rows = runs_of_rows(case.tokens)
    chosen = torch.zeros(case.tokens, dtype=torch.bool, device=grad.device)
    for run in rows:
        chosen[run] = True
    grad = grad * chosen[:, None]
    result = testing.attention_result(subject, qkv, grad)
    layout, worst = layout_of(case), 0.0
    for head in _checked_heads(case):
        some = [x.detach()[head] for x in qkv]
        exact, eager = (_oracle(some, grad[head], layout, rows, t) for t in (torch.float64, grad.dtype))
        out = torch.cat([result.out[head][:, :, run] for run in rows], 2)
        mine = testing.AttentionResult(out, None, result.dq[head], result.dk[head], result.dv[head])
        floor = testing.cancelling_terms(some[0], some[1], some[2], grad[head], case.head_dim**-0.5)
        worst = max(worst, testing.check_attention(mine, exact, eager, floor=floor))
    return worst


def verify_forward(case: Case, subject: Attention) -> float:
    """`verify` of the output alone."""
    q, k, v = (x.detach() for x in _inputs_of(case)[0])
    found = subject(q, k, v)
    layout, rows, worst = layout_of(case), runs_of_rows(case.tokens), 0.0
    position = torch.arange(case.tokens, device=q.device)

    def oracle(head: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
        q1, k1, v1 = (x[head].to(dtype) for x in (q, k, v))
        masks = [layout._permits(position[run, None], position[None]) for run in rows]
        runs = zip(rows, masks, strict=True)
        return torch.cat([attention_reference(q1[:, :, run], k1, v1, causal=False, mask=seen)[0] for run, seen in runs], 2)

    for head in _checked_heads(case):
        out = torch.cat([found[head][:, :, run] for run in rows], 2)
        exact, eager = oracle(head, torch.float64), oracle(head, q.dtype)
        worst = max(worst, testing.error_ratio(out, exact, eager, factor=testing.OUTPUT_FACTOR))
    return worst


def cost(case: Case, way: str) -> Cost:
    """Operations of the visible pairs: 4·B·H·pairs·D forward, 10 backward; each tensor read or written once."""
    layout = layout_of(case)
    pairs = attention_pairs(case.tokens, case.tokens, True) if case.op == "causal" else layout.pairs
    factor = {"forward": 4, "backward": 10, "both": 14}[way]
    tensors = {"forward": 4, "backward": 8, "both": 12}[way]
    size = getattr(torch, case.dtype).itemsize
    formula = f"{factor}·B·H·pairs·D, {pairs:,} visible pairs"
    flops = float(factor * case.batch * case.heads * pairs * case.head_dim)
    return Cost(flops, float(tensors * size * case.batch * case.width * case.tokens), "compute", formula)


def _sdpa(*allowed: SDPBackend) -> Callable[[Case], Attention]:
    def make(case: Case) -> Attention:
        if not allowed:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(list(allowed)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    return make


def _eager(case: Case) -> Attention:
    from igpt.model.image_gpt import plain_attention

    return lambda q, k, v: plain_attention(q, k, v, True)


def _flash(case: Case) -> Attention:
    import igpt_kernels

    return lambda q, k, v: igpt_kernels.flash_attention(q, k, v)


def _sparse(case: Case) -> Attention:
    import igpt_kernels

    layout = layout_of(case)
    return lambda q, k, v: igpt_kernels.block_sparse_attention(q, k, v, layout)


def _flex(case: Case) -> Attention:
    """FlexAttention compiled, with blocks that are listed here: create_block_mask makes a T x T tensor, or compiles 5 s."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    layout = layout_of(case)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return layout.pattern.permits(q, k) & (k <= q) if case.op != "causal" else k <= q

    some, whole = blocks(layout, 128, case.device)
    partial = some & ~whole
    counts, orders = [], []
    for kind in (partial, whole):
        order = torch.argsort(kind.int(), dim=-1, descending=True, stable=True).int()
        counts.append(kind.sum(-1).int()[None, None])
        orders.append(order[None, None].contiguous())
    mask = BlockMask.from_kv_blocks(
        counts[0],
        orders[0],
        counts[1],
        orders[1],
        BLOCK_SIZE=128,
        mask_mod=visible,
        seq_lengths=(case.tokens, case.tokens),
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)  # type: ignore[no-any-return]


def blocks(layout: SparseLayout, side: int, device: str) -> tuple[Tensor, Tensor]:
    """Which blocks of side x side pairs of raster order hold any visible pair, and which are visible whole; T·side bytes."""
    count = -(-layout.tokens // side)
    some, whole = (torch.zeros(count, count, dtype=torch.bool, device=device) for _ in range(2))
    for row in range(count):
        stop = min((row + 1) * side, layout.tokens)
        seen = layout.mask_rows(row * side, stop, device)
        full = seen.shape[1] // side * side
        tiles = seen[:, :full].view(seen.shape[0], -1, side)
        some[row, : full // side], whole[row, : full // side] = tiles.any(-1).any(0), tiles.all(-1).all(0)
        if full < seen.shape[1]:
            some[row, row] = seen[:, full:].any()
    return some, whole


def _scores(copies: dict[str, int]) -> Callable[[Case, str], tuple[int, str]]:
    def estimate(case: Case, way: str) -> tuple[int, str]:
        size = getattr(torch, case.dtype).itemsize
        count = copies["forward" if way == "forward" else "both"]
        one = size * case.batch * case.heads * case.tokens**2
        return count * one, f"{count} score matrices of {case.batch * case.heads} × {case.tokens:,}² {case.dtype}"

    return estimate


def _flex_refuses(case: Case, way: str) -> str:
    return "FlexAttention has no backward pass on the CPU" if case.device == "cpu" and way != "forward" else ""


# Two copies of the scores live at once, three in training; measured at 48² and 64², as is that it is no more.
EAGER = Method(_eager, memory=_scores({"forward": 2, "both": 3}))
FLEX = Method(_flex, refuses=_flex_refuses, compiled=True)
DENSE = {
    "eager": EAGER,
    "sdpa": Method(_sdpa()),
    "sdpa-flash": Method(_sdpa(SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
    "sdpa-cudnn": Method(_sdpa(SDPBackend.CUDNN_ATTENTION), devices=("cuda",)),
    "flex": FLEX,
    "flash": Method(_flash, public="flash_attention"),
}
SPARSE = {"flex": FLEX, "sparse": Method(_sparse, public="block_sparse_attention")}


OPERATIONS = [
    Operation(suite, name, public, ("forward", "both"), prepare, verify, cost, methods, verify_forward)
    for suite, names, public, methods in (
        ("attention", ("causal",), ("flash_attention",), DENSE),
        ("sparse", PATTERNS, ("block_sparse_attention", "layouts"), SPARSE),
    )
    for name in names
]
