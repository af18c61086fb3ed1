"""What kernels over rows share: tiles of whole rows, the launch of persistent programs, and the sum of what each one found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels._triton.common import ceil_div, on_device
from igpt_kernels._triton.launch import launch

_SUM_ROWS, _SUM_COLS = 128, 32


@triton.jit
def load_rows(base, offsets, row_ok, cols, C, FULL: tl.constexpr):
    """The rows that begin at `offsets` (64-bit, in elements) in float32, 0 beyond C and where not `row_ok`.

    Widened at once: bfloat16 is never reduced, nor computed with (the interpreter's bfloat16 arithmetic is wrong).
    """
    mask = row_ok[:, None]
    if not FULL:
        mask = mask & (cols < C)[None, :]
    return tl.load(base + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, offsets, row_ok, cols, C, value, FULL: tl.constexpr):
    """Store [rows, columns] where `load_rows` would have read, rounded to the dtype of the tensor."""
    mask = row_ok[:, None]
    if not FULL:
        mask = mask & (cols < C)[None, :]
    tl.store(base + offsets[:, None] + cols[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(Partial, Out, parts, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column sums of Partial [parts, C] float32, of COLS columns, in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        ok = (part < parts)[:, None] & (cols < C)[None, :]
        total += tl.load(Partial + (part * C)[:, None] + cols[None, :], mask=ok, other=0.0)
    tl.store(Out + cols, tl.sum(total, 0).to(Out.dtype.element_ty), mask=cols < C)


def launch_sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of ``partial`` [parts, C] float32 over its first dimension, [C] in `dtype`: the same bits in every run."""
    parts, width = partial.shape
    out = torch.empty(width, dtype=dtype, device=partial.device)
    with on_device(partial):
        launch(
            _sum_partials_kernel, (ceil_div(width, _SUM_COLS),),
            partial, out, parts, width, ROWS=_SUM_ROWS, COLS=_SUM_COLS, num_warps=4,
        )  # fmt: skip
    return out


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., C] as [M, C] with adjacent values; copied where its rows do not lie at one distance from each other."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """How many persistent programs to launch: so many on each multiprocessor; 4 in all in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor
