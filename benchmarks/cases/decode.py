"""Cases of decoding: the last pixel of an image with keys and values in a cache, and sequences that differ in length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.attention import Attention, configuration, layout_of
from benchmarks.registry import Case, Cost, Method, Operation, Workload
from igpt_kernels import testing
from igpt_kernels.reference import attention_reference


def inputs(case: Case) -> list[Tensor]:
    """One query [B,H,1,D], and caches [B,H,T,D] that are full."""
    dtype = getattr(torch, case.dtype)

    def normal(tokens: int) -> Tensor:
        return torch.randn(case.batch, case.heads, tokens, case.head_dim, device=case.device).to(dtype)

    return [normal(1), normal(case.tokens), normal(case.tokens)]


def prepare(case: Case, subject: Attention) -> Workload:
    """The last pixel of an image: one query that may see all others."""
    tensors = inputs(case)
    return Workload({"forward": lambda: subject(*tensors)}, lambda: subject(*tensors), configuration(case))


def lengths_of(case: Case, device: str | torch.device) -> Tensor:
    """Keys that each sequence sees, int64 [B]: from one to all of them, evenly."""
    return torch.linspace(1, case.tokens, case.batch, device=device).long() if case.batch > 1 else torch.tensor([case.tokens])


def _seen(case: Case, device: str | torch.device) -> Tensor:
    """The keys that the last query sees, bool [T]; of the operation "lengths" [B,1,1,T]."""
    if case.op == "lengths":
        return (torch.arange(case.tokens, device=device) < lengths_of(case, device)[:, None])[:, None, None]
    seen = torch.zeros(case.tokens, dtype=torch.bool, device=device)
    seen[layout_of(case).keys_of(case.tokens - 1).to(device)] = True
    return seen


def verify(case: Case, subject: Attention) -> float:
    """All of the output against float64."""
    tensors = inputs(case)
    mask = _seen(case, case.device)
    exact, eager = (
        attention_reference(*(x.to(dtype) for x in tensors), causal=False, mask=mask)[0]
        for dtype in (torch.float64, tensors[0].dtype)
    )
    return testing.error_ratio(subject(*tensors), exact, eager, factor=testing.OUTPUT_FACTOR)


def cost(case: Case, way: str) -> Cost:
    """4·B·H·n·D operations and 2·B·H·n·D values read, n the keys seen (on average)."""
    if case.op == "lengths":
        seen = float(lengths_of(case, "cpu").double().mean())
    else:
        seen = case.tokens if case.op == "dense" else int(layout_of(case).keys_of(case.tokens - 1).numel())
    values = 2 * case.batch * case.width * seen
    size = getattr(torch, case.dtype).itemsize
    return Cost(2.0 * values, float(size * values), "memory", f"4·B·H·n·D, n = {seen:,} keys; keys and values read once")


def _eager(case: Case) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * case.head_dim**-0.5
        return scores.softmax(-1) @ v

    return run


def _masked(case: Case) -> Attention:
    """With a mask that is made once. What it hides takes as long as what it shows."""
    mask = _seen(case, case.device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _ours(case: Case) -> Attention:
    import igpt_kernels

    if case.op == "lengths":
        lengths = lengths_of(case, case.device)
        return lambda q, k, v: igpt_kernels.decode_attention(q, k, v, lengths)
    layout = None if case.op == "dense" else layout_of(case)
    return lambda q, k, v: igpt_kernels.decode_attention(q, k, v, case.tokens, layout=layout)


OURS = Method(_ours, public="decode_attention")
DENSE = {"eager": Method(_eager), "sdpa": Method(lambda case: F.scaled_dot_product_attention), "decode": OURS}
OPERATIONS = [
    Operation("decode", "dense", ("decode_attention",), ("forward",), prepare, verify, cost, DENSE),
    Operation("decode", "local2d:7", ("decode_attention",), ("forward",), prepare, verify, cost, {"decode": OURS}),
    Operation(
        "decode",
        "lengths",
        ("decode_attention",),
        ("forward",),
        prepare,
        verify,
        cost,
        {"sdpa": Method(_masked), "decode": OURS},
    ),
]
