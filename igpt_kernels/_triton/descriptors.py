"""Tiles by tensor descriptors: the copy engine (TMA) of compute capability 9.0 moves a box of rows into shared memory.

A tensor [B,H,T,D] is seen as [B,H,Y,X,D], with T = Y·X tokens on a grid of rows of X. A tile of R x C tokens is one box. What
lies beyond an edge reads as zeros. One instruction of one thread replaces the addresses of every value and their masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from igpt_kernels import tuning

ALIGNMENT = 16
"""Bytes that base and strides must be multiples of (CUDA C++ programming guide, "tensor maps")."""
LARGEST_STRIDE = 1 << 40
"""Bytes that a stride must stay below."""
Boxes = tuple[TensorDescriptor, TensorDescriptor | None]
"""Descriptors of both column parts of a head; None where one part is enough."""


def takes_descriptors(x: Tensor, pitch: int) -> bool:
    """Whether x [B,H,T,D] can be read by descriptors on a grid of rows of `pitch` tokens.

    The last stride must be 1. The others must be positive multiples of 16 bytes, and T a multiple of the pitch; a longer box
    would read what follows the tensor. float32 keeps to pointers: no product of tensor cores reads its tiles.
    """
    size = x.element_size()
    strides = [stride * size for length, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if length > 1]
    if size != 2 or x.stride(3) != 1 or x.shape[2] % pitch or x.data_ptr() % ALIGNMENT:
        return False
    return all(stride > 0 and stride % ALIGNMENT == 0 and stride * pitch < LARGEST_STRIDE for stride in strides)


def use_descriptors(config: tuning.Config, tensors: Sequence[Tensor], pitches: Sequence[int]) -> bool:
    """Whether a launch takes the descriptors that its configuration asks for: on compute capability 9.0 and later.

    CPU tensors (interpreter, audit) take them too. Where strides do not allow it the kernel reads by pointers, with the same
    configuration.
    """
    if not config.descriptors or not all(map(takes_descriptors, tensors, pitches)):
        return False
    x = tensors[0]
    return not x.is_cuda or (torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9)


def boxes(x: Tensor, tile: tuple[int, int], pitch: int, parts: tuple[int, int]) -> Boxes:
    """Descriptors of x [B,H,T,D] for tiles of `tile` rows and columns on a grid of rows of `pitch` tokens.

    Args:
        x: what `takes_descriptors` accepts.
        tile: rows and columns of a tile.
        pitch: tokens in a row of the grid.
        parts: widths of the two column parts of a head, as `split_head_dim` gives them.

    Returns:
        a descriptor with boxes [1,1,rows,cols,width] for each part; columns beyond D read as zeros.
    """
    batch, heads, tokens, head_dim = x.shape
    along = x.stride(2) if tokens > 1 else head_dim + -head_dim % (ALIGNMENT // x.element_size())
    # The stride of a dimension of length 1 is any number in PyTorch; a descriptor wants a multiple of 16 bytes.
    outer = [stride if length > 1 else along for length, stride in ((batch, x.stride(0)), (heads, x.stride(1)))]
    shape = [batch, heads, tokens // pitch, pitch, head_dim]
    strides = [*outer, along * pitch, along, 1]
    first, second = (TensorDescriptor(x, shape, strides, [1, 1, *tile, width]) if width else None for width in parts)
    assert first is not None
    return first, second


def read_by(
    boxed: bool,
    tensors: Sequence[Tensor],
    tiles: Sequence[tuple[int, int]],
    pitches: Sequence[int],
    parts: tuple[int, int],
) -> list[Tensor | TensorDescriptor | None]:
    """What a kernel reads its tensors by: first parts of all, then second parts; the tensors and None where not `boxed`.

    Args:
        boxed: whether `use_descriptors` allows descriptors.
        tensors: each [B,H,T,D].
        tiles: rows and columns of a tile of each.
        pitches: tokens in a row of the grid of each.
        parts: widths of the two column parts of a head.
    """
    if not boxed:
        return [*tensors, *(None for _ in tensors)]
    made = [boxes(x, tile, pitch, parts) for x, tile, pitch in zip(tensors, tiles, pitches, strict=True)]
    return [*(first for first, _ in made), *(second for _, second in made)]


def takes_own_box(head_dim: int) -> bool:
    """Whether sparse kernels read a program's own tile of queries by descriptors too.

    Such a tile becomes an operand in registers. At head dim 64 ptxas 12.8 lets the loop overwrite those registers: wrong
    results on an H100, at tiles of 64 keys. A tile read by pointers is an operand in shared memory.
    """
    return head_dim > 64


def takes_row_boxes(tile: tuple[int, int], pitch: int) -> bool:
    """Whether one float32 of each token can be read by descriptors: rows of a box and of the grid are multiples of 16 bytes."""
    return tile[1] * 4 % ALIGNMENT == 0 and pitch * 4 % ALIGNMENT == 0


def rows_as_boxes(x: Tensor, tile: tuple[int, int], pitch: int) -> TensorDescriptor:
    """A descriptor of x [B,H,T] float32, contiguous, with boxes [1,1,rows,cols]; see `boxes`."""
    batch, heads, tokens = x.shape
    shape = [batch, heads, tokens // pitch, pitch]
    return TensorDescriptor(x, shape, [heads * tokens, tokens, pitch, 1], [1, 1, *tile])
