"""What the attention kernels share: device functions, and how their launchers cut a head, a grid and a device.

Tile letters in the kernels: M rows of queries, N rows of keys. A head of D values is cut into two column parts, DA and DB:
tile sides must be powers of two. D = 96 is 64 + 32, which is 3/4 of the matrix work of 128. DB = 0 where one
part is enough; every ``if DB > 0`` is decided when the kernel is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from igpt_kernels import tuning

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_NOTHING = nullcontext()
_DOT_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def place_tile(pid, tiles, heads, group, HEAVIEST_LAST: tl.constexpr):
    """The (tile, head) of a program: groups of heads that share the L2 cache, and inside a group the longest rows first.

    With causal attention the last tiles of queries see the most keys; started last, they would run alone at the end.
    """
    section = pid // (group * tiles)
    first = section * group
    size = tl.minimum(group, heads - first)
    within = pid - first * tiles
    tile = within // size
    if HEAVIEST_LAST:
        tile = tiles - 1 - tile
    return tile, first + within % size


@triton.jit
def load_part(
    base, row_offset, row_ok, stride_d, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """Columns START to START + WIDTH of the rows at `row_offset`: [rows, WIDTH], 0 beyond D and (if CHECK) where not `row_ok`.

    Offsets are 64-bit: q, k and v pass 2³¹ elements at batch 342 for 64² RGB (8 heads of 64).
    """
    cols = START + tl.arange(0, WIDTH)
    ptrs = base + row_offset[:, None] + (cols.to(tl.int64) * stride_d)[None, :]
    if START + WIDTH > D:
        if CHECK:
            return tl.load(ptrs, mask=row_ok[:, None] & (cols < D)[None, :], other=0.0)
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    if CHECK:
        return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def load_tile(
    base, row_offset, row_ok, stride_d,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, DOT: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Both column parts of the rows at `row_offset`, as operands of dots. Without a second part the first stands in."""
    x0 = load_part(base, row_offset, row_ok, stride_d, D, 0, DA, CHECK).to(DOT)
    if DB > 0:
        x1 = load_part(base, row_offset, row_ok, stride_d, D, DA, DB, CHECK).to(DOT)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def load_box(X0, X1, batch, h, y, x, ROWS: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, DOT: tl.constexpr):
    """Both column parts of the tile whose first token is in row y, column x, by descriptors; see `descriptors.read_by`."""
    b = batch.to(tl.int32)
    head = h.to(tl.int32)
    x0 = X0.load([b, head, y, x, 0]).reshape(ROWS, DA).to(DOT)
    if DB > 0:
        x1 = X1.load([b, head, y, x, DA]).reshape(ROWS, DB).to(DOT)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def load_rows(X, batch, h, y, x, ROWS: tl.constexpr):
    """One number of each row of such a tile, float32, by a descriptor; see `descriptors.read_rows_by`."""
    return X.load([batch.to(tl.int32), h.to(tl.int32), y, x]).reshape(ROWS)


@triton.jit
def zeros(rows: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Accumulators of both column parts, float32."""
    x0 = tl.zeros([rows, DA], tl.float32)
    if DB > 0:
        x1 = tl.zeros([rows, DB], tl.float32)
    else:
        x1 = x0
    return x0, x1


@triton.jit
def store_part(base, row_offset, row_ok, value, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Store [rows, WIDTH] into columns from START of the rows at `row_offset`, whose values lie one after another."""
    cols = START + tl.arange(0, WIDTH)
    ptrs = base + row_offset[:, None] + cols[None, :]
    mask = row_ok[:, None]
    if START + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(ptrs, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(base, row_offset, row_ok, x0, x1, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Store both column parts of the rows at `row_offset`, rounded to the dtype of the tensor."""
    store_part(base, row_offset, row_ok, x0, D, 0, DA)
    if DB > 0:
        store_part(base, row_offset, row_ok, x1, D, DA, DB)


@triton.jit
def scores(a0, a1, b0, b1, DB: tl.constexpr):
    """``a @ bᵀ`` in float32 over both column parts. "ieee": float32 inputs are not rounded to TF32."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if DB > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")
    return s


@triton.jit
def accumulate(p, x0, x1, acc0, acc1, DB: tl.constexpr):
    """``acc + p @ x`` in float32 over both column parts; p is rounded to the dtype of x, as tensor cores want it."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc0, input_precision="ieee")
    if DB > 0:
        acc1 = tl.dot(p, x1, acc1, input_precision="ieee")
    return acc0, acc1


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up. Triton's own `cdiv` can be traced, which takes 20 times as long."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n, for n from 1 on."""
    return 1 << (n - 1).bit_length()


@functools.cache
def split_head_dim(head_dim: int, *, whole: bool = False) -> tuple[int, int]:
    """The two column parts of a head: powers of two of at least 16 that cover it with the least padding.

    96 is (64, 32), 80 is (64, 16); 64 and 112 are one part, (64, 0) and (128, 0). tl.dot takes no less than 16.
    With `whole` there is one part, padded: 96 is (128, 0).
    """
    padded = max(16, power_of_2(head_dim))
    first = padded // 2
    rest = max(16, power_of_2(max(head_dim - first, 1)))
    return (first, rest) if not whole and first >= 16 and first + rest < padded else (padded, 0)


def head_arguments(q: Tensor, config: tuning.Config) -> Mapping[str, Any]:
    """How the heads of q are cut, as a kernel with this configuration takes it."""
    return _head_arguments(q.shape[3], q.dtype, config.whole_head)


@functools.cache
def _head_arguments(head_dim: int, dtype: torch.dtype, whole: bool) -> Mapping[str, Any]:
    part_a, part_b = split_head_dim(head_dim, whole=whole)
    return {"D": head_dim, "DA": part_a, "DB": part_b, "DOT": dot_dtype(dtype)}


@functools.cache
def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype that operands of dots have: the tensor's own, but float32 for bfloat16 in Triton's interpreter.

    The interpreter computes bfloat16 arithmetic on its 16-bit patterns, as integers (triton-lang/triton#11584).
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return _DOT_DTYPES[dtype]


@functools.lru_cache(maxsize=1024)
def heads_in_l2(heads: int, tokens: int, head_dim: int, itemsize: int, cache_bytes: int = 32 << 20) -> int:
    """How many heads run side by side: as many as keep their keys and values in the L2 cache together.

    32 MiB is about half of the L2 of an H100 or H200 (50 and 60 MB); the other half serves queries and outputs. Only the
    order of programs depends on it. AMD's MI300X has 4 MB of L2 a die and 256 MB behind them: nothing is measured there.
    """
    return max(1, min(heads, cache_bytes // max(1, 2 * tokens * head_dim * itemsize)))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current, because Triton launches on the current one; nothing where it is, nor for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _NOTHING
