"""Norm and activation on torch: few passes over memory, nothing kept for the backward pass but the inputs.

On the CPU the rows are taken in pieces that stay in the cache between one torch operation and the next; elsewhere all at
once. Half dtypes are widened a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 1 << 18
"""Values a thread takes at a time: 1 MiB of float32, the L2 cache of a core. The norm's backward takes 1.2 times as long
with a quarter of that, 1.6 times in one piece (4096 x 1024, roughly: on a busy machine)."""
_silu_backward = torch.ops.aten.silu_backward.grad_input


def _pieces(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _PIECE * torch.get_num_threads() // width) if device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm, x + residual (None without one) and 1/rms; see `igpt_kernels._triton.rms_norm.launch_rms_norm_forward`."""
    width = x.shape[-1]
    summed_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = _wide(summed_dtype)
    out = x.new_empty(x.shape, dtype=torch.promote_types(summed_dtype, weight.dtype))
    summed = None if residual is None else x.new_empty(x.shape, dtype=summed_dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    x_rows, out_rows, rstd_rows = _rows(x), out.view(-1, width), rstd.view(-1, 1)
    for piece in _pieces(len(x_rows), width, x.device):
        s, y = x_rows[piece], out_rows[piece]
        if residual is not None and summed is not None:
            s = torch.add(s, _rows(residual)[piece], out=summed.view(-1, width)[piece])
        values = s.to(wide)
        r = torch.linalg.vector_norm(values, dim=-1, keepdim=True, out=rstd_rows[piece])
        r.square_().div_(width).add_(eps).rsqrt_()
        if s.dtype == wide:
            torch.mul(values, r, out=y).mul_(weight)
        else:
            torch.mul((values * r).to(s.dtype), weight, out=y)
    return out, summed, rstd


def rms_norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """ds, the same in `narrow` (None without one) and dweight; see `launch_rms_norm_backward` beside the above."""
    width, wide = s.shape[-1], rstd.dtype
    ds = s.new_empty(s.shape)
    low = None if narrow is None else s.new_empty(s.shape, dtype=narrow)
    scale = weight.to(wide)
    dweight = torch.zeros_like(scale)
    s_rows, grad_rows, ds_rows, rstd_rows = _rows(s), _rows(grad), ds.view(-1, width), rstd.view(-1, 1)
    for piece in _pieces(len(s_rows), width, s.device):
        dy, r = grad_rows[piece].to(wide), rstd_rows[piece]
        normed = s_rows[piece].to(wide) * r
        product = dy * normed
        dweight += product.sum(0)
        mean = product.mul_(scale).mean(-1, keepdim=True)
        d = torch.mul(dy, scale, out=ds_rows[piece] if s.dtype == wide else None)
        d.addcmul_(normed, mean, value=-1).mul_(r)
        if grad_summed is not None:
            d.add_(_rows(grad_summed)[piece])
        if s.dtype != wide:
            ds_rows[piece] = d
        if low is not None:
            low.view(-1, width)[piece] = d
    return ds, low, dweight.to(weight.dtype)


def quick_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """z·sigmoid(1.702·z) with z = x (+ bias), dtype of x, contiguous."""
    width, wide = x.shape[-1], _wide(x.dtype)
    out = x.new_empty(x.shape)
    x_rows, out_rows = _rows(x), out.view(-1, width)
    for piece in _pieces(len(x_rows), width, x.device):
        z = x_rows[piece].to(wide)
        if bias is not None:
            z = z + bias
        y = torch.mul(z, 1.702, out=out_rows[piece] if x.dtype == wide else None)
        y.sigmoid_().mul_(z)
        if x.dtype != wide:
            out_rows[piece] = y
    return out


def quick_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dx (dtype of x, contiguous) and dbias (None without a bias): the activation is silu(1.702·z) / 1.702."""
    width, wide = x.shape[-1], _wide(x.dtype)
    dx = x.new_empty(x.shape)
    dbias = None if bias is None else bias.new_zeros(width, dtype=wide)
    x_rows, grad_rows, dx_rows = _rows(x), _rows(grad), dx.view(-1, width)
    for piece in _pieces(len(x_rows), width, x.device):
        z = x_rows[piece].to(wide)
        if bias is not None:
            z = z + bias
        d = torch.mul(z, 1.702, out=dx_rows[piece] if x.dtype == wide else None)
        _silu_backward(grad_rows[piece].to(wide), d, grad_input=d)
        if dbias is not None:
            dbias += d.sum(0)
        if x.dtype != wide:
            dx_rows[piece] = d
    return dx, None if dbias is None or bias is None else dbias.to(bias.dtype)
