"""Sparse attention patterns over images: which keys a query may see. One definition each; all else is derived from it.

Positions are raster positions of an h x w image: token i is row i // w, column i % w. Patterns are raster-causal unless
``causal=False``: key <= query, so all pixels of earlier rows that a pattern allows are visible, also those to the right.

A pattern is a `Box` (intervals of row and column differences), a `Predicate` (any function); or a union or intersection of
patterns. Strided and fixed patterns follow Child et al. 2019 ("Generating Long Sequences with Sparse Transformers").
"""

from __future__ import annotations

import functools
import numbers
import re
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from igpt_kernels.caches import kept
from igpt_kernels.messages import shown
from igpt_kernels.patterns import UNBOUNDED, Box, Fn, Intersection, Pattern, Predicate, Union, predicate, split

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from igpt_kernels.block_lists import BlockLists

# Layouts by key: those that a variable still holds, and the newest 256 without functions, which may hold much themselves.
# Others are read again from their key.
_alive: weakref.WeakValueDictionary[str, SparseLayout] = weakref.WeakValueDictionary()
_newest: deque[SparseLayout] = deque(maxlen=256)
# A CUDA graph reads the memory of its lists for as long as it is replayed.
_captured: dict[tuple[str, int, int, torch.device], tuple[BlockLists, ...]] = {}


MOST_TOKENS = (1 << 31) - 1
"""Tokens of an image, and the largest number in a pattern: kernels count in 32 bits."""

MOST_TERMS = 32
"""Patterns joined in one layout: each is cut out of all others, so the work grows with the square."""

_LONGEST_TEXT = 4000  # letters of a pattern
_DEEPEST = MOST_TERMS  # parentheses in each other


