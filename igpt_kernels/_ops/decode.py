"""The registered operators of decoding: one query a sequence against a cache of keys, dense and with a layout.

Their derivatives are eager: one query's weights are no larger than a column of the cache. Nothing saved from the forward pass
but its inputs enters, so that differentiating once more is right too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_kernels import backends
from igpt_kernels._ops.shared import register
from igpt_kernels._ops.transforms import in_batch
from igpt_kernels._torch import decode as torch_decode
from igpt_kernels.layouts import groups_of, keys_in, registered
from igpt_kernels.tensors import empty_heads, empty_lse, zero_not_visible


def _dense(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.step("decode_attention", backend, "dense")
    result: tuple[Tensor, Tensor] = run(q, k_cache, v_cache, length if lengths is None else lengths, scale)
    return result


def _sparse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, layout: str, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.step("decode_attention", backend, "sparse")
    groups = groups_of(layout, q.shape[1])
    result: tuple[Tensor, Tensor] = run(q, k_cache, v_cache, length if lengths is None else lengths, groups, scale)
    return result


def _dense_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _sparse_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, layout: str, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return empty_heads(q), empty_lse(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k_cache, v_cache, lengths, *how = inputs
    ctx.save_for_backward(q, k_cache, v_cache, lengths)
    ctx.how = tuple(how)
    ctx.mark_non_differentiable(output[1])


def _save_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.layouts = [registered(key) for key in keys_in(inputs[5])]  # kept alive, as in `sparse`


def _gradients(
    grad: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one query a sequence, which sees the keys of `visible` (bool, broadcasts to [B,H,1,Tmax])."""
    k, v = zero_not_visible(k_cache, visible), zero_not_visible(v_cache, visible)
    scores = (q @ k.transpose(-1, -2)) * scale
    p = scores.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~visible, 0.0)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def _dense_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k_cache, v_cache, lengths = ctx.saved_tensors
    length, scale, _backend = ctx.how
    visible = torch_decode.visible_keys(k_cache, length if lengths is None else lengths)[:, None, None, :]
    return *_gradients(grad, q, k_cache, v_cache, visible, scale), None, None, None, None


def _sparse_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k_cache, v_cache, lengths = ctx.saved_tensors
    length, layout, scale, _backend = ctx.how
    visible = torch_decode.visible_by_layout(layout, k_cache, length if lengths is None else lengths)
    return *_gradients(grad, q, k_cache, v_cache, visible, scale), None, None, None, None, None


def _dense_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, lengths: torch.Size | None, length: int, *how: object, **shapes: object
) -> int:
    """4·B·H·length·D; with a tensor of lengths, whose values a formula cannot read, the whole cache counts."""
    return 4 * q[0] * q[1] * q[3] * (k[2] if lengths is not None else length)


def _sparse_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, lengths: torch.Size | None, length: int, layout: str,
    *how: object, **shapes: object,
) -> int:  # fmt: skip
    """4·B·D·keys over all heads; with a tensor of lengths, whose values a formula cannot read, of the last query."""
    total = 0
    for key, members in groups_of(layout, q[1]):
        last = registered(key).tokens if lengths is not None else length
        total += len(members) * (len(registered(key).keys_of(last - 1)) if last else 0)
    return 4 * q[0] * q[3] * total


decode = register(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, SymInt length, float scale, str backend)"
    " -> (Tensor out, Tensor lse)",
    _dense,
    _dense_fake,
    save=_save,
    backward=_dense_gradients,
    flops=_dense_flops,
    rule=in_batch,
)
sparse_decode = register(
    "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, SymInt length, str layout, float scale,"
    " str backend) -> (Tensor out, Tensor lse)",
    _sparse,
    _sparse_fake,
    save=_save_sparse,
    backward=_sparse_gradients,
    flops=_sparse_flops,
    rule=in_batch,
)
