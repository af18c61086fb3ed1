"""Cases of decoding: the last pixel of an image, with keys and values in a cache."""

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


def _seen(case: Case, device: str) -> Tensor:
    """The keys that the last query sees, bool [T]."""
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
    """4·B·H·n·D operations and 2·B·H·n·D values read, n the keys seen."""
    seen = case.tokens if case.op == "dense" else int(layout_of(case).keys_of(case.tokens - 1).numel())
    values = 2 * case.batch * case.width * seen
    size = getattr(torch, case.dtype).itemsize
    return Cost(2.0 * values, float(size * values), "memory", f"4·B·H·n·D, n = {seen:,} keys; keys and values read once")


def _eager(case: Case) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * case.head_dim**-0.5
        return scores.softmax(-1) @ v

    return run


def _ours(case: Case) -> Attention:
    import igpt_kernels

    layout = None if case.op == "dense" else layout_of(case)
    return lambda q, k, v: igpt_kernels.decode_attention(q, k, v, case.tokens, layout=layout)


METHODS = {
    "eager": Method(_eager),
    "sdpa": Method(lambda case: lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "decode": Method(_ours, public="decode_attention"),
}
OPERATIONS = [
    Operation("decode", "dense", ("decode_attention",), ("forward",), prepare, verify, cost, METHODS),
    Operation("decode", "local2d:7", ("decode_attention",), ("forward",), prepare, verify, cost, {"decode": METHODS["decode"]}),
]
