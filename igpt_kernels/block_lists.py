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

from igpt_kernels.patterns import ANY, UNBOUNDED, Box, Intersection, Part, Pattern, Predicate, Union, split

FULL = -1
"""Mask number of a pair of tiles that needs no mask."""
MOST_PAIRS = 1 << 25
"""Pairs of tiles that lists may have to look at; building takes some 120 bytes for each."""

_FEW = 16  # classes of pairs of tiles for which it costs less to look at their bits than to find those that are alike
_CHUNK = 1 << 18  # pairs evaluated at once: their differences, 1 MiB each, stay in a cache


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
    """Tiles of one shape over a grid, numbered row by row."""

    pitch: int
    tokens: int
    rows: int
    cols: int

    @functools.cached_property
    def grid_rows(self) -> int:
        return -(-self.tokens // self.pitch)

    @functools.cached_property
    def across(self) -> int:
        return -(-self.pitch // self.cols)

    @functools.cached_property
    def down(self) -> int:
        return -(-self.grid_rows // self.rows)

    @property
    def count(self) -> int:
        return self.down * self.across

    def first(self, tiles: np.ndarray) -> np.ndarray:
        """Row and column of the first token of each of the tiles, int32 [n, 2]."""
        table = np.empty((self.down, self.across, 2), dtype=np.int32)
        table[:, :, 0] = (np.arange(self.down) * self.rows)[:, None]
        table[:, :, 1] = np.arange(self.across) * self.cols
        # Both numbers as one of 64 bits: NumPy takes single numbers from a table five times as fast as rows of two.
        return table.view(np.int64).reshape(-1)[tiles].view(np.int32).reshape(-1, 2)

    @functools.cached_property
    def cut(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What exists of each tile: its elements, and a number that tiles of equal outline share; None where all are whole."""
        if self.pitch % self.cols == 0 and self.tokens % self.pitch == 0 and self.grid_rows % self.rows == 0:
            return None
        rows = np.minimum(self.grid_rows - np.arange(self.down) * self.rows, self.rows)
        cols = np.minimum(self.pitch - np.arange(self.across) * self.cols, self.cols)
        sizes = rows[:, None] * cols
        last = np.broadcast_to(cols, sizes.shape)  # elements of a tile's last row
        if self.tokens % self.pitch:
            last = last.copy()
            last[-1] = np.clip(self.tokens % self.pitch - np.arange(self.across) * self.cols, 0, cols)
            sizes[-1] += last[-1] - cols
        outline = (rows[:, None] * (self.cols + 1) + cols) * (self.cols + 1) + last
        return sizes.reshape(-1), np.unique(outline.reshape(-1), return_inverse=True)[1].reshape(-1)

    def sizes(self, tiles: np.ndarray) -> np.ndarray:
        """How many elements of each of the tiles exist."""
        return np.full(len(tiles), self.rows * self.cols) if self.cut is None else self.cut[0][tiles]

    def elements(self, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [n, rows·cols] of the tiles, and which of them exist; None where all do."""
        i = np.arange(self.rows * self.cols)
        y = (tiles // self.across * self.rows)[:, None] + i // self.cols
        x = (tiles % self.across * self.cols)[:, None] + i % self.cols
        token = y * self.pitch + x
        return token, None if self.cut is None else (x < self.pitch) & (token < self.tokens)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a tile of queries and one of keys: number n has rows of tiles ``y[:, i[n]]`` and columns ``x[:, j[n]]``."""

    y: np.ndarray
    x: np.ndarray
    i: np.ndarray
    j: np.ndarray

    def of(self, queries: _Tiles, keys: _Tiles) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the tiles of queries, and of keys."""
        (qy, ky), (qx, kx) = self.y, self.x
        return (qy * queries.across)[self.i] + qx[self.j], (ky * keys.across)[self.i] + kx[self.j]


def _candidates(part: Part, causal: bool, queries: _Tiles, keys: _Tiles) -> _Pairs:
    """Pairs of tiles that the part's base can touch, by the intervals of its differences."""
    base = part.base
    rows, cols, columns, lag = ANY, ANY, ANY, ANY
    if isinstance(base, Box):
        rows, cols, columns, lag = base.rows, base.cols, base.keys, base.lag
    if causal:
        lag = (max(lag[0], 0), lag[1])
    # Rows of tiles beside each other, and columns: two matrices of 8 bytes that are small where the grid
    # is about a square.
    _check_count(base, queries.tokens, max(queries.down * keys.down, queries.across * keys.across) // 8)
    qy, ky = (np.arange(t.down) * t.rows for t in (queries, keys))
    qx, kx = (np.arange(t.across) * t.cols for t in (queries, keys))
    dy = qy[:, None] - ky
    near_y = _reach(dy - (keys.rows - 1), dy + (queries.rows - 1), rows)
    if causal:
        near_y &= dy + (queries.rows - 1) >= 0
    dx = kx - qx[:, None]
    near_x = _reach(dx - (queries.cols - 1), dx + (keys.cols - 1), cols) & _reach(kx, kx + keys.cols - 1, columns)
    _check_count(base, queries.tokens, int(near_y.sum()) * int(near_x.sum()))
    y, x = np.array(np.nonzero(near_y)), np.array(np.nonzero(near_x))
    # Lags of two tiles: that of their first tokens, and how far its tokens are from those.
    lags = (dy[near_y] * queries.pitch)[:, None] - dx[near_x]
    near = lags >= lag[0] - ((queries.rows - 1) * queries.pitch + queries.cols - 1)
    if lag[1] < UNBOUNDED:
        near &= lags <= lag[1] + (keys.rows - 1) * keys.pitch + keys.cols - 1
    return _Pairs(y, x, *np.nonzero(near))


def _check_count(base: Box | Predicate, tokens: int, count: int) -> None:
    if count > MOST_PAIRS:
        raise ValueError(
            f"layout of {tokens:,} tokens: for {base.spec[:60]} about {count:,} pairs of tiles must be looked at, "
            f"lists take {MOST_PAIRS:,}; a smaller image or pattern is needed"
        )


def _evaluate(layout: Layout, part: Part, queries: _Tiles, keys: _Tiles, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The bits of pairs of tiles, bool [n, BLOCK_M, BLOCK_N]."""
    q_token, q_exists = queries.elements(q)
    k_token, k_exists = keys.elements(k)
    rows, cols = q_token[:, :, None], k_token[:, None, :]
    if all(_boxes(pattern) is not None for pattern in (part.base, *part.require, *part.exclude)):
        if layout.tokens < 1 << 31:  # what does not exist may overflow: it is masked
            rows, cols = rows.astype(np.int32), cols.astype(np.int32)
        bits = part.permits(rows, cols)
    else:
        # A function of the user's gets tensors, and positions that exist only.
        real = (torch.from_numpy(x).clamp(max=layout.tokens - 1) for x in (rows, cols))
        bits = part.permits(*real).numpy()
    if layout.causal:
        bits = bits & (cols <= rows)
    for exists, axis in ((q_exists, 2), (k_exists, 1)):
        if exists is not None:
            bits = bits & np.expand_dims(exists, axis)
    return bits


def _places(first: np.ndarray, low: int, high: int, intervals: set[tuple[int, int]]) -> np.ndarray:
    """Numbers of ranges ``first + low .. first + high``: equal where no interval cuts a range and they lie alike to all."""
    place, cut = np.zeros_like(first), np.zeros(len(first), dtype=bool)
    for interval in intervals - {ANY}:
        inside = (first + low >= interval[0]) & (first + high <= interval[1])
        touched = _reach(first + low, first + high, interval)
        place = 2 * place + inside
        cut |= touched & ~inside
    return np.where(cut, first - first.min(initial=0) + (1 << len(intervals)), place)


def _classes(
    part: Part, causal: bool, queries: _Tiles, keys: _Tiles, pairs: _Pairs, q: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of tiles with the same bits for sure: a representative of each class, and the class of each pair."""
    boxes = [_boxes(pattern) for pattern in (part.base, *part.require, *part.exclude)]
    flat = [box for found in boxes if found is not None for box in found]
    if not len(q) or None in boxes or any(box.pitch != queries.pitch for box in flat):
        return np.arange(len(q)), np.arange(len(q))
    # Boxes look at differences of rows and of columns, at the key's column, and at lags. Order in time is that of rows, where
    # these differ. Beyond that the outlines of tiles matter.
    (qy, ky), (qx, kx) = pairs.y, pairs.x
    dy, dx = qy * queries.rows - ky * keys.rows, kx * keys.cols - qx * queries.cols
    width = int(np.ptp(dx)) + 1
    across = far = dx - dx.min()
    near = None
    if (np.ptp(dy) // queries.rows + 1) * (width // queries.cols + 1) > _FEW and all(box.lag == ANY for box in flat):
        up, down = keys.rows - 1, queries.rows - 1
        near = (dy >= -down) & (dy <= up) & causal
        dy = _places(dy, -up, down, {box.rows for box in flat} | ({(0, UNBOUNDED), (1, UNBOUNDED)} if causal else set()))
        far = _places(dx, 1 - queries.cols, keys.cols - 1, {box.cols for box in flat})
        width = max(width, int(far.max()) + 1)
    if any(box.keys != ANY for box in flat):
        column = _places(kx * keys.cols, 0, keys.cols - 1, {box.keys for box in flat})
        across, far = across + column * width, far + column * width
        width *= int(column.max()) + 1
    code = ((dy - dy.min()) * width)[pairs.i]
    code += across[pairs.j] if near is None else np.where(near[pairs.i], across[pairs.j], far[pairs.j])
    for tiles, place in ((queries, q), (keys, k)):
        if tiles.cut is not None:
            outline = tiles.cut[1]
            code = code * (int(outline.max()) + 1) + outline[place]
    if code.max() > 8 * len(code):
        code = np.unique(code, return_inverse=True)[1]
    # np.unique would sort, which is half of the time for a million pairs; codes are small numbers.
    seen = np.full(int(code.max()) + 1, -1)
    seen[code] = np.arange(len(code))
    representative = seen[seen >= 0]
    seen[code[representative]] = np.arange(len(representative))
    return representative, seen[code]


def _order(major: np.ndarray, full: np.ndarray, minor: np.ndarray, majors: int, minors: int) -> tuple[np.ndarray, np.ndarray]:
    """The order by (major, full first, minor), all different, and where each major's entries begin."""
    pointer = np.zeros(majors + 1, dtype=np.int32)
    np.cumsum(np.bincount(major, minlength=majors), out=pointer[1:])
    # The keys come in long runs that ascend, which the merge sort behind "stable" finds.
    return np.argsort((major * 2 + ~full) * minors + minor, kind="stable"), pointer


def _build(layout: Layout, part: Part, block_m: int, block_n: int) -> BlockLists:
    pitch = part.base.pitch
    grid_rows = -(-layout.tokens // pitch)
    tile = layout.own_tile or part.base.tile
    q_tile, k_tile = (fit_tile(tile, block, pitch, grid_rows) for block in (block_m, block_n))
    queries = _Tiles(pitch, layout.tokens, *q_tile)
    keys = queries if k_tile == q_tile else _Tiles(pitch, layout.tokens, *k_tile)
    pairs = _candidates(part, layout.causal, queries, keys)
    q, k = pairs.of(queries, keys)
    representative, inverse = _classes(part, layout.causal, queries, keys, pairs, q, k)

    words = max(1, block_n // 32)
    packed = np.zeros((len(representative), block_m, words), dtype=np.int32)
    count = np.zeros(len(representative), dtype=np.int64)
    step = max(1, _CHUNK // (block_m * block_n))
    for start in range(0, len(representative), step):
        chosen = representative[start : start + step]
        bits = _evaluate(layout, part, queries, keys, q[chosen], k[chosen])
        count[start : start + step] = np.count_nonzero(bits, axis=(1, 2))
        packed[start : start + step] = _pack(bits)
    full = count == block_m * block_n
    partial = (count > 0) & ~full
    rows = packed[partial].reshape(-1, block_m * words).view(np.dtype((np.void, block_m * words * 4))).reshape(-1)
    unique, number = np.unique(rows, return_inverse=True)
    masks = unique.view(np.int32).reshape(-1, block_m, words)
    mask_of = np.full(len(representative), FULL, dtype=np.int32)
    mask_of[partial] = number

    if not count.all():
        touched = (count > 0)[inverse]
        q, k, inverse = q[touched], k[touched], inverse[touched]
    mask, is_full = mask_of[inverse], full[inverse]
    by_query, q_ptr = _order(q, is_full, k, queries.count, keys.count)
    by_key, k_ptr = _order(k, is_full, q, keys.count, queries.count)

    return BlockLists(
        pitch=pitch,
        tokens=layout.tokens,
        q_tile=q_tile,
        k_tile=k_tile,
        q_ptr=torch.from_numpy(q_ptr),
        q_keys=torch.from_numpy(keys.first(k[by_query])),
        q_masks=torch.from_numpy(mask[by_query]),
        k_ptr=torch.from_numpy(k_ptr),
        k_queries=torch.from_numpy(queries.first(q[by_key])),
        k_masks=torch.from_numpy(mask[by_key]),
        masks=torch.from_numpy(masks),
        key_masks=torch.from_numpy(_pack(np.ascontiguousarray(_unpack(masks, block_n).swapaxes(1, 2)))),
        pairs=int(np.bincount(inverse, minlength=len(count)) @ count),
        touched_pairs=int(queries.sizes(q) @ keys.sizes(k)),
        longest=int(np.diff(q_ptr).max()),
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
        place = lists.q_keys[entries].numpy().astype(np.int64)
        tokens = (place[:, 0] * lists.pitch + place[:, 1])[:, None] + inner
        found.append(tokens[visible])
    return torch.from_numpy(np.sort(np.concatenate(found)))
