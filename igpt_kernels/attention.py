"""Attention for image tokens: public functions that document, check, and choose a backend.

Letters: B batch, H heads, T tokens, D head dim. Tokens are in raster order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels import _ops_attention, backends, reference
from igpt_kernels._torch import attention as torch_attention
from igpt_kernels.checks import check_attention, check_length, check_scale


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under torch.autocast, floating-point tensors in its dtype, as scaled_dot_product_attention takes them."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _reference_fits(backend: str, q: Tensor, keys: int) -> None:
    """Nobody asked for T x T scores by name: then they may not take more than a quarter of free memory."""
    if backend == "auto":
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        torch_attention.guard_square(f"{q.shape[2]} x {keys} scores", rows * keys * q.element_size(), q.device)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention: ``out[i] = sum_j softmax_j(scale * q[i].k[j]) v[j]`` over the visible keys j.

    With `causal`, query i sees key j when ``j <= i + Tk - Tq`` (the lower-right corner of the score matrix), so that a
    chunk of queries at the end of a cache sees everything before it::

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
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA), ``"torch"`` (torch's flash kernel on the CPU,
            scaled_dot_product_attention elsewhere) or ``"reference"`` (eager, Tq x Tk scores in memory). A name never
            falls back; `igpt_kernels.explain` says what auto takes and why.

    Returns:
        [B,H,Tq,D], dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        MemoryError: a Tq x Tk tensor that nobody asked for by name would take over a quarter of free memory.
        RuntimeError: in a second derivative; only the reference has one.

    Under torch.autocast the inputs are cast to its dtype. The backward pass of the operator (Triton, and torch on the CPU)
    is deterministic, bit for bit.

    Cost: 4·B·H·Tq·Tk·D floating point operations (half of it when causal), 2.5 times that backward (Triton recomputes:
    3.5 times); memory linear in T with fused backends. Triton: Dao, "FlashAttention-2", 2023.
    """
    q, k, v = check_attention(*_autocast(q, k, v))
    scale = check_scale(scale, q.shape[3])
    table = backends.explain("flash_attention", dtype=q.dtype, device=q.device, head_dim=q.shape[3])
    chosen = backends.choose(backend, table, "flash_attention")
    if chosen == "reference":
        _reference_fits(backend, q, k.shape[2])
        return reference.attention_reference(q, k, v, causal=causal, scale=scale)[0]
    if scale <= 0:
        # Kernels mask or take the maximum before they scale, which needs a scale that keeps the order.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if chosen == "torch" and q.device.type != "cpu":
        return torch_attention.flash_attention(q, k, v, causal=causal, scale=scale)
    return _ops_attention.flash_forward(q, k, v, causal, scale)[0]


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    *,
    layout: None = None,
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
        layout: sparse patterns are not built yet; None.
        scale: factor of the scores; ``1/sqrt(D)`` when None.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``, as for `flash_attention`.

    Returns:
        [B,H,1,D], dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.

    Cost: reads 2·B·H·length·D values; bound by memory.
    """
    q, k_cache, v_cache = check_attention(*_autocast(q, k_cache, v_cache))
    if q.shape[2] != 1:
        raise ValueError(f"q must be [B,H,1,D], got {tuple(q.shape)}; use flash_attention for several queries")
    if layout is not None:
        raise ValueError(f"layout must be None (sparse patterns are not built yet), got {layout!r}")
    length = check_length(length, batch=q.shape[0], longest=k_cache.shape[2])
    scale = check_scale(scale, q.shape[3])
    table = backends.explain("decode_attention", dtype=q.dtype, device=q.device, head_dim=q.shape[3])
    chosen = backends.choose(backend, table, "decode_attention")
    if chosen == "reference":
        return reference.decode_attention_reference(q, k_cache, v_cache, length, scale=scale)
    if scale <= 0:
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if chosen == "torch" and q.device.type != "cpu":
        return torch_attention.decode_attention(q, k_cache, v_cache, length, scale=scale)
    if isinstance(length, Tensor):
        return _ops_attention.decode(q, k_cache, v_cache, length.to(q.device), 0, scale)[0]
    return _ops_attention.decode(q, k_cache, v_cache, None, length, scale)[0]