def _integer(name: str, value: object, low: int, high: int = MOST_TOKENS) -> int:
    """`value` as an int from `low` to `high`; NumPy's integers are welcome, booleans are not."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    elif type(value).__name__ == "SymInt":  # a size while torch traces
        number = value  # type: ignore[assignment]
    else:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if number < low:
        least = f"at least {low}" if low else "0 or more"
        raise ValueError(f"{name} must be {least}, got {shown(number)}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}, got {shown(number)}")
    return number


def _check_causal(causal: object) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")


def _check_image(height: object, width: object) -> tuple[int, int]:
    """Rows and columns as ints, together no more than `MOST_TOKENS`."""
    rows, columns = _integer("height", height, 1), _integer("width", width, 1)
    if rows * columns > MOST_TOKENS:
        raise ValueError(f"height x width must be at most {MOST_TOKENS}, got {rows} x {columns}")
    return rows, columns


def _check_device(device: torch.device | str | None) -> torch.device | None:
    import torch

    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch.device or its name, got {shown(device)}") from error


@dataclass(frozen=True)
class SparseLayout:
    """Which keys each query of an image sees. Immutable, hashable; made by the functions of this module.

    ``a | b`` sees what either sees, ``a & b`` what both see.

    Attributes:
        height: rows of the image.
        width: columns.
        pattern: the definition.
        causal: only keys at or before the query in raster order.
        tokens: tokens attended, the first so many of the image; ``height * width`` unless made by `prefix`.
        key: a string that names it in this process, equal for equal layouts.
    """

    height: int
    width: int
    pattern: Pattern
    causal: bool = True
    tokens: int = -1
    _tile: tuple[int, int] | None = None
    key: str = field(init=False, default="")

    def __post_init__(self) -> None:
        height, width = _check_image(self.height, self.width)
        if not isinstance(self.pattern, (Box, Predicate, Union, Intersection)):
            raise TypeError(f"pattern must be made by a function of igpt_kernels.layouts, got {type(self.pattern).__name__}")
        _check_causal(self.causal)
        tokens = height * width
        if not (isinstance(self.tokens, int) and self.tokens == -1 and not isinstance(self.tokens, bool)):
            tokens = _integer("tokens", self.tokens, 1, height * width)
        for name, value in (("height", height), ("width", width), ("tokens", tokens)):
            object.__setattr__(self, name, value)
        size = f"@{self.height}x{self.width}"
        tile = "" if self._tile is None else f",tile={self._tile[0]}x{self._tile[1]}"
        prefix = "" if self.tokens == self.height * self.width else f"[:{self.tokens}]"
        object.__setattr__(self, "key", f"{self.pattern.spec}{size}{prefix}{'' if self.causal else ',full'}{tile}")
        first = _alive.setdefault(self.key, self)
        if first is not self:  # kept as long as any layout of this key
            object.__setattr__(self, "_first", first)
        if "predicate#" not in self.key:
            _newest.append(self)

    def __reduce__(self) -> tuple[object, ...]:
        # By its fields, so that a copy in another process registers itself there.
        return SparseLayout, (self.height, self.width, self.pattern, self.causal, self.tokens, self._tile)

    def __str__(self) -> str:
        return self.key

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the tiles that the pattern is cut into (its first part, if it has several)."""
        return self._tile or split(self.pattern)[0].base.tile

    @property
    def own_tile(self) -> tuple[int, int] | None:
        """What `with_tile` set, or None."""
        return self._tile

    @property
    def is_dense(self) -> bool:
        """Whether the definition hides nothing but the future."""
        return isinstance(self.pattern, Box) and self.pattern.spec == "dense"

    def permits(self, q: Tensor | int, k: Tensor | int) -> Tensor:
        """Whether the query at raster position q may see the key at k; integers or integer tensors that broadcast.

        Raises:
            TypeError: not integers.
            ValueError: a position outside of the image.
        """
        import torch

        first, second = self._position("q", q), self._position("k", k)
        try:
            torch.broadcast_shapes(first.shape, second.shape)
        except RuntimeError:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise ValueError(f"q and k must have shapes that broadcast, got {shapes}") from None
        return self._permits(first, second)

    def _position(self, name: str, x: Tensor | int) -> Tensor:
        """An argument of `permits` as an int64 tensor."""
        import torch

        if not isinstance(x, torch.Tensor):
            if isinstance(x, bool) or not isinstance(x, numbers.Integral):
                raise TypeError(f"{name} must be an int or an integer tensor, got {type(x).__name__}")
            if not 0 <= x < self.tokens:
                raise ValueError(f"{name} must lie from 0 to {self.tokens - 1}, got {shown(int(x))} to {shown(int(x))}")
            return torch.tensor(int(x))
        if x.dtype not in (torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int or an integer tensor, got {x.dtype}")
        if x.layout != torch.strided or x.is_nested or x.is_meta:
            kind = "nested" if x.is_nested else "meta" if x.is_meta else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{name} must be an int or an integer tensor with values in memory, got a {kind} one")
        x = x.long()
        if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < self.tokens):
            raise ValueError(f"{name} must lie from 0 to {self.tokens - 1}, got {int(x.min())} to {int(x.max())}")
        return x

    def _permits(self, q: Tensor, k: Tensor) -> Tensor:
        result = self.pattern.permits(q, k)
        return result & (k <= q) if self.causal else result.clone()

    def dense_mask(self, device: torch.device | str | None = None) -> Tensor:
        """The whole pattern, bool [T,T], row = query: the truth that the block lists are tested against. Costs T² bytes."""
        return self.mask_rows(0, self.tokens, device)

    def mask_rows(self, start: int, stop: int, device: torch.device | str | None = None) -> Tensor:
        """What the queries from `start` to `stop` see of the first `stop` keys: bool [stop-start, stop].

        Raises:
            TypeError, ValueError: not ``0 <= start <= stop <= tokens``, or no device.
        """
        import torch

        stop = _integer("stop", stop, 0, self.tokens)
        start = _integer("start", start, 0, stop)
        device = _check_device(device)
        position = torch.arange(stop, device=device)
        return self._permits(position[start:, None], position[None, :])

    def block_lists(self, block_m: int = 64, block_n: int = 64) -> tuple[BlockLists, ...]:
        """The pattern as lists of tiles, one `BlockLists` for each disjoint part; cached. See `igpt_kernels.block_lists`.

        Args:
            block_m: queries in a tile, a power of two from 16 to 128.
            block_n: keys in a tile.

        Cost: O(touched tiles), except for predicates: all pairs once, in T² time and O(touched tiles) memory.
        """
        return lists_of(self.key, _block("block_m", block_m), _block("block_n", block_n))

    def keys_of(self, query: int) -> Tensor:
        """The keys that one query sees, int64, ascending; reads one row of tiles."""
        return keys_of(self.key, _integer("query", query, 0, self.tokens - 1))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return sum(lists.pairs for lists in self.block_lists())

    @property
    def density(self) -> float:
        """Visible pairs as a share of the causal triangle, ``pairs / (T(T+1)/2)``; 1 is causal dense attention."""
        return self.pairs / (self.tokens * (self.tokens + 1) / 2)

    @property
    def tile_density(self) -> float:
        """Pairs inside touched tiles of 64 x 64 as a share of the causal triangle: what is computed, not what is seen."""
        return sum(lists.touched_pairs for lists in self.block_lists()) / (self.tokens * (self.tokens + 1) / 2)

    def prefix(self, tokens: int) -> SparseLayout:
        """The same pattern over the first `tokens` tokens, as the first half of an image needs it.

        Raises:
            ValueError: not from 1 to the image's tokens.
        """
        tokens = _integer("tokens", tokens, 1, self.height * self.width)
        return self if tokens == self.tokens else replace(self, tokens=tokens)

    def with_tile(self, rows: int, cols: int) -> SparseLayout:
        """The same pattern, cut into tiles of rows x cols tokens, scaled to the blocks of a kernel.

        Raises:
            ValueError: rows or cols no power of two, or rows x cols not from 16 to 128.
        """
        rows, cols = _integer("rows", rows, 1), _integer("cols", cols, 1)
        for name, value in (("rows", rows), ("cols", cols)):
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if not 16 <= rows * cols <= 128:
            raise ValueError(f"rows x cols must be from 16 to 128 tokens, got {rows} x {cols}")
        return replace(self, _tile=(rows, cols))

    def _combine(self, other: object, kind: type[Union] | type[Intersection]) -> SparseLayout:
        if not isinstance(other, SparseLayout):
            raise TypeError(f"other: a layout can be combined with a layout, got {type(other).__name__}")
        for name in ("height", "width", "causal", "tokens"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other must have the same {name}, got {mine} and {theirs}")
        if self.pattern.terms + other.pattern.terms > MOST_TERMS:
            raise ValueError(f"pattern: at most {MOST_TERMS} patterns can be joined")
        return replace(self, pattern=kind(self.pattern, other.pattern))

    def __or__(self, other: SparseLayout) -> SparseLayout:
        return self._combine(other, Union)

    def __and__(self, other: SparseLayout) -> SparseLayout:
        return self._combine(other, Intersection)


def registered(key: str) -> SparseLayout:
    """The layout with this `key`. Registered operators take keys, because their arguments are tensors and plain values.

    A key says how to make its layout again, unless the pattern is a function: then the layout must still be held by a variable.

    Raises:
        KeyError: no such layout, or one made by `from_predicate` that no variable holds any more.
    """
    layout = _alive.get(key)
    return _read_key(key) if layout is None else layout


_KEY = re.compile(r"(?P<spec>.+)@(?P<h>\d+)x(?P<w>\d+)(\[:(?P<n>\d+)\])?(?P<full>,full)?(,tile=(?P<r>\d+)x(?P<c>\d+))?")


def _read_key(key: str) -> SparseLayout:
    found = _KEY.fullmatch(key)
    if found is None or "predicate#" in key:
        why = "its pattern is a function: keep the layout that from_predicate returned" if found else "it is no key of a layout"
        raise KeyError(f"no layout {key!r} is alive, and {why}")
    size = int(found["h"]), int(found["w"])
    try:
        layout = _read(found["spec"], *size, causal=not found["full"])
    except ValueError as error:
        raise KeyError(f"no layout {key!r} is alive, and it cannot be read: {error}") from error
    if found["n"]:
        layout = layout.prefix(int(found["n"]))
    return layout.with_tile(int(found["r"]), int(found["c"])) if found["r"] else layout


def joined(keys: Sequence[str]) -> str:
    """Keys of the layouts of all heads as the one string that an operator takes: one key if all are equal."""
    return keys[0] if len(set(keys)) == 1 else ";".join(keys)


def keys_in(key: str) -> list[str]:
    """What `joined` joined: the different keys, in order of the first head."""
    return list(dict.fromkeys(key.split(";")))


@functools.lru_cache(maxsize=64)
def groups_of(key: str, heads: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The different keys in a layout argument, each with the heads that use it, in order of the first head."""
    keys = key.split(";")
    if len(keys) == 1:
        return ((key, tuple(range(heads))),)
    return tuple((one, tuple(head for head, mine in enumerate(keys) if mine == one)) for one in keys_in(key))


@kept
def lists_of(key: str, block_m: int, block_n: int) -> tuple[BlockLists, ...]:
    """The block lists of a registered layout; see `SparseLayout.block_lists`."""
    from igpt_kernels.block_lists import build

    return build(registered(key), block_m, block_n)


def lists_on(key: str, block_m: int, block_n: int, device: torch.device) -> tuple[BlockLists, ...]:
    """The block lists of a registered layout on a device. Those that a CUDA graph captures are never given up."""
    found = _lists_on(key, block_m, block_n, device)
    if device.type == "cuda" and _is_capturing():
        _captured[key, block_m, block_n, device] = found
    return found


def _is_capturing() -> bool:
    import torch

    return torch.cuda.is_current_stream_capturing()


@kept
def _lists_on(key: str, block_m: int, block_n: int, device: torch.device) -> tuple[BlockLists, ...]:
    return tuple(lists.to(device) for lists in lists_of(key, block_m, block_n))


def _block(name: str, value: object) -> int:
    """Tokens in a tile of a kernel."""
    number = _integer(name, value, 0)
    if number not in (16, 32, 64, 128):
        raise ValueError(f"{name} must be 16, 32, 64 or 128, got {number}")
    return number


def keys_of(key: str, query: int) -> Tensor:
    """The keys that one query of a registered layout sees, int64, ascending."""
    from igpt_kernels import block_lists

    return block_lists.keys_of(lists_of(key, 64, 64), query)


def dense(height: int, width: int, *, causal: bool = True) -> SparseLayout:
    """Every key at or before the query; every key when not causal."""
    height, width = _check_image(height, width)
    return SparseLayout(height, width, Box("dense", height * width, (1, 64)), causal)


def local2d(height: int, width: int, radius: int, *, causal: bool = True) -> SparseLayout:
    """The pixels at most `radius` rows and columns away: ``|qy - ky| <= R and |qx - kx| <= R``.

    Causal: the R rows above on both sides, and R pixels to the left. ``R(2R+1) + R + 1`` keys inside an image.

    Args:
        height: rows of the image.
        width: columns.
        radius: R, in pixels; 0 is the pixel itself.
        causal: False: in all directions, (2R+1)² keys.

    Raises:
        TypeError, ValueError: an argument that is no int, or too small.
    """
    height, width = _check_image(height, width)
    radius = _integer("radius", radius, 0)
    box = Box(f"local2d:{radius}", width, (8, 8), rows=(-radius, radius), cols=(-radius, radius))
    return SparseLayout(height, width, box, causal)


def row(height: int, width: int, *, causal: bool = True) -> SparseLayout:
    """The query's own row: ``ky == qy``; causal: up to the query."""
    height, width = _check_image(height, width)
    return SparseLayout(height, width, Box("row", width, (1, 64), rows=(0, 0)), causal)


def column(height: int, width: int, *, causal: bool = True) -> SparseLayout:
    """The query's own column: ``kx == qx``; causal: from the query upwards."""
    height, width = _check_image(height, width)
    return SparseLayout(height, width, Box("column", width, (64, 1), cols=(0, 0)), causal)


def row_column(height: int, width: int, *, causal: bool = True) -> SparseLayout:
    """The query's own row and column; two layers of it reach every earlier pixel of the rectangle above and left."""
    sides = row(height, width).pattern, column(height, width).pattern
    return SparseLayout(height, width, Union(*sides, name="row_column"), causal)


def _check_stride(stride: int | None, height: int, width: int) -> tuple[int, int]:
    """The stride, and the pitch of its grid: no longer than the image, which then is one row of it."""
    stride = _integer("stride", width if stride is None else stride, 1)
    return stride, min(stride, height * width)


def strided(height: int, width: int, stride: int | None = None, *, causal: bool = True) -> SparseLayout:
    """The strided pattern of the Sparse Transformer, both of its sets in one head: ``q - k <= l`` or ``(q - k) % l == 0``.

    The first set is a window of raster order, so it spans two rows of the image.

    Args:
        height: rows of the image.
        width: columns.
        stride: l; the width when None, which makes the second set the column.
        causal: False: the same in both directions.

    Raises:
        TypeError, ValueError: an argument that is no int, or too small.
    """
    height, width = _check_image(height, width)
    stride, pitch = _check_stride(stride, height, width)
    window = Box(f"window:{stride}", pitch, (1, 64), rows=(-1, 1), lag=(-stride, stride))
    every = Box(f"every:{stride}", pitch, (64, 1), cols=(0, 0))
    return SparseLayout(height, width, Union(window, every, name=f"strided:{stride}"), causal)


def fixed(height: int, width: int, stride: int | None = None, c: int = 8, *, causal: bool = True) -> SparseLayout:
    """The fixed pattern of the Sparse Transformer, both of its sets in one head: ``k // l == q // l`` or ``k % l >= l - c``.

    Args:
        height: rows of the image.
        width: columns.
        stride: l; the width when None, which makes the first set the row.
        c: columns at the end of each stretch of l tokens that all later queries see.
        causal: False: the same in both directions.

    Raises:
        TypeError, ValueError: an argument that is no int or too small, or c > stride.
    """
    height, width = _check_image(height, width)
    stride, pitch = _check_stride(stride, height, width)
    c = _integer("c", c, 1)
    if c > stride:
        raise ValueError(f"c must be at most the stride, {stride}, got {c}")
    block = Box(f"block:{stride}", pitch, (1, 64), rows=(0, 0))
    summary = Box(f"summary:{stride},{c}", pitch, (8, 8), keys=(stride - c, UNBOUNDED))
    return SparseLayout(height, width, Union(block, summary, name=f"fixed:{stride},{c}"), causal)


def from_predicate(height: int, width: int, fn: Fn, *, causal: bool = True) -> SparseLayout:
    """Any pattern: ``fn(q, k)`` says whether the query at raster position q may see the key at k.

    Args:
        height: rows of the image.
        width: columns.
        fn: takes two int64 tensors of raster positions that broadcast against each other, gives a bool tensor. Must be a
            pure function of them. Two layouts are equal when they hold the same function object.
        causal: AND the pattern with ``k <= q``.

    Raises:
        TypeError: fn cannot be called.

    Cost: the block lists ask fn about all T² pairs, once (0.5 s at 64², minutes at 256²).
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of (q, k), got {type(fn).__name__}")
    height, width = _check_image(height, width)
    return SparseLayout(height, width, predicate(width, fn), causal)


_MAKERS: dict[str, tuple[Callable[..., SparseLayout], int, int, str]] = {
    "dense": (dense, 0, 0, "dense"),
    "local2d": (local2d, 1, 1, "local2d:R"),
    "row": (row, 0, 0, "row"),
    "column": (column, 0, 0, "column"),
    "row_column": (row_column, 0, 0, "row_column"),
    "strided": (strided, 0, 1, "strided[:STRIDE]"),
    "fixed": (fixed, 0, 2, "fixed[:STRIDE[,C]]"),
}
"""Name of a pattern -> its maker, fewest and most numbers behind the colon, and the form in words."""

FORMS = ", ".join(form for *_, form in _MAKERS.values()) + "; joined by + (either) or & (both)"


def parse(text: str, height: int, width: int, *, causal: bool = True) -> SparseLayout:
    """A layout from its string form: ``local2d:7``, ``strided:128``, ``fixed:64,8``; ``+`` is union, ``&`` binds tighter.

    Args:
        text: names with numbers behind a colon.
        height: rows of the image.
        width: columns.
        causal: False: also the future.

    Raises:
        TypeError, ValueError: no such pattern, or its numbers are wrong; the message names the forms there are.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: pattern must be a string, got {type(text).__name__}")
    height, width = _check_image(height, width)
    _check_causal(causal)
    return _read(text, height, width, causal=causal)


def _read(text: str, height: int, width: int, *, causal: bool) -> SparseLayout:
    """`parse`, which also reads what keys hold: parentheses around a union inside of an intersection."""
    if len(text) > _LONGEST_TEXT or text.count("+") + text.count("&") >= MOST_TERMS:
        raise ValueError(
            f"text: pattern may join {MOST_TERMS} patterns in {_LONGEST_TEXT} letters, got {len(text)} letters: {shown(text)}"
        )
    return _read_union(
        text, text, _DEEPEST, functools.partial(_read_term, text=text, height=height, width=width, causal=causal)
    )


def _read_union(part: str, text: str, deepest: int, read: Callable[[str], SparseLayout]) -> SparseLayout:
    """A union of intersections of terms."""
    if deepest < 0:
        raise ValueError(f"text: pattern may have {_DEEPEST} parentheses in each other, got {shown(text)}")

    def one(term: str) -> SparseLayout:
        inner = term.startswith("(") and term.endswith(")")
        return _read_union(term[1:-1], text, deepest - 1, read) if inner else read(term)

    unions = (functools.reduce(SparseLayout.__and__, map(one, _split(terms, "&"))) for terms in _split(part, "+"))
    return functools.reduce(SparseLayout.__or__, unions)


def _split(text: str, sign: str) -> list[str]:
    """`text` cut at each `sign` outside of parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == sign and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _read_term(term: str, *, text: str, height: int, width: int, causal: bool) -> SparseLayout:
    found = re.fullmatch(r"\s*([a-z0-9_]+?)\s*(?::\s*([0-9]{1,20}(?:\s*,\s*[0-9]{1,20})*))?\s*", term)
    if found is None or found.group(1) not in _MAKERS:
        raise ValueError(f"text: pattern must be of {FORMS}; got {shown(text)}")
    make, fewest, most, _ = _MAKERS[found.group(1)]
    given = [int(number) for number in found.group(2).split(",")] if found.group(2) else []
    if not fewest <= len(given) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"text: pattern {found.group(1)} takes {wanted} numbers, got {len(given)} in {shown(text)}")
    try:
        return make(height, width, *given, causal=causal)
    except ValueError as error:
        raise ValueError(f"text: pattern {shown(text)}: {error}") from error
