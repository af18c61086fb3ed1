"""What several implementations share: kinds of tensors, dtype of sums, memory order, keys not visible, sign of the scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

# Of a dense tensor with values on the CPU: made under inference_mode, and not. Traced and transformed tensors, those of other
# devices and layouts, and views whose sign is not applied yet have other keys. Not read from a tensor: this module may be
# imported under a mode.
_Keys = torch._C.DispatchKeySet
_INFERENCE = _Keys(torch._C.DispatchKey.CPU) | _Keys(torch._C.DispatchKey.AutocastCPU)
_RECORDED = _INFERENCE | _Keys(torch._C.DispatchKey.AutogradCPU) | _Keys(torch._C.DispatchKey.ADInplaceOrView)
_CPU_KEYS = {_INFERENCE.raw_repr(), _RECORDED.raw_repr()}
_BATCHED = [torch._C._parse_dispatch_key(name) for name in ("Batched", "FuncTorchBatched")]
# Of torch itself: they stand for a tensor while something is traced, and operators know them.
_TRACED = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor", "TwoTensor")


def python_number(value: object) -> object:
    """The number that a scalar of NumPy stands for; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is a dense tensor with values on the CPU, and nothing else: its memory may be read as it lies."""
    kind = type(x)
    return (kind is Tensor or kind is torch.nn.Parameter) and torch._C._dispatch_keys(x).raw_repr() in _CPU_KEYS


def is_plain(x: Tensor) -> bool:
    """Whether x is one tensor with values: not one that torch.compile traces, and not a batch under vmap or is_grads_batched.

    The batch of is_grads_batched has the type of any tensor. Only its dispatch keys tell.
    """
    keys = torch._C._dispatch_keys(x)
    return type(x) is Tensor and not any(keys.has(key) for key in _BATCHED)  # type: ignore[arg-type]


def is_readable(x: Tensor) -> bool:
    """Whether Python may look at the values of x now: on the CPU, and neither traced nor transformed."""
    return (
        not torch.compiler.is_compiling()
        and (is_plain_cpu(x) or (x.device.type == "cpu" and is_plain(x)))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def needs_plain_operations(tensors: Sequence[Tensor]) -> str:
    """Why operations of torch alone can serve a call, and no operator of ours; empty where one can.

    Forward-mode derivatives: operators have none, and torch would take 0 for them without a word. Subclasses of a tensor with
    operations of their own (quantised weights, DTensor): they know those of torch.
    """
    if forward_ad._current_level >= 0 and _has_tangent(tensors):
        return "forward-mode derivatives (torch.func.jvp, dual tensors) are those of the reference only"
    for x in tensors:
        kind = type(x)
        if kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__name__ in _TRACED:
            continue
        return f"tensors of class {kind.__name__} have operations of their own"
    return ""


def _has_tangent(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True  # which of several levels has a tangent cannot be told
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of `dtype` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_heads(like: Tensor, tokens: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An output [B,H,T,D] in memory [B,T,H,D], so that joining the heads behind attention is a view.

    Args:
        like: gives B, H, D, the device, and what the others leave out.
        tokens: T.
        dtype: of the output.
    """
    batch, heads, own, head_dim = like.shape
    rows = own if tokens is None else tokens
    size, stride = (batch, heads, rows, head_dim), (rows * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(size, stride, dtype=dtype or like.dtype, device=like.device)


def zero_heads(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`empty_heads`, filled with 0."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_zeros(batch, tokens, heads, head_dim, dtype=dtype or like.dtype).transpose(1, 2)


def empty_lse(q: Tensor) -> Tensor:
    """An empty log-sum-exp [B,H,T] of queries [B,H,T,D]."""
    return q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def zero_not_visible(x: Tensor, visible: Tensor) -> Tensor:
    """Keys or values [B,H,T,D] with 0 where `visible`, bool [B or 1,H or 1,1,T], is false.

    A weight of 0 is not enough: what lies unused in a cache may be NaN, and 0 x NaN is NaN.
    """
    return x.masked_fill(~visible.transpose(-1, -2), 0.0)


def nonnegative_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a scale above 0 with the same scores: kernels take the maximum before they scale, which must keep the order."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)
