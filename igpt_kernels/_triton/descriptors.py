"""Tiles by tensor descriptors: the copy engine (TMA) of compute capability 9.0 moves a box of rows into shared memory.

A tensor [B,H,T,D] is seen as [B,H,Y,X,D], with T = Y·X tokens on a grid of rows of X. A tile of R x C tokens is one box. What
lies beyond an edge reads as zeros. One instruction of one thread replaces the addresses of every value and their masks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from igpt_kernels import tuning

ALIGNMENT = 16
"""Bytes that base and strides must be multiples of (CUDA C++ programming guide, "tensor maps")."""
LARGEST_STRIDE = 1 << 40
"""Bytes that a stride must stay below."""
Operand: TypeAlias = Tensor | TensorDescriptor | None


class _Memory:
    """What a descriptor asks of its tensor. It keeps no tensor alive, so descriptors can be kept."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self.address


@functools.lru_cache(maxsize=1 << 13)
def _kept(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    return TensorDescriptor(_Memory(address, dtype), list(shape), list(strides), list(block))


def describe(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> TensorDescriptor:
    """A descriptor of the memory of x, seen with `shape` and `strides`, for boxes `block`.

    Those of a GPU are kept: making one takes 5 µs of Python, and training meets the same addresses again in every step. A CPU
    tensor (interpreter, audit) is the base itself.
    """
    if x.is_cuda:
        return _kept(x.data_ptr(), x.dtype, shape, strides, block)
    return TensorDescriptor(x, list(shape), list(strides), list(block))


@functools.cache
def _has_engine(device: torch.device) -> bool:
    """Whether a device copies boxes: compute capability 9.0 and later, and the CPU (interpreter, audit)."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=1 << 12)
def grid_view(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], size: int, pitch: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides of [B,H,T,D] as [B,H,Y,X,D] with rows of `pitch` tokens; None where descriptors cannot read it.

    The last stride must be 1. The others must be positive multiples of 16 bytes, and T a multiple of the pitch; a longer box
    would read what follows the tensor. float32 keeps to pointers: no product of tensor cores reads its tiles.

    Args:
        shape: of the tensor.
        strides: of the tensor, in values.
        size: bytes of a value.
        pitch: tokens in a row of the grid.
    """
    batch, heads, tokens, head_dim = shape
    # The stride of a dimension of length 1 is any number in PyTorch; a descriptor wants a multiple of 16 bytes.
    along = strides[2] if tokens > 1 else head_dim + -head_dim % (ALIGNMENT // size)
    outer = [stride if length > 1 else along for length, stride in ((batch, strides[0]), (heads, strides[1]))]
    if size != 2 or strides[3] != 1 or tokens % pitch:
        return None
    if not all(s > 0 and s * size % ALIGNMENT == 0 and s * pitch * size < LARGEST_STRIDE for s in (*outer, along)):
        return None
    return (batch, heads, tokens // pitch, pitch, head_dim), (*outer, along * pitch, along, 1)


def read_by(
    config: tuning.Config,
    tensors: Sequence[Tensor],
    tiles: Sequence[tuple[int, int] | None],
    pitches: Sequence[int],
    parts: tuple[int, int],
) -> tuple[bool, list[Operand]]:
    """What a kernel reads its tensors by: descriptors, where its configuration asks for them and all with a tile allow it.

    Args:
        config: of the kernel.
        tensors: each [B,H,T,D].
        tiles: rows and columns of a tile of each; None for one that the kernel reads by pointers in any case.
        pitches: tokens in a row of the grid of each.
        parts: widths of the two column parts of a head, as `split_head_dim` gives them.

    Returns:
        whether it reads by descriptors; then for every tensor a descriptor of boxes [1,1,rows,cols,width] of its first part,
        or the tensor; then for every tensor the descriptor of its second part, or None.
    """
    if config.descriptors and _has_engine(tensors[0].device):
        first: list[Operand] = []
        second: list[Operand] = []
        for x, tile, pitch in zip(tensors, tiles, pitches, strict=True):
            if tile is None:
                first.append(x)
                second.append(None)
                continue
            view = grid_view(tuple(x.shape), x.stride(), x.element_size(), pitch)  # type: ignore[arg-type]
            if view is None or x.data_ptr() % ALIGNMENT:
                break
            first.append(describe(x, *view, (1, 1, *tile, parts[0])))
            second.append(describe(x, *view, (1, 1, *tile, parts[1])) if parts[1] else None)
        else:
            return True, first + second
    return False, [*tensors, *(None for _ in tensors)]


def read_rows_by(boxed: bool, tensors: Sequence[Tensor], tile: tuple[int, int], pitch: int) -> tuple[bool, list[Operand]]:
    """What a kernel reads one float32 of each token by: descriptors of boxes [1,1,rows,cols], or pointers.

    Args:
        boxed: whether it reads its tiles by descriptors.
        tensors: each [B,H,T] float32, contiguous.
        tile: rows and columns of a tile. Both rows of a box and of the grid must be multiples of 16 bytes.
        pitch: tokens in a row of the grid.
    """
    if not boxed or tile[1] * 4 % ALIGNMENT or pitch * 4 % ALIGNMENT:
        return False, list(tensors)
    batch, heads, tokens = tensors[0].shape
    shape, strides = (batch, heads, tokens // pitch, pitch), (heads * tokens, tokens, pitch, 1)
    return True, [describe(x, shape, strides, (1, 1, *tile)) for x in tensors]


def takes_own_box(head_dim: int) -> bool:
    """Whether sparse kernels read a program's own tile of queries by descriptors too.

    Such a tile becomes an operand in registers. At head dim 64 ptxas 12.8 lets the loop overwrite those registers: wrong
    results on an H100, at tiles of 64 keys. A tile read by pointers is an operand in shared memory.
    """
    return head_dim > 64
