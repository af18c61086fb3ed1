"""Exact nearest palette colours in PyTorch operations: the table of all 2²⁴ colours, and the lookup in it.

The table is built as csrc/palette.cpp builds it: the colour cube is halved into cells of 4³ colours; each cell keeps the
palette colours that can be nearest to some colour in it; only those are evaluated. Here all cells of a level are
worked at once, as a flat list of (cell, candidate) pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_SIDE, _LEAF_SIDE = 64, 4
# Bounds on the elements of one step: they keep the memory under 200 MB for any palette, and a CPU within its caches.
_MAX_PAIRS = 1 << 20
_MAX_DISTANCES = 1 << 19
_MAX_PIXELS = 1 << 20


@dataclass
class _Cells:
    side: int
    origin: Tensor  # int64 [n, 3]: the least red, green and blue of each cell
    cell: Tensor  # int64 [P], ascending: the cell of each pair
    candidate: Tensor  # int64 [P]: its palette colour


def build_table(colors: Tensor) -> Tensor:
    """The index of the palette colour nearest to each colour, by the rule of `reference.palette_lookup_reference`.

    Args:
        colors: float64 [V, 3], 1 <= V <= 65536, finite, on any device with float64.

    Returns:
        uint16 [2²⁴] on the device of `colors`; the colour (r, g, b) is at r·2¹⁶ + g·2⁸ + b. Costs about 0.4 s
        of one core for 512 colours, and 200 MB beside the table for any.
    """
    # PyTorch has no index_put for uint16: the table is filled as int16, and read as uint16 in the end.
    table = torch.empty(1 << 24, dtype=torch.int16, device=colors.device)
    todo = [_all_cells(colors)]
    while todo:
        cells = todo.pop()
        if 8 * cells.cell.numel() > _MAX_PAIRS and cells.origin.shape[0] > 1:
            todo += _cut_in_two(cells)
            continue
        cells = _keep_near(cells, colors)
        if cells.side > _LEAF_SIDE:
            todo.append(_octants(cells))
        else:
            _fill_leaves(cells, colors, table)
    return table.view(torch.uint16)


def lookup(table: Tensor, pixels: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    """table[r·2¹⁶ + g·2⁸ + b] of every pixel, as `dtype` (which must hold the indices).

    Args:
        table: uint16 [2²⁴], on the device of `pixels`.
        pixels: uint8 with size 3 in `channel_dim`, any strides.
        dtype: uint8, int16, uint16, int32 or int64.

    Returns:
        The shape of `pixels` without `channel_dim`.
    """
    planes = pixels.movedim(channel_dim, 0)
    shape = planes.shape[1:]
    red, green, blue = planes.reshape(3, -1)
    entries = table.view(torch.int16)  # index_select knows no uint16
    tokens = torch.empty(red.numel(), dtype=dtype, device=pixels.device)
    for begin in range(0, red.numel(), _MAX_PIXELS):
        part = slice(begin, begin + _MAX_PIXELS)
        index = red[part].to(torch.int32) << 16
        index |= green[part].to(torch.int32) << 8
        index |= blue[part]
        found = entries.index_select(0, index)
        if dtype in (torch.int32, torch.int64):
            tokens[part] = found.to(dtype) & 0xFFFF
        else:
            tokens[part] = found.view(torch.uint16).to(dtype)
    return tokens.reshape(shape)


def _all_cells(colors: Tensor) -> _Cells:
    """The whole cube; the candidates of every cell are the distinct colours, each by its lowest index."""
    device = colors.device
    _, group = torch.unique(colors, dim=0, return_inverse=True)
    place = torch.arange(colors.shape[0], device=device)
    lowest = torch.full_like(place, colors.shape[0]).scatter_reduce_(0, group, place, "amin")
    candidates = lowest[lowest < colors.shape[0]]
    steps = torch.arange(0, 256, _FIRST_SIDE, device=device)
    origin = torch.cartesian_prod(steps, steps, steps)
    n = origin.shape[0]
    cell = torch.arange(n, device=device).repeat_interleave(candidates.numel())
    return _Cells(_FIRST_SIDE, origin, cell, candidates.repeat(n))


def _cut_in_two(cells: _Cells) -> list[_Cells]:
    middle = cells.origin.shape[0] // 2
    at = int(torch.searchsorted(cells.cell, middle))
    return [
        _Cells(cells.side, cells.origin[:middle], cells.cell[:at], cells.candidate[:at]),
        _Cells(cells.side, cells.origin[middle:], cells.cell[at:] - middle, cells.candidate[at:]),
    ]


def _octants(cells: _Cells) -> _Cells:
    """Each cell in eight, each of them with all candidates of the whole."""
    half = cells.side // 2
    n = cells.origin.shape[0]
    steps = torch.tensor([0, half], device=cells.origin.device)
    corners = torch.cartesian_prod(steps, steps, steps)
    octant = torch.arange(8, device=cells.cell.device)
    return _Cells(
        half,
        (corners[:, None] + cells.origin).flatten(0, 1),
        (octant[:, None] * n + cells.cell).flatten(),
        cells.candidate.repeat(8),
    )


def _keep_near(cells: _Cells, colors: Tensor) -> _Cells:
    """Drop candidates that another one beats strictly everywhere in the cell; the bound is explained in csrc/palette.cpp."""
    half = 0.5 * (cells.side - 1)
    color = colors[cells.candidate]
    distance = (cells.origin.to(torch.float64) + half)[cells.cell].sub_(color).square_().sum(1)
    n, pairs = cells.origin.shape[0], distance.numel()
    least = distance.new_full((n,), torch.inf).scatter_reduce_(0, cells.cell, distance, "amin")[cells.cell]
    pair = torch.arange(pairs, device=distance.device).masked_fill_(distance != least, pairs)
    nearest = pair.new_full((n,), pairs).scatter_reduce_(0, cells.cell, pair, "amin")
    spread = color.sub_(color[nearest][cells.cell]).abs_().sum(1)
    slack = 1e-13 * (distance + least + 1e6)
    keep = distance - least - 2 * half * spread <= slack
    return _Cells(cells.side, cells.origin, cells.cell[keep], cells.candidate[keep])


def _fill_leaves(cells: _Cells, colors: Tensor, table: Tensor) -> None:
    """Evaluate every colour of the cells against the candidates of its cell, cells of like counts together."""
    device = colors.device
    counts = torch.bincount(cells.cell, minlength=cells.origin.shape[0])
    starts = counts.cumsum(0) - counts
    order = counts.argsort(descending=True)
    most = counts[order].tolist()
    inside = torch.arange(_LEAF_SIDE, device=device)
    place = (inside[:, None, None] << 16) | (inside[:, None] << 8) | inside
    begin = 0
    while begin < len(most):
        slots = torch.arange(most[begin], device=device)[:, None]
        rows = order[begin : begin + max(1, _MAX_DISTANCES // (slots.numel() * place.numel()))]
        begin += rows.numel()
        # A cell with fewer candidates than slots repeats its last one, which changes no minimum.
        candidate = cells.candidate[starts[rows] + torch.minimum(slots, counts[rows] - 1)]  # [slots, rows]
        level = cells.origin[rows][:, :, None] + inside
        red, green, blue = (level - colors[candidate][..., None]).square().unbind(2)  # each [slots, rows, 4]
        distance = (red[..., None] + green[..., None, :])[..., None] + blue[..., None, None, :]
        nearest = distance == _least(distance)
        winner = _least(torch.where(nearest, candidate[..., None, None, None], colors.shape[0]))
        corner = (cells.origin[rows] << torch.tensor([16, 8, 0], device=device)).sum(1)
        table[corner[:, None, None, None] + place] = winner.to(torch.int16)


def _least(values: Tensor) -> Tensor:
    """values.amin(0), which takes three quarters of the whole build on a CPU where this takes a tenth."""
    return functools.reduce(torch.minimum, values.unbind(0))
