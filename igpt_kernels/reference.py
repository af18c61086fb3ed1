"""The oracles: each operator written out as it is defined, in eager PyTorch. For reading and for tests, not for speed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def palette_lookup_reference(pixels: Tensor, colors: Tensor) -> Tensor:
    """The nearest palette colour of each pixel, by trying them all.

    The distance of a pixel (r, g, b) to a colour (R, G, B) is (r-R)² + (g-G)² + (b-B)². The sum is taken in float64, in that
    order; of equal distances the lowest index wins.

    Args:
        pixels: uint8 [..., 3].
        colors: float64 [V, 3], on the device of `pixels`.

    Returns:
        int64 [...]. Costs some 60 bytes and about 8·V nanoseconds a pixel.
    """
    red, green, blue = pixels.to(torch.float64).unbind(-1)
    least = torch.full_like(red, torch.inf)
    winner = torch.zeros_like(red, dtype=torch.int64)
    for index, color in enumerate(colors):
        distance = (red - color[0]) ** 2 + (green - color[1]) ** 2 + (blue - color[2]) ** 2
        winner = torch.where(distance < least, index, winner)
        least = torch.minimum(distance, least)
    return winner


def palette_table_reference(colors: Tensor) -> Tensor:
    """`palette_lookup_reference` of all 2²⁴ colours (r, g, b), in the order of r·2¹⁶ + g·2⁸ + b: the same sums, term by term.

    Args:
        colors: float64 [V, 3].

    Returns:
        int64 [2²⁴] on the device of `colors`. Costs about V / 45 seconds of one core.
    """
    levels = np.arange(256, dtype=np.float64)
    red, green, blue = np.square(levels - colors.cpu().numpy().T[:, :, None])  # each [V, 256]
    table = np.zeros((256, 256, 256), dtype=np.int32)
    for r, winner in enumerate(table):
        least = np.full(winner.shape, np.inf)
        for index in range(len(red)):
            distance = (red[index, r] + green[index])[:, None] + blue[index]
            np.copyto(winner, index, where=distance < least)
            np.minimum(distance, least, out=least)
    return torch.from_numpy(table).flatten().to(colors.device, torch.int64)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle of every attention: ``softmax(scale·q·kᵀ + mask)·v``, eager, in the dtype of its inputs.

    Args:
        q: [B,H,Tq,D]; float64 for the truth, a half dtype to learn what rounding that dtype alone costs.
        k: [B,H,Tk,D].
        v: [B,H,Tk,D].
        causal: query i sees key j when ``j <= i + Tk - Tq``.
        scale: ``1/sqrt(D)`` when None.
        mask: bool, True = may be seen, broadcastable to [B,H,Tq,Tk]; ANDed with causality.

    Returns:
        out [B,H,Tq,D] and lse [B,H,Tq], the natural log of the sum of exponentials. A row that sees nothing gives out 0,
        lse -inf and zero gradients.

    Cost: keeps B·H·Tq·Tk scores.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    if mask is not None:
        visible = visible & mask
    scores = (q @ k.transpose(-1, -2)) * scale
    # The lowest finite number, not -inf: a row of -inf would give NaN gradients (pytorch/pytorch#41508).
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    sees = visible.any(-1)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    if keys == 0:
        return (q * 0), q.new_full(q.shape[:3], -math.inf)
    lse = torch.logsumexp(scores, -1).masked_fill(~sees, -math.inf)
    return weights @ v, lse


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *, scale: float | None = None
) -> Tensor:
    """The oracle of decoding: the attention of one query over the first `length` keys of its sequence.

    Args:
        q: [B,H,1,D].
        k_cache: [B,H,Tmax,D].
        v_cache: [B,H,Tmax,D].
        length: keys visible: an int, or an integer tensor [B].
        scale: ``1/sqrt(D)`` when None.

    Returns:
        [B,H,1,D].
    """
    if not isinstance(length, Tensor):
        return attention_reference(q, k_cache[:, :, :length], v_cache[:, :, :length], causal=False, scale=scale)[0]
    visible = (torch.arange(k_cache.shape[2], device=q.device) < length.to(q.device)[:, None])[:, None, None, :]
    # Behind its length a cache may hold NaN, and 0 x NaN is NaN.
    k, v = (x.masked_fill(~visible.transpose(-1, -2), 0.0) for x in (k_cache, v_cache))
    return attention_reference(q, k, v, causal=False, scale=scale, mask=visible)[0]


def rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle of the norm: ``s·rsqrt(mean(s²) + eps)·weight`` of each row of s = x (+ residual), eager.

    Half dtypes are computed in float32. The normed row is rounded to the dtype of s before the weight multiplies it, as Image
    GPT does.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean of the squares.
        residual: [..., C], added first.

    Returns:
        [..., C] in the dtype that s and the weight promote to; with a residual, that and s.

    Cost: keeps about three tensors of the size of x for the backward pass; half dtypes keep float32 copies.
    """
    s = x if residual is None else x + residual
    wide = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(s.dtype) * weight
    return out if residual is None else (out, s)


def quick_gelu_reference(x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The oracle of the activation: ``z·sigmoid(1.702·z)`` with z = x (+ bias), eager, in the dtype of x.

    Args:
        x: [..., C].
        bias: [C].

    Returns:
        [..., C], dtype of x.
    """
    z = x if bias is None else (x + bias).to(x.dtype)
    return z * torch.sigmoid(1.702 * z)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """The oracle of the loss: ``lse(logits) - logits[target] + z_loss·lse(logits)²`` with logits = hidden·weightᵀ, eager.

    Args:
        hidden: [..., C].
        weight: [V,C].
        target: int64 [...], each a class or `ignore_index`.
        ignore_index: target of rows that do not count.
        reduction: ``"mean"`` over the rows that count (NaN where none does), ``"sum"``, or ``"none"``.
        z_loss: factor of the squared log-sum-exp.

    Returns:
        A scalar, or [...] with 0 in rows that do not count; float32, float64 for float64.

    Cost: keeps three tensors [..., V] for the backward pass.
    """
    logits = hidden @ weight.t()
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    counts = target != ignore_index
    # Before anything is computed of them, so that rows that do not count pass no NaN on.
    wide = wide.masked_fill(~counts[..., None], 0.0)
    lse = torch.logsumexp(wide, -1)
    picked = wide.gather(-1, target.masked_fill(~counts, 0)[..., None])[..., 0]
    loss = (lse - picked + z_loss * lse * lse).masked_fill(~counts, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()
