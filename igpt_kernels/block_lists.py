"""Sparse patterns as lists of tiles: what the block-sparse kernels read. Built from a layout without any T x T tensor.

A part of a pattern sees the tokens as a grid with rows of `pitch` tokens. It cuts it into tiles of rows x cols tokens; one
shape for queries and one for keys. Element i of a tile with first token f is token ``f + i // cols * pitch + i % cols``.
A pair of tiles is *full* when every pair of its elements is visible; else it has a mask, a tile of bits. Masks with equal
bits are kept once: a translation-invariant pattern has a handful.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from igpt_kernels.patterns import ANY, Box, Intersection, Part, Pattern, Union, split

FULL = -1
"""Mask number of a pair of tiles that needs no mask."""
_CHUNK = 1 << 22  # pairs evaluated at once: 4 MiB of bools


class Layout(Protocol):
    """What the lists need to know of an `igpt_kernels.layouts.SparseLayout`."""

    @property
    def pattern(self) -> Pattern:
        """The definition."""

    @property
    def tokens(self) -> int:
        """Tokens attended."""

    @property
    def causal(self) -> bool:
        """Whether only keys at or before the query are visible."""

    @property
    def own_tile(self) -> tuple[int, int] | None:
        """Rows and columns of the tiles, where they are not those of the pattern."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """One part of a pattern: for each tile of queries its tiles of keys, and the other way round. int32 on the CPU.

    Attributes:
        pitch: tokens in a row of the grid.
        tokens: tokens in all; the last row of the grid may be short.
        q_tile: rows, cols of a tile of queries.
        k_tile: rows, cols of a tile of keys.
        q_ptr: [query tiles + 1]; the keys of tile t are entries q_ptr[t] to q_ptr[t+1] of the next two.
        q_keys: [entries, 2] row and column of the first token of each key tile; full tiles first, then ascending.
        q_masks: their mask numbers, or FULL.
        k_ptr: [key tiles + 1]; the transpose.
        k_queries: [entries, 2] row and column of the first token of each query tile.
        k_masks: their mask numbers.
        masks: [masks, queries in a tile, words]; bit n % 32 of word n // 32 of row m: query m sees key n. Elements beyond
            the image see nothing and are not seen.
        key_masks: [masks, keys in a tile, words]; the transpose: bit m % 32 of word m // 32 of row n.
        pairs: visible pairs.
        touched_pairs: pairs of tokens in touched tiles.
        longest: most tiles of keys of any tile of queries.
    """

    pitch: int
    tokens: int
    q_tile: tuple[int, int]
    k_tile: tuple[int, int]
    q_ptr: Tensor
    q_keys: Tensor
    q_masks: Tensor
    k_ptr: Tensor
    k_queries: Tensor
    k_masks: Tensor
    masks: Tensor
    key_masks: Tensor
    pairs: int
    touched_pairs: int
    longest: int

    @property
    def blocks(self) -> int:
        """Touched pairs of tiles."""
        return len(self.q_keys)

    @property
    def first_tokens(self) -> np.ndarray:
        """The first token of each entry of q_keys, int64."""
        place = self.q_keys.numpy().astype(np.int64)
        return place[:, 0] * self.pitch + place[:, 1]

    @functools.cached_property
    def q_tiles(self) -> int:
        """Tiles of queries; a number, because the length of a tensor takes a third of a microsecond."""
        return len(self.q_ptr) - 1

    @functools.cached_property
    def k_tiles(self) -> int:
        """Tiles of keys."""
        return len(self.k_ptr) - 1

    def to(self, device: torch.device) -> BlockLists:
        """The same lists on a device."""
        names = ("q_ptr", "q_keys", "q_masks", "k_ptr", "k_queries", "k_masks", "masks", "key_masks")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)

    def bits(self) -> Tensor:
        """The masks as bool [masks, queries, keys]."""
        return torch.from_numpy(_unpack(self.masks.numpy(), self.k_tile[0] * self.k_tile[1]))


def _unpack(words: np.ndarray, length: int) -> np.ndarray:
    """Bools [..., length] of int32 words [..., words]."""
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., :length].astype(bool)


def _pack(bits: np.ndarray) -> np.ndarray:
    """Int32 words of 32 bools along the last axis, the first bool in the lowest bit."""
    if bits.shape[-1] < 32:
        bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, 32 - bits.shape[-1])])
    return np.packbits(bits, axis=-1, bitorder="little").view(np.int32)


def fit_tile(tile: tuple[int, int], elements: int, pitch: int, grid_rows: int) -> tuple[int, int]:
    """A tile of `elements` tokens of about the shape of `tile`: strips stay strips, others stay near to squares.

    No side is longer than the grid needs; what is cut off one side goes to the other.
    """
    rows, cols = tile
    strip = rows == 1 or cols == 1
    while rows * cols < elements:
        rows, cols = (rows, cols * 2) if (rows == 1 if strip else cols <= rows) else (rows * 2, cols)
    while rows * cols > elements:
        rows, cols = (rows, cols // 2) if (rows == 1 if strip else cols > rows) else (rows // 2, cols)
    widest = 1 << (pitch - 1).bit_length()
    tallest = 1 << (grid_rows - 1).bit_length()
    if cols > widest:
        cols = widest
        rows = elements // cols
    if rows > tallest:
        rows = tallest
        cols = elements // rows
    return rows, cols


def _boxes(pattern: Pattern) -> list[Box] | None:
    """All boxes of a pattern, or None if a predicate is among them."""
    if isinstance(pattern, Union | Intersection):
        first, second = _boxes(pattern.first), _boxes(pattern.second)
        return None if first is None or second is None else first + second
    return [pattern] if isinstance(pattern, Box) else None


def _reach(low: np.ndarray, high: np.ndarray, interval: tuple[int, int]) -> np.ndarray:
    """Whether [low, high] and the interval share a point."""
    return (high >= interval[0]) & (low <= interval[1])


@dataclass(frozen=True)
class _Tiles:
    """Tiles of one shape over a grid."""

    pitch: int
    tokens: int
    rows: int
    cols: int

    @property
    def across(self) -> int:
        return -(-self.pitch // self.cols)

    @property
    def down(self) -> int:
        grid_rows = -(-self.tokens // self.pitch)
        return -(-grid_rows // self.rows)

    @property
    def count(self) -> int:
        return self.down * self.across

    def elements(self, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, rows·cols] of the tiles, and which of them exist."""
        i = np.arange(self.rows * self.cols)
        y = (tiles // self.across * self.rows)[:, None] + i // self.cols
        x = (tiles % self.across * self.cols)[:, None] + i % self.cols
        token = y * self.pitch + x
        return token, (x < self.pitch) & (token < self.tokens)

    def first(self, tiles: np.ndarray) -> np.ndarray:
        return np.stack([tiles // self.across * self.rows, tiles % self.across * self.cols], axis=-1)

    def whole(self, tiles: np.ndarray) -> np.ndarray:
        """Whether all elements of the tiles exist."""
        y, x = tiles // self.across * self.rows + self.rows, tiles % self.across * self.cols + self.cols
        return (x <= self.pitch) & ((y - 1) * self.pitch + x <= self.tokens)

    def sizes(self) -> np.ndarray:
        """Elements of each tile that exist."""
        rows = np.minimum(np.arange(self.down) * self.rows + self.rows, -(-self.tokens // self.pitch))
        rows = rows - np.arange(self.down) * self.rows
        cols = np.minimum(np.arange(self.across) * self.cols + self.cols, self.pitch) - np.arange(self.across) * self.cols
        sizes = rows[:, None] * cols[None, :]
        short = self.down * self.across and self.tokens % self.pitch
        if short:
            last = np.clip(short - np.arange(self.across) * self.cols, 0, cols)
            sizes[-1] += last - cols
        return sizes.reshape(-1)


def _candidates(part: Part, causal: bool, queries: _Tiles, keys: _Tiles) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of tiles that the part's base can touch, by the intervals of its differences."""
    base = part.base
    rows, cols, columns, lag = ANY, ANY, ANY, ANY
    if isinstance(base, Box):
        rows, cols, columns, lag = base.rows, base.cols, base.keys, base.lag
    if causal:
        lag = (max(lag[0], 0), lag[1])
    qy, ky = (np.arange(t.down) * t.rows for t in (queries, keys))
    qx, kx = (np.arange(t.across) * t.cols for t in (queries, keys))
    dy_low, dy_high = qy[:, None] - ky - (keys.rows - 1), qy[:, None] + (queries.rows - 1) - ky
    near_y = _reach(dy_low, dy_high, rows)
    if causal:
        near_y &= dy_high >= 0
    near_x = _reach(kx - qx[:, None] - (queries.cols - 1), kx + (keys.cols - 1) - qx[:, None], cols)
    near_x &= _reach(kx, kx + keys.cols - 1, columns)
    y, x = np.nonzero(near_y), np.nonzero(near_x)
    pitch = queries.pitch
    # The x differences of a pair of tiles, from the smallest lag to the largest.
    lag_low = (dy_low[y] * pitch)[:, None] + (qx[x[0]] - kx[x[1]] - (keys.cols - 1))
    lag_high = (dy_high[y] * pitch)[:, None] + (qx[x[0]] + (queries.cols - 1) - kx[x[1]])
    i, j = np.nonzero(_reach(lag_low, lag_high, lag))
    return y[0][i] * queries.across + x[0][j], y[1][i] * keys.across + x[1][j]


def _evaluate(layout: Layout, part: Part, queries: _Tiles, keys: _Tiles, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The bits of pairs of tiles, bool [n, BLOCK_M, BLOCK_N]."""
    q_token, q_exists = queries.elements(q)
    k_token, k_exists = keys.elements(k)
    rows, cols = torch.from_numpy(q_token)[:, :, None], torch.from_numpy(k_token)[:, None, :]
    if isinstance(part.base, Box) and not part.require and not part.exclude:
        visible = part.permits(rows, cols)
    else:
        # A function of the user's gets positions that exist only.
        visible = part.permits(rows.clamp(max=layout.tokens - 1), cols.clamp(max=layout.tokens - 1))
    bits = visible.numpy() & q_exists[:, :, None] & k_exists[:, None, :]
    if layout.causal:
        bits &= k_token[:, None, :] <= q_token[:, :, None]
    return bits


def _classes(part: Part, queries: _Tiles, keys: _Tiles, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of tiles with the same bits for sure: a representative of each class, and the class of each pair."""
    boxes = [_boxes(pattern) for pattern in (part.base, *part.require, *part.exclude)]
    pitches = {box.pitch for found in boxes if found is not None for box in found}
    if any(found is None for found in boxes) or pitches != {queries.pitch}:
        return np.arange(len(q)), np.arange(len(q))
    # Boxes look at differences of rows and columns, and some at the key's column; beyond that only an edge matters.
    flat = [box for found in boxes if found is not None for box in found]
    dy = q // queries.across * queries.rows - k // keys.across * keys.rows
    dx = k % keys.across * keys.cols - q % queries.across * queries.cols
    if all(box.cols == ANY and box.lag == ANY for box in flat):
        # Then columns order the pairs of equal rows only.
        dx = np.where((dy > -queries.rows) & (dy < keys.rows), dx, 0)
    numbers = [dy, dx] + ([k % keys.across] if any(box.keys != ANY for box in flat) else [])
    numbers += [np.where(tiles.whole(index), 0, index + 1) for tiles, index in ((queries, q), (keys, k))]
    code = np.zeros(len(q), dtype=np.int64)
    for number in numbers:
        number = number - number.min(initial=0)
        code = code * (int(number.max(initial=0)) + 1) + number
    if code.max(initial=0) > 8 * len(q):
        code = np.unique(code, return_inverse=True)[1]
    # np.unique would sort, which is half of the time for a million pairs; codes are small numbers.
    seen = np.full(int(code.max(initial=-1)) + 1, -1)
    seen[code] = np.arange(len(code))
    representative = seen[seen >= 0]
    seen[code[representative]] = np.arange(len(representative))
    return representative, seen[code]


def _order(major: np.ndarray, full: np.ndarray, minor: np.ndarray, majors: int, minors: int) -> tuple[np.ndarray, Tensor]:
    """The order by (major, full first, minor), and where each major's entries begin."""
    order = np.argsort((major * 2 + ~full) * minors + minor, kind="stable")
    pointer = np.zeros(majors + 1, dtype=np.int32)
    np.cumsum(np.bincount(major, minlength=majors), out=pointer[1:])
    return order, torch.from_numpy(pointer)


def _build(layout: Layout, part: Part, block_m: int, block_n: int) -> BlockLists:
    pitch = part.base.pitch
    grid_rows = -(-layout.tokens // pitch)
    tile = layout.own_tile or part.base.tile
    q_tile, k_tile = (fit_tile(tile, block, pitch, grid_rows) for block in (block_m, block_n))
    queries, keys = _Tiles(pitch, layout.tokens, *q_tile), _Tiles(pitch, layout.tokens, *k_tile)
    q, k = _candidates(part, layout.causal, queries, keys)
    representative, inverse = _classes(part, queries, keys, q, k)

    words = max(1, block_n // 32)
    packed = np.zeros((len(representative), block_m, words), dtype=np.int32)
    count = np.zeros(len(representative), dtype=np.int64)
    step = max(1, _CHUNK // (block_m * block_n))
    for start in range(0, len(representative), step):
        chosen = representative[start : start + step]
        bits = _evaluate(layout, part, queries, keys, q[chosen], k[chosen])
        count[start : start + step] = bits.sum((1, 2))
        packed[start : start + step] = _pack(bits)
    full = count == block_m * block_n
    partial = (count > 0) & ~full
    rows = packed[partial].reshape(-1, block_m * words).view(np.dtype((np.void, block_m * words * 4))).reshape(-1)
    unique, number = np.unique(rows, return_inverse=True)
    masks = unique.view(np.int32).reshape(-1, block_m, words)
    mask_of = np.full(len(representative), FULL, dtype=np.int32)
    mask_of[partial] = number

    touched = (count > 0)[inverse]
    q, k, inverse = q[touched], k[touched], inverse[touched]
    mask, is_full = mask_of[inverse], full[inverse]
    by_query, q_ptr = _order(q, is_full, k, queries.count, keys.count)
    by_key, k_ptr = _order(k, is_full, q, keys.count, queries.count)
    q_sizes, k_sizes = queries.sizes(), keys.sizes()

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))

    return BlockLists(
        pitch=pitch,
        tokens=layout.tokens,
        q_tile=q_tile,
        k_tile=k_tile,
        q_ptr=q_ptr,
        q_keys=tensor(keys.first(k[by_query])),
        q_masks=tensor(mask[by_query]),
        k_ptr=k_ptr,
        k_queries=tensor(queries.first(q[by_key])),
        k_masks=tensor(mask[by_key]),
        masks=tensor(masks),
        key_masks=tensor(_pack(np.ascontiguousarray(_unpack(masks, block_n).swapaxes(1, 2)))),
        pairs=int(count[inverse].sum()),
        touched_pairs=int((q_sizes[q] * k_sizes[k]).sum()),
        longest=int(np.bincount(q, minlength=1).max()),
    )


def build(layout: Layout, block_m: int, block_n: int) -> tuple[BlockLists, ...]:
    """The lists of a layout, one for each disjoint part; see `igpt_kernels.layouts.SparseLayout.block_lists`.

    Raises:
        ValueError: a block that is no power of two from 16 to 128.
    """
    for name, value in (("block_m", block_m), ("block_n", block_n)):
        if not isinstance(value, int) or value not in (16, 32, 64, 128):
            raise ValueError(f"{name} must be 16, 32, 64 or 128, got {value!r}")
    return tuple(_build(layout, part, block_m, block_n) for part in split(layout.pattern))


def keys_of(parts: tuple[BlockLists, ...], query: int) -> Tensor:
    """The keys that one query sees, int64, ascending: one row of tiles of each part."""
    found = []
    for lists in parts:
        rows, cols = lists.q_tile
        y, x = divmod(query, lists.pitch)
        tile = y // rows * -(-lists.pitch // cols) + x // cols
        element = y % rows * cols + x % cols
        entries = slice(int(lists.q_ptr[tile]), int(lists.q_ptr[tile + 1]))
        i = np.arange(lists.k_tile[0] * lists.k_tile[1])
        inner = i // lists.k_tile[1] * lists.pitch + i % lists.k_tile[1]
        words = lists.masks[:, element].numpy()[lists.q_masks[entries].numpy()] if len(lists.masks) else None
        visible = np.ones((entries.stop - entries.start, len(i)), dtype=bool)
        if words is not None:
            visible = _unpack(np.ascontiguousarray(words), len(i)) | (lists.q_masks[entries].numpy() == FULL)[:, None]
        tokens = lists.first_tokens[entries][:, None] + inner
        found.append(tokens[visible])
    return torch.from_numpy(np.sort(np.concatenate(found)))
