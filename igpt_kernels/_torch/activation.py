"""QuickGELU by torch: few passes over memory, nothing kept for the backward pass but the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels._torch.rows import as_rows, pieces
from igpt_kernels.tensors import accumulation_dtype

_silu_backward = torch.ops.aten.silu_backward.grad_input


def quick_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """z·sigmoid(1.702·z) with z = x (+ bias), dtype of x, contiguous."""
    width, wide = x.shape[-1], accumulation_dtype(x.dtype)
    out = x.new_empty(x.shape)
    x_rows, out_rows = as_rows(x), out.view(-1, width)
    for piece in pieces(len(x_rows), width, x.device):
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
    width, wide = x.shape[-1], accumulation_dtype(x.dtype)
    dx = x.new_empty(x.shape)
    dbias = None if bias is None else bias.new_zeros(width, dtype=wide)
    x_rows, grad_rows, dx_rows = as_rows(x), as_rows(grad), dx.view(-1, width)
    for piece in pieces(len(x_rows), width, x.device):
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
