"""The registered attention operators: schemas, shapes without data, derivatives, costs. Torch only; kernels come late.

On CUDA the operators launch Triton kernels, on the CPU they run torch's own flash kernel, behind one set of derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from igpt_kernels._torch import attention as torch_attention

_library = Library("igpt_kernels", "FRAGMENT")
_library.define("flash_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor out, Tensor lse)")
_library.define(
    "flash_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)
_library.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, SymInt length, float scale) -> (Tensor out, Tensor lse)"
)

flash_forward = torch.ops.igpt_kernels.flash_forward
flash_backward = torch.ops.igpt_kernels.flash_backward
decode = torch.ops.igpt_kernels.decode


def _heads(like: Tensor) -> Tensor:
    """An empty tensor of that shape in memory [B,T,H,D], the layout of every output here."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _flash_forward_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from igpt_kernels._triton.flash_forward import launch_flash_forward

    return launch_flash_forward(q, k, v, causal=causal, scale=scale)


def _flash_backward_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from igpt_kernels._triton.flash_backward import launch_flash_backward

    return launch_flash_backward(grad, q, k, v, out, lse, causal=causal, scale=scale)


def _decode_cuda(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    from igpt_kernels._triton.decode import launch_decode

    return launch_decode(q, k_cache, v_cache, length if lengths is None else lengths, scale=scale)


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _flash_forward_fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _heads(q), _lse_like(q)


def _flash_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(q), _heads(k), _heads(v)


def _decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _heads(q), _lse_like(q)


def _save_flash(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, causal, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)  # type: ignore[arg-type]
    ctx.how = (causal, scale)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(lse)


def _flash_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    causal, scale = ctx.how  # type: ignore[attr-defined]
    dq, dk, dv = flash_backward(grad, *ctx.saved_tensors, causal, scale)  # type: ignore[attr-defined]
    return dq, dk, dv, None, None


def _save_nothing(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """A second derivative is an error, so nothing is kept for it."""


def _no_second_derivative(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("flash attention has no second derivative; use backend='reference' where one is needed")


def _save_decode(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k_cache, v_cache, lengths, length, scale = inputs
    ctx.save_for_backward(q, k_cache, v_cache, lengths)  # type: ignore[arg-type]
    ctx.how = (length, scale)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])


def decode_gradients(
    grad: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one query a sequence, which sees the keys of `visible` (bool, broadcast to [B,H,1,Tmax]).

    Eager: one query's weights are no larger than a column of the cache. Nothing saved from the forward pass but its inputs
    enters, so that differentiating this once more is right too.
    """
    # A hidden key may be NaN, and a weight of 0 would not stop it.
    hidden = ~visible.transpose(-1, -2)
    k, v = k_cache.masked_fill(hidden, 0), v_cache.masked_fill(hidden, 0)
    scores = (q @ k.transpose(-1, -2)) * scale
    p = scores.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~visible, 0.0)
    dp = grad @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad


def _decode_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k_cache, v_cache, lengths = ctx.saved_tensors  # type: ignore[attr-defined]
    length, scale = ctx.how  # type: ignore[attr-defined]
    visible = torch_attention.visible_keys(k_cache, length if lengths is None else lengths)[:, None, None, :]
    return *decode_gradients(grad, q, k_cache, v_cache, visible, scale), None, None, None


for _name, _cpu, _cuda, _fake, _save, _backward in (
    (
        "flash_forward",
        torch_attention.flash_forward,
        _flash_forward_cuda,
        _flash_forward_fake,
        _save_flash,
        _flash_gradients,
    ),
    (
        "flash_backward",
        torch_attention.flash_backward,
        _flash_backward_cuda,
        _flash_backward_fake,
        _save_nothing,
        _no_second_derivative,
    ),
    ("decode", torch_attention.decode, _decode_cuda, _decode_fake, _save_decode, _decode_gradients),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"igpt_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"igpt_kernels::{_name}", _backward, setup_context=_save, lib=_library)


def attention_pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs (i, j) that are visible: all, or with j <= i + keys - queries."""
    if not causal:
        return queries * keys
    seeing = min(queries, keys)
    return seeing * (seeing + 1) // 2 + max(0, keys - queries) * seeing


@register_flop_formula(flash_forward)
def flash_forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, causal: bool, scale: float, **shapes: object) -> int:
    """4·B·H·pairs·D: two products of two operations each."""
    return 4 * q[0] * q[1] * q[3] * attention_pairs(q[2], k[2], causal)


@register_flop_formula(flash_backward)
def flash_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, out: torch.Size, lse: torch.Size,
    causal: bool, scale: float, **shapes: object,
) -> int:  # fmt: skip
    """10·B·H·pairs·D, five products; what the kernels recompute beyond that is their own affair."""
    return 10 * q[0] * q[1] * q[3] * attention_pairs(q[2], k[2], causal)


@register_flop_formula(decode)
def decode_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, lengths: torch.Size | None, length: int, scale: float, **shapes: object
) -> int:
    """4·B·H·length·D; with a tensor of lengths, whose values a formula cannot read, the whole cache counts."""
    return 4 * q[0] * q[1] * q[3] * (k[2] if lengths is not None else length)
