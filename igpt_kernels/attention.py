"""Attention for image tokens: public functions that document, check, and choose a backend.

Letters: B batch, H heads, T tokens, D head dim. Tokens are in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igpt_kernels import backends, reference
from igpt_kernels._ops import attention as attention_ops
from igpt_kernels._ops import decode as decode_ops
from igpt_kernels._ops import sparse as sparse_ops
from igpt_kernels._ops.transforms import call
from igpt_kernels._torch import attention as torch_attention
from igpt_kernels._torch import decode as torch_decode
from igpt_kernels.checks import autocast, check_attention, check_causal, check_layout, check_length, check_scale
from igpt_kernels.layouts import SparseLayout, keys_in, registered
from igpt_kernels.memory import guard_square
from igpt_kernels.tensors import nonnegative_scale, zero_not_visible


def _reference_fits(backend: str, q: Tensor, keys: int) -> None:
    """T x T scores that were not asked for by name may take a quarter of free memory at most."""
    if backend == "auto":
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        guard_square(f"{q.shape[2]} x {keys} scores", rows * keys * q.element_size(), q.device)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention: ``out[i] = sum_j softmax_j(scale * q[i].k[j]) v[j]`` over the visible keys j.

    With `causal`, query i sees key j when ``j <= i + Tk - Tq`` (the lower-right corner of the score matrix). So a chunk of
    queries at the end of a cache sees everything before it::

        Tq=2 Tk=4:  1 1 1 0      Tq=4 Tk=2:  0 0
                    1 1 1 1                  0 0
                                             1 0
                                             1 1

    A query that sees no key gets 0 and passes no gradient.

    Args:
        q: queries [B,H,Tq,D], float16, bfloat16, float32 or float64; any strides.
        k: keys [B,H,Tk,D], of q's dtype and device.
        v: values [B,H,Tk,D].
        causal: hide the future; False lets every query see every key.
        scale: factor of the scores; ``1/sqrt(D)`` when None.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA); ``"torch"`` (torch's flash kernel on the CPU,
            scaled_dot_product_attention elsewhere) or ``"reference"`` (eager, Tq x Tk scores in memory). A name never
            falls back; `igpt_kernels.explain` says what auto takes and why.

    Returns:
        [B,H,Tq,D], dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        MemoryError: a Tq x Tk tensor that was not asked for by name would take over a quarter of free memory.
        RuntimeError: in a second derivative; only the reference has one.

    Under torch.autocast the inputs are cast to its dtype. The backward pass of the operator (Triton, and torch on the CPU)
    is deterministic, bit for bit.

    Cost: 4·B·H·Tq·Tk·D floating point operations (half of it when causal), 2.5 times that backward (Triton recomputes:
    3.5 times); memory linear in T with fused backends. Triton: Dao, "FlashAttention-2", 2023.
    """
    q, k, v = autocast(q, k, v)
    q, k, v = check_attention(q, k, v)
    causal = check_causal(causal)
    scale = check_scale(scale, q.shape[3])
    chosen = backends.select("flash_attention", backend, (q, k, v), q.shape[3])
    if chosen == "reference":
        _reference_fits(backend, q, k.shape[2])
        return reference.attention_reference(q, k, v, causal=causal, scale=scale)[0]
    q, scale = nonnegative_scale(q, scale)
    if chosen == "torch" and q.device.type != "cpu":
        return torch_attention.flash_attention(q, k, v, causal=causal, scale=scale)
    return call(attention_ops.flash_forward, q, k, v, causal, scale, chosen)[0]


