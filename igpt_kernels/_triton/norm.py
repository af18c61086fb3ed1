"""Root-mean-square norm of rows, forward and backward (Zhang and Sennrich 2019), with the residual addition before it.

A program takes whole rows, several where they are short, so that its threads have 16-byte loads in flight; widths that are
no power of two are masked. Backward, as many programs as the chip holds walk over all rows. Each keeps a float32 sum of its
weight gradients; a second, small kernel adds those up. No atomics: the same bits in every run.

With x̂ = s·rstd and g = dy·weight, over a row of C values::

    dweight = sum over rows of dy·x̂        ds = rstd·(g - x̂·mean(g·x̂))
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._triton.common import ceil_div, on_device
from igpt_kernels._triton.launch import launch
from igpt_kernels._triton.rows import as_rows, launch_sum_partials, load_rows, programs, store_rows


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward_kernel(
    X, Residual, Weight, Out, Summed, Rstd,  # x, residual [rows,C]; out, summed [rows,C] contiguous; rstd [rows] float32
    stride_x, stride_r, rows, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows. Without a residual, Residual and Summed are None."""
    FULL: tl.constexpr = C == BLOCK_N
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row_offset = row.to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    s = load_rows(X, row_offset * stride_x, row_ok, cols, C, FULL)
    if Residual is not None:
        s += load_rows(Residual, row_offset * stride_r, row_ok, cols, C, FULL)
        # What is normed is the sum as it is stored: the next layer's residual.
        s = s.to(Summed.dtype.element_ty).to(tl.float32)
        store_rows(Summed, row_offset * C, row_ok, cols, C, s, FULL)
    weight = tl.load(Weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
    tl.store(Rstd + row, rstd, mask=row_ok)
    normed = s * rstd[:, None]
    # Rounded before the weight multiplies it, as the model's own code does.
    if Residual is not None:
        normed = normed.to(Summed.dtype.element_ty).to(tl.float32)
    else:
        normed = normed.to(X.dtype.element_ty).to(tl.float32)
    store_rows(Out, row_offset * C, row_ok, cols, C, normed * weight[None, :], FULL)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward_kernel(
    Grad, GradSummed, S, Weight, Rstd, Ds, Narrow, Partial,  # ds, narrow [rows,C] contiguous; partial [programs,C] float32
    stride_g, stride_gs, stride_s, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every so-many-th tile of rows, and the sum of its weight gradients. GradSummed and Narrow may be None."""
    FULL: tl.constexpr = C == BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    weight = tl.load(Weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < rows
        row_offset = row.to(tl.int64)
        s = load_rows(S, row_offset * stride_s, row_ok, cols, C, FULL)
        grad = load_rows(Grad, row_offset * stride_g, row_ok, cols, C, FULL)
        rstd = tl.load(Rstd + row, mask=row_ok, other=0.0)[:, None]
        if GradSummed is not None:
            more = load_rows(GradSummed, row_offset * stride_gs, row_ok, cols, C, FULL)
        normed = s * rstd
        dweight += grad * normed
        grad *= weight[None, :]
        ds = (grad - normed * (tl.sum(grad * normed, 1) / C)[:, None]) * rstd
        if GradSummed is not None:
            ds += more
        store_rows(Ds, row_offset * C, row_ok, cols, C, ds, FULL)
        if Narrow is not None:
            store_rows(Narrow, row_offset * C, row_ok, cols, C, ds, FULL)
    tl.store(Partial + tl.program_id(0) * C + cols, tl.sum(dweight, 0), mask=cols < C)


def _config(name: str, s_dtype: torch.dtype, x: Tensor, config: tuning.Config | None) -> tuning.Config:
    """The shipped configuration, or the one that was given, in whose tile a row must fit."""
    width = x.shape[-1]
    if config is None:
        return tuning.lookup(name, dtype=s_dtype, head_dim=width, device=x.device)
    if config.block_n < width:
        raise ValueError(f"config.block_n must be at least the width {width}, got {config.block_n}")
    return config


def launch_rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, config: tuning.Config | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel on checked arguments; see `igpt_kernels.rms_norm`.

    Args:
        x: [..., C] float16, bfloat16 or float32, C <= 8192; any strides.
        residual: of the shape of x, or None.
        weight: [C].
        eps: added to the mean of the squares.
        config: rows and warps of a program; the shipped ones for this device when None.

    Returns:
        out [..., C] in the dtype that all three promote to; x + residual (None without a residual), and 1/rms [...] float32.
    """
    width = x.shape[-1]
    summed_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(*x.shape, dtype=torch.promote_types(summed_dtype, weight.dtype), device=x.device)
    summed = None if residual is None else torch.empty(*x.shape, dtype=summed_dtype, device=x.device)
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    rows = x_rows.shape[0]
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.dim() != 2:
        rstd = rstd.view(x.shape[:-1])
    if rows == 0:
        return out, summed, rstd
    config = _config("rms_norm_forward", summed_dtype, x, config)
    with on_device(x):
        launch(
            _rms_norm_forward_kernel, (ceil_div(rows, config.block_m),),
            x_rows, residual_rows, weight.contiguous(), out, summed, rstd,
            x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), rows, eps,
            C=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return out, summed, rstd


def launch_rms_norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None = None,
    *,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the backward kernel and the sum of weight gradients.

    Args:
        grad: gradient of the normed rows [..., C].
        grad_summed: gradient of the sum that came out beside them, or None.
        s: what was normed [..., C]: x, or x + residual.
        weight: [C].
        rstd: from the forward pass [...], float32.
        narrow: a second dtype in which the gradient is wanted too, when x and residual differ.
        config: rows and warps of a program, and programs on a multiprocessor; the shipped ones for this device when None.

    Returns:
        ds [..., C] in the dtype of s; the same in `narrow` (or None), and dweight [C] in the dtype of weight.
    """
    width = s.shape[-1]
    ds = torch.empty(*s.shape, dtype=s.dtype, device=s.device)
    low = None if narrow is None else torch.empty(*s.shape, dtype=narrow, device=s.device)
    s_rows, grad_rows = as_rows(s), as_rows(grad)
    more_rows = None if grad_summed is None else as_rows(grad_summed)
    rows = s_rows.shape[0]
    if rows == 0:
        return ds, low, torch.zeros(width, dtype=weight.dtype, device=weight.device)
    config = _config("rms_norm_backward", s.dtype, s, config)
    count = min(programs(s.device, config.num_stages), ceil_div(rows, config.block_m))
    partial = torch.empty(count, width, dtype=torch.float32, device=s.device)
    with on_device(s):
        launch(
            _rms_norm_backward_kernel, (count,),
            grad_rows, more_rows, s_rows, weight.contiguous(), rstd, ds, low, partial,
            grad_rows.stride(0), 0 if more_rows is None else more_rows.stride(0), s_rows.stride(0), rows,
            C=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return ds, low, launch_sum_partials(partial, weight.dtype)
