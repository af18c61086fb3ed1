"""Image GPT's activation z·sigmoid(1.702·z), forward and backward, with the bias addition before it.

Without a bias, tensors that lie in one piece are one long row. With one, a program takes a tile of rows and columns, and its
piece of the bias once; backward, programs walk down their columns with a float32 sum of the bias gradients. A second, small
kernel adds those up. No atomics: the same bits in every run. Backward computes the sigmoid again from x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels._triton.common import LOG2E, ceil_div, on_device
from igpt_kernels._triton.launch import launch
from igpt_kernels._triton.rows import as_rows, launch_sum_partials, load_rows, programs, store_rows


@triton.jit
def sigmoid(z):
    """sigmoid(1.702·z): 0 and 1 at the ends, where the exponential overflows and vanishes."""
    return 1.0 / (1.0 + tl.math.exp2(z * (-1.702 * LOG2E)))


@triton.jit
def slope(z):
    """d/dz of z·t with t = sigmoid(1.702·z): t·(1 + 1.702·z·(1 - t))."""
    t = sigmoid(z)
    return t * (1.0 + 1.702 * z * (1.0 - t))


@triton.jit
def _quick_gelu_flat_kernel(X, Grad, Out, n, BLOCK: tl.constexpr):
    """BLOCK values of a tensor in one piece: the activation, or with a gradient its product with the slope."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offset < n
    z = tl.load(X + offset, mask=ok, other=0.0).to(tl.float32)
    if Grad is not None:
        y = tl.load(Grad + offset, mask=ok, other=0.0).to(tl.float32) * slope(z)
    else:
        y = z * sigmoid(z)
    tl.store(Out + offset, y.to(Out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def _quick_gelu_forward_kernel(
    X, Bias, Out,  # x [rows,C]; bias [C] or None; out [rows,C] contiguous
    stride_x, rows, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows and columns; programs that follow each other share their rows."""
    tiles = tl.cdiv(C, BLOCK_N)
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    row_offset = row.to(tl.int64)
    z = load_rows(X, row_offset * stride_x, row_ok, cols, C, False)
    if Bias is not None:
        z += tl.load(Bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    store_rows(Out, row_offset * C, row_ok, cols, C, z * sigmoid(z), False)


@triton.jit(do_not_specialize=["rows", "workers"])
def _quick_gelu_backward_kernel(
    Grad, X, Bias, Dx, Partial,  # grad, x [rows,C]; bias [C] or None; dx [rows,C] contiguous; partial [workers,C] or None
    stride_g, stride_x, rows, C, workers,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every workers-th tile of rows in one strip of columns, and the sum of its bias gradients."""
    tiles = tl.cdiv(C, BLOCK_N)
    worker = tl.program_id(0) // tiles
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if Bias is not None:
        bias = tl.load(Bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
        dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(worker, tl.cdiv(rows, BLOCK_M), workers):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < rows
        row_offset = row.to(tl.int64)
        z = load_rows(X, row_offset * stride_x, row_ok, cols, C, False)
        grad = load_rows(Grad, row_offset * stride_g, row_ok, cols, C, False)
        if Bias is not None:
            z += bias
        dx = grad * slope(z)
        store_rows(Dx, row_offset * C, row_ok, cols, C, dx, False)
        if Bias is not None:
            dbias += dx
    if Bias is not None:
        tl.store(Partial + worker * C + cols, tl.sum(dbias, 0), mask=cols < C)


def _config(name: str, x: Tensor) -> tuning.Config:
    return tuning.lookup(name, dtype=x.dtype, head_dim=min(x.shape[-1], tuning.WIDEST), device=x.device)


def launch_quick_gelu_forward(x: Tensor, bias: Tensor | None, *, config: tuning.Config | None = None) -> Tensor:
    """Launch the forward kernel on checked arguments; see `igpt_kernels.quick_gelu`.

    Args:
        x: [..., C] float16, bfloat16 or float32; any strides.
        bias: [C], or None.
        config: tile and warps of a program; the shipped ones for this device when None.

    Returns:
        [..., C] in the dtype of x, contiguous.
    """
    out = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    config = _config("quick_gelu_forward", x) if config is None else config
    with on_device(x):
        if bias is None and x.is_contiguous():
            block = config.block_m * config.block_n
            launch(
                _quick_gelu_flat_kernel, (ceil_div(x.numel(), block),),
                x, None, out, x.numel(), BLOCK=block, num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
            return out
        rows = as_rows(x)
        count, width = rows.shape
        launch(
            _quick_gelu_forward_kernel, (ceil_div(count, config.block_m) * ceil_div(width, config.block_n),),
            rows, None if bias is None else bias.contiguous(), out, rows.stride(0), count, width,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return out


def launch_quick_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, *, config: tuning.Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernel and, with a bias, the sum of its gradients.

    Args:
        grad: gradient of the result [..., C].
        x: as in the forward pass [..., C].
        bias: [C], or None.
        config: tile and warps of a program, and programs on a multiprocessor; the shipped ones for this device when None.

    Returns:
        dx [..., C] in the dtype of x, contiguous, and dbias [C] in the dtype of bias (or None).
    """
    dx = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    config = _config("quick_gelu_backward", x) if config is None else config
    with on_device(x):
        if bias is None and x.is_contiguous() and grad.is_contiguous():
            block = config.block_m * config.block_n
            launch(
                _quick_gelu_flat_kernel, (ceil_div(x.numel(), block),),
                x, grad, dx, x.numel(), BLOCK=block, num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
            return dx, None
        x_rows, grad_rows = as_rows(x), as_rows(grad)
        rows, width = x_rows.shape
        strips = ceil_div(width, config.block_n)
        workers = min(max(1, programs(x.device, config.num_stages) // strips), ceil_div(rows, config.block_m))
        partial = None if bias is None else torch.empty(workers, width, dtype=torch.float32, device=x.device)
        launch(
            _quick_gelu_backward_kernel, (strips * workers,),
            grad_rows, x_rows, None if bias is None else bias.contiguous(), dx, partial,
            grad_rows.stride(0), x_rows.stride(0), rows, width, workers,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    if partial is None or bias is None:
        return dx, None
    return dx, launch_sum_partials(partial, bias.dtype)
