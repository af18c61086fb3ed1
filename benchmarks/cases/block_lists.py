"""Case of the lists of tiles of a pattern that was never used before, beside the block mask of FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.attention import BUILT, blocks, layout_of, runs_of_rows
from benchmarks.registry import Case, Cost, Method, Operation, Workload
from igpt_kernels import layouts


def prepare(case: Case, subject: Callable[[], object]) -> Workload:
    """The lists of tiles of a pattern that was never used before."""
    return Workload({"forward": subject}, None, f"{BUILT}, tiles of 64 x 64" if case.method == "lists" else "compiled nothing")


def verify(case: Case, subject: Callable[[], Any]) -> float:
    """The touched tiles against the definition: visible pairs of runs of rows, or blocks of 128 tokens."""
    layout, built = layout_of(case), subject()
    if case.method == "flex":
        some, _ = blocks(layout, 128, case.device)
        found = int(built.kv_num_blocks.sum() + built.full_kv_num_blocks.sum())
        if found != int(some.sum()):
            raise AssertionError(f"{found} blocks are touched, by the definition {int(some.sum())}")
        return 0.0
    for run in runs_of_rows(case.tokens):
        query = run.start
        keys = layout.mask_rows(query, query + 1)[0].nonzero()[:, 0]
        if not torch.equal(layout.keys_of(query), keys):
            raise AssertionError(f"query {query} sees other keys than the definition says")
    return 0.0


def _lists(case: Case) -> Callable[[], object]:
    layout = layout_of(case)

    def run() -> object:
        layouts.lists_of.cache_clear()
        return layout.block_lists()

    return run


def _flex_mask(case: Case) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask

    layout = layout_of(case)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return layout.pattern.permits(q, k) & (k <= q)

    return lambda: create_block_mask(visible, None, None, case.tokens, case.tokens, device=case.device)


def _square(case: Case, way: str) -> tuple[int, str]:
    # Measured at 32² and 64²: 32 bytes a pair and more, for its comparisons of int64 positions.
    return 32 * case.tokens**2, f"a mask of {case.tokens:,}² and what it is made from"


METHODS = {
    "flex": Method(_flex_mask, memory=_square),
    "lists": Method(_lists, public="layouts"),
}
OPERATIONS = [
    Operation(
        "sparse",
        "build",
        ("layouts",),
        ("forward",),
        prepare,
        verify,
        lambda case, way: Cost(0.0, 0.0, "memory", "pixels of the image", "pixels", case.tokens),
        METHODS,
    ),
]
