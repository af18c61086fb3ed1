"""RMSNorm by torch: few passes over memory, nothing kept for the backward pass but the inputs.

Half dtypes are widened a piece at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels._torch.rows import as_rows, pieces
from igpt_kernels.tensors import accumulation_dtype


def rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm, x + residual (None without one) and 1/rms; see `igpt_kernels._triton.norm.launch_rms_norm_forward`."""
    width = x.shape[-1]
    summed_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = accumulation_dtype(summed_dtype)
    out = x.new_empty(x.shape, dtype=torch.promote_types(summed_dtype, weight.dtype))
    summed = None if residual is None else x.new_empty(x.shape, dtype=summed_dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    x_rows, out_rows, rstd_rows = as_rows(x), out.view(-1, width), rstd.view(-1, 1)
    for piece in pieces(len(x_rows), width, x.device):
        s, y = x_rows[piece], out_rows[piece]
        if residual is not None and summed is not None:
            s = torch.add(s, as_rows(residual)[piece], out=summed.view(-1, width)[piece])
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
    s_rows, grad_rows, ds_rows, rstd_rows = as_rows(s), as_rows(grad), ds.view(-1, width), rstd.view(-1, 1)
    for piece in pieces(len(s_rows), width, s.device):
        dy, r = grad_rows[piece].to(wide), rstd_rows[piece]
        normed = s_rows[piece].to(wide) * r
        product = dy * normed
        dweight += product.sum(0)
        mean = product.mul_(scale).mean(-1, keepdim=True)
        d = torch.mul(dy, scale, out=ds_rows[piece] if s.dtype == wide else None)
        d.addcmul_(normed, mean, value=-1).mul_(r)
        if grad_summed is not None:
            d.add_(as_rows(grad_summed)[piece])
        if s.dtype != wide:
            ds_rows[piece] = d
        if low is not None:
            low.view(-1, width)[piece] = d
    return ds, low, dweight.to(weight.dtype)
