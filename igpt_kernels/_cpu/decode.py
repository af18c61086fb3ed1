"""Decoding by C++: one pass over the keys that are visible, in place, whatever their distance in memory. Nothing is copied.

A sequence and head is cut into pieces of 256 keys, which threads share. Pieces are added in their order, so the bits do not
depend on the number of threads. What lies behind a sequence in its cache is not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_kernels._torch.decode import visible_by_key, visible_tokens
from igpt_kernels._torch.sparse import Group
from igpt_kernels.tensors import empty_heads, empty_lse


def _with_rows(x: Tensor) -> Tensor:
    """x itself where the values of a head lie without gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The step "dense" of decoding; see `igpt_kernels.attention.decode_attention`."""
    out, lse = empty_heads(q), empty_lse(q)
    q, k, v = (_with_rows(x) for x in (q, k_cache, v_cache))
    lengths, longest = (length.long().contiguous(), 0) if isinstance(length, Tensor) else (None, length)
    torch.ops.igpt_kernels.cpu_decode(q, k, v, lengths, longest, None, None, None, scale, out, lse)
    return out, lse


def sparse_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    """The step "sparse" of decoding: of each head, the keys that its layout lets the newest query see."""
    out, lse = empty_heads(q), empty_lse(q)
    q, k, v = (_with_rows(x) for x in (q, k_cache, v_cache))
    for key, members in groups:
        heads = None if len(members) == q.shape[1] else torch.tensor(members, device=q.device)
        begins = None
        if isinstance(length, Tensor):
            visible = visible_by_key(key, length, k.shape[2], q.shape[0], q.device)
            tokens, begins = visible.nonzero()[:, 1].contiguous(), F.pad(visible.sum(-1).cumsum(0), (1, 0))
        else:
            tokens = visible_tokens(key, length)
        torch.ops.igpt_kernels.cpu_decode(q, k, v, None, 0, tokens, begins, heads, scale, out, lse)
    return out, lse