def _dense_masks(key: str, device: torch.device) -> Tensor:
    """The dense masks of a layout argument, bool [1 or H,T,T]."""
    masks = {one: registered(one).dense_mask(device) for one in keys_in(key)}
    return torch.stack([masks[one] for one in key.split(";")])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SparseLayout | Sequence[SparseLayout],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the keys a pattern allows: ``out[i] = sum_j softmax_j(scale * q[i].k[j]) v[j]``, j seen by i.

    Tokens are in raster order, and so is the result: tiles of the image are gathered on the way, nothing is permuted.

    Args:
        q: queries [B,H,T,D], float16, bfloat16, float32 or float64; any strides; T as the layout says.
        k: keys [B,H,T,D], of q's dtype and device.
        v: values [B,H,T,D].
        layout: the pattern, from `igpt_kernels.layouts`: one for all heads, or a sequence of H.
        scale: factor of the scores; ``1/sqrt(D)`` when None.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA); ``"torch"`` (tiles gathered into batches of small
            attentions, any device) or ``"reference"`` (eager, T x T scores in memory). A name never falls back.

    Returns:
        [B,H,T,D], dtype of q. A query that sees no key gets 0 and passes no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        MemoryError: a T x T tensor that was not asked for by name would take over a quarter of free memory.
        RuntimeError: in a second derivative; only the reference has one.

    Under torch.autocast the inputs are cast to its dtype. The backward pass is deterministic, bit for bit. The first call
    with a layout builds its block lists (`SparseLayout.block_lists`); they are kept for later calls.

    Cost: 4·B·H·D operations for each pair in a touched tile (`SparseLayout.tile_density`), 2.5 times that backward (Triton
    recomputes: 3.5 times); memory linear in T. Patterns: Child et al., "Generating Long Sequences with Sparse
    Transformers", 2019.
    """
    q, k, v = autocast(q, k, v)
    q, k, v = check_attention(q, k, v)
    scale = check_scale(scale, q.shape[3])
    key = check_layout(layout, heads=q.shape[1], tokens=q.shape[2])
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have as many tokens as q, {q.shape[2]}, got {k.shape[2]}")
    if isinstance(layout, SparseLayout) and layout.is_dense:
        return flash_attention(q, k, v, causal=layout.causal, scale=scale, backend=backend)
    chosen = backends.select("block_sparse_attention", backend, (q, k, v), q.shape[3])
    if chosen == "reference":
        _reference_fits(backend, q, k.shape[2])
        mask = _dense_masks(key, q.device)
        return reference.attention_reference(q, k, v, causal=False, scale=scale, mask=mask)[0]
    q, scale = nonnegative_scale(q, scale)
    return call(sparse_ops.sparse_forward, q, k, v, key, scale, chosen)[0]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    *,
    layout: SparseLayout | Sequence[SparseLayout] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One query per sequence against a cache of keys: the last row of `flash_attention`, without the others.

    Args:
        q: the newest query of each sequence [B,H,1,D].
        k_cache: keys [B,H,Tmax,D]; what lies at and after `length` is never read into the result.
        v_cache: values [B,H,Tmax,D].
        length: keys visible, the query's own included: one int for all sequences, or an integer tensor [B]. A
            sequence of length 0 gives 0.
        layout: the pattern of the image that is being drawn, one for all heads or a sequence of H; the query stands at
            position ``length - 1``, and only the keys it may see are read. None: all of them.
        scale: factor of the scores; ``1/sqrt(D)`` when None.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``, as for `flash_attention`; ``"ext"`` (C++, CPU, no
            float64).

    Returns:
        [B,H,1,D], dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.

    Cost: reads 2·B·H·n·D values, n the keys seen (`length` without a layout); bound by memory.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    q, k_cache, v_cache = check_attention(q, k_cache, v_cache, names=("q", "k_cache", "v_cache"))
    if q.shape[2] != 1:
        raise ValueError(f"q must be [B,H,1,D], got {tuple(q.shape)}; use flash_attention for several queries")
    length = check_length(length, batch=q.shape[0], longest=k_cache.shape[2])
    scale = check_scale(scale, q.shape[3])
    chosen = backends.select("decode_attention", backend, (q, k_cache, v_cache), q.shape[3])
    if layout is not None:
        return _sparse_decode(q, k_cache, v_cache, length, layout, scale, chosen)
    if chosen == "reference":
        return reference.decode_attention_reference(q, k_cache, v_cache, length, scale=scale)
    q, scale = nonnegative_scale(q, scale)
    if chosen == "torch" and q.device.type != "cpu":
        return torch_decode.decode_attention(q, k_cache, v_cache, length, scale=scale)
    if isinstance(length, Tensor):
        return call(decode_ops.decode, q, k_cache, v_cache, length.to(q.device), 0, scale, chosen)[0]
    return call(decode_ops.decode, q, k_cache, v_cache, None, length, scale, chosen)[0]


def _sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    layout: SparseLayout | Sequence[SparseLayout],
    scale: float,
    chosen: str,
) -> Tensor:
    """`decode_attention` with a layout, arguments checked but for the layout."""
    key = check_layout(layout, heads=q.shape[1], tokens=None)
    # Of the layout itself: torch.compile cannot trace the look-up of its key.
    tokens = (layout if isinstance(layout, SparseLayout) else layout[0]).tokens
    check_length(length, batch=q.shape[0], longest=tokens, what="the layout's")
    if chosen == "reference":
        visible = torch_decode.visible_by_layout(key, k_cache, length).expand(-1, q.shape[1], -1, -1)
        k_cache, v_cache = zero_not_visible(k_cache, visible), zero_not_visible(v_cache, visible)
        return reference.attention_reference(q, k_cache, v_cache, causal=False, scale=scale, mask=visible)[0]
    if isinstance(length, Tensor):
        return call(decode_ops.sparse_decode, q, k_cache, v_cache, length.to(q.device), 0, key, scale, chosen)[0]
    return call(decode_ops.sparse_decode, q, k_cache, v_cache, None, length, key, scale, chosen)[0]
