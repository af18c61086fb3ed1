"""Attention by torch: its flash kernel on the CPU, which gives the log-sum-exp, and scaled_dot_product_attention elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt_kernels.memory import guard_square
from igpt_kernels.tensors import accumulation_dtype, zero_heads

cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def in_heads_order(x: Tensor) -> Tensor:
    """`x` [B,H,T,D] in memory [B,T,H,D], copied only if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def dense_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors with rows that do not overlap and have no gaps in them; torch's kernel is wrong for others.

    The distance of rows is a leading dimension of its matrices. Below the width of one, it reads something else (torch 2.13),
    even where there is one row only.
    """
    return [x if _is_dense(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _is_dense(x: Tensor) -> bool:
    strides = x.stride()
    return strides[-1] == 1 and strides[-2] >= x.shape[-1]


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (outputs and log-sum-exps)."""
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == -torch.inf, 0.0)
    weights = (torch.exp(part - safe)[..., None] for part in (lse, other_lse))
    first, second = (x.to(total.dtype) * weight for x, weight in zip((out, other), weights, strict=True))
    return (first + second).to(out.dtype), total


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The step "forward" of flash attention on the CPU: linear memory, no mask.

    Where lengths differ, causality counts from the lower right: the keys before the first query's are a full attention, the
    rest a causal square; queries before the first key see nothing.
    """
    queries, keys = q.shape[2], k.shape[2]
    lse_dtype = accumulation_dtype(q.dtype)
    if q.numel() == 0 or keys == 0:
        return zero_heads(q), q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
    dtype = q.dtype
    if dtype == torch.float16 and queries >= 4:
        # Torch 2.13's kernel multiplies float16 at half the speed of float32 (154 and 82 ms, B·H 8, T 2048, D 64, one core).
        q, k, v = (x.to(lse_dtype) for x in (q, k, v))
    q, k, v = dense_rows(q, k, v)
    if not causal or queries == 1:
        out, lse = cpu_forward(q, k, v, 0.0, False, scale=scale)
    elif queries > keys:
        out, lse = zero_heads(q), q.new_full(q.shape[:3], -torch.inf, dtype=lse_dtype)
        out[:, :, -keys:], lse[:, :, -keys:] = cpu_forward(q[:, :, -keys:], k, v, 0.0, True, scale=scale)
    elif queries == keys:
        out, lse = cpu_forward(q, k, v, 0.0, True, scale=scale)
    else:
        before = keys - queries
        past = cpu_forward(q, k[:, :, :before], v[:, :, :before], 0.0, False, scale=scale)
        square = cpu_forward(q, k[:, :, before:], v[:, :, before:], 0.0, True, scale=scale)
        out, lse = merge(*past, *square)
    out = in_heads_order(out)
    return out if out.dtype == dtype else out.to(dtype), lse.contiguous()


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The step "backward" of flash attention on the CPU: each set of keys adds its part, given the whole's lse.

    In float32, rounded once. Torch 2.13's kernel adds its parts in the dtype of its inputs. In bfloat16, 4,096 causal tokens,
    dV was off by 0.058 in place of 0.008. float32 takes 1.3 times as long as bfloat16, and a tenth of float16.
    """
    queries, keys, dtype = q.shape[2], k.shape[2], q.dtype
    if q.numel() == 0 or keys == 0:
        return zero_heads(q), zero_heads(k), zero_heads(v)
    grad, q, k, v, out = dense_rows(*(x.to(lse.dtype) for x in (grad, q, k, v, out)))

    def part(rows: slice, cols: slice, square: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = (x[:, :, rows] for x in (q, out, lse))
        some_q, some_out, some_lse = of_rows
        return cpu_backward(
            grad[:, :, rows], some_q, k[:, :, cols], v[:, :, cols], some_out, some_lse, 0.0, square, scale=scale
        )

    if not causal or queries == 1:
        dq, dk, dv = part(slice(None), slice(None), False)
    elif queries >= keys:
        dq = zero_heads(q)
        dq[:, :, queries - keys :], dk, dv = part(slice(queries - keys, None), slice(None), True)
    else:
        before = keys - queries
        dq, dk, dv = part(slice(None), slice(None, before), False)
        dq_square, dk_square, dv_square = part(slice(None), slice(before, None), True)
        dq, dk, dv = dq + dq_square, torch.cat([dk, dk_square], 2), torch.cat([dv, dv_square], 2)
    return in_heads_order(dq).to(dtype), in_heads_order(dk).to(dtype), in_heads_order(dv).to(dtype)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """`igpt_kernels.attention.flash_attention` by scaled_dot_product_attention, for devices other than the CPU and CUDA.

    It is not behind the operator: scaled_dot_product_attention gives no log-sum-exp there, and has derivatives of its own.
    """
    queries, keys = q.shape[2], k.shape[2]
    if q.numel() == 0 or keys == 0:
        # Multiplying keeps an empty or all-masked result inside the autograd graph, with zero gradients.
        return q * 0
    q, k, v = dense_rows(q, k, v)
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if queries > keys:
        # Rows that see nothing are 0; not every kernel of torch's agrees (float64 gives NaN).
        square = F.scaled_dot_product_attention(q[:, :, -keys:], k, v, is_causal=True, scale=scale)
        return torch.cat([q[:, :, :-keys] * 0, square], 2)
    # torch's is_causal counts from the upper left corner when lengths differ (pytorch/pytorch#108108); ours is lower right.
    guard_square(f"a {queries} x {keys} mask", queries * keys, q.device)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
