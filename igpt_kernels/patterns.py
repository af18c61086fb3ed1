"""Definitions of sparse patterns: boxes, predicates, unions and intersections, and how they are split into disjoint parts.

What a user makes is a `igpt_kernels.layouts.SparseLayout`: one of these patterns on an image of a size. torch is imported late:
configurations are checked by `layouts.parse`, and a command line should not wait for torch.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Interval = tuple[int, int]
UNBOUNDED = 1 << 40
"""Beyond every difference of positions."""

ANY: Interval = (-UNBOUNDED, UNBOUNDED)
Fn = Callable[[Any, Any], Any]


def _within(x: Any, interval: Interval) -> Any:
    """Whether x lies in the interval, ends included; None where every x does."""
    low, high = interval
    if low <= -UNBOUNDED and high >= UNBOUNDED:
        return None
    if low == high:
        return x == low
    if low <= -UNBOUNDED:
        return x <= high
    if high >= UNBOUNDED:
        return x >= low
    return (x >= low) & (x <= high)


@dataclass(frozen=True)
class Box:
    """Pairs whose differences lie in intervals, on a grid that cuts the tokens into rows of `pitch`.

    With query (qy, qx) and key (ky, kx) on that grid, all of these hold, ends included.
    """

    spec: str
    """How it is written: ``local2d:7``."""
    pitch: int
    """Tokens in a row of the grid: the image's width, or the stride."""
    tile: tuple[int, int]
    """Rows and columns of the tiles it is best cut into."""
    rows: Interval = ANY
    """qy - ky: how far above."""
    cols: Interval = ANY
    """kx - qx: how far to the right."""
    keys: Interval = ANY
    """kx: columns that are seen from everywhere."""
    lag: Interval = ANY
    """q - k: how long ago in raster order."""

    @property
    def terms(self) -> int:
        """Patterns that it is made of: one."""
        return 1

    def permits(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may see key k; both broadcast."""
        qy, qx = q // self.pitch, q % self.pitch
        ky, kx = k // self.pitch, k % self.pitch
        lag, result = q - k, None
        for x, interval in ((qy - ky, self.rows), (kx - qx, self.cols), (kx, self.keys), (lag, self.lag)):
            inside = _within(x, interval)
            if inside is not None:
                result = inside if result is None else result & inside
        if result is None:
            return lag >= -UNBOUNDED
        return result if result.shape == lag.shape else result & (lag >= -UNBOUNDED)


@dataclass(frozen=True)
class Predicate:
    """Pairs for which a function says so."""

    spec: str
    pitch: int
    tile: tuple[int, int]
    fn: Fn

    @property
    def terms(self) -> int:
        """Patterns that it is made of: one."""
        return 1

    def permits(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may see key k.

        Raises:
            TypeError, ValueError: the function gave anything but a bool tensor that broadcasts to q and k.
        """
        import torch

        result = self.fn(q, k)
        if not isinstance(result, torch.Tensor) or result.dtype != torch.bool:
            got = f"{result.dtype} tensor" if isinstance(result, torch.Tensor) else type(result).__name__
            raise TypeError(f"fn(q, k) must give a bool tensor, got {got}")
        shape = torch.broadcast_shapes(q.shape, k.shape)
        try:
            return result.to(q.device).expand(shape)
        except RuntimeError:
            raise ValueError(f"fn(q, k) must give a tensor of shape {tuple(shape)}, got {tuple(result.shape)}") from None

    def __reduce__(self) -> tuple[object, ...]:
        return predicate, (self.pitch, self.fn)


_numbers = itertools.count(1)
_names: weakref.WeakKeyDictionary[Fn, str] = weakref.WeakKeyDictionary()


def predicate(pitch: int, fn: Fn) -> Predicate:
    """A predicate whose name is that of its function in this process, for as long as the function is alive."""
    try:
        name = _names.setdefault(fn, f"predicate#{next(_numbers)}")
    except TypeError:  # no weak reference, or no hash: then each predicate has a name of its own
        name = f"predicate#{next(_numbers)}"
    return Predicate(name, pitch, (8, 8), fn)


@dataclass(frozen=True)
class Union:
    """Pairs of either pattern."""

    first: Pattern
    second: Pattern
    name: str = ""
    """How it is written, where it is more than the sum of its sides."""

    @property
    def terms(self) -> int:
        """Patterns that it is made of; one that has a name counts once."""
        return 1 if self.name else self.first.terms + self.second.terms

    @property
    def spec(self) -> str:
        return self.name or f"{self.first.spec}+{self.second.spec}"

    def permits(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may see key k."""
        return self.first.permits(q, k) | self.second.permits(q, k)


@dataclass(frozen=True)
class Intersection:
    """Pairs of both patterns."""

    first: Pattern
    second: Pattern

    @property
    def terms(self) -> int:
        """Patterns that it is made of."""
        return self.first.terms + self.second.terms

    @property
    def spec(self) -> str:
        sides = (self.first, self.second)
        return "&".join(f"({x.spec})" if isinstance(x, Union) and not x.name else x.spec for x in sides)

    def permits(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q may see key k."""
        return self.first.permits(q, k) & self.second.permits(q, k)


Pattern = Box | Predicate | Union | Intersection


@dataclass(frozen=True)
class Part:
    """base AND all of require AND NOT any of exclude. The parts of a pattern are disjoint, and their union is the pattern."""

    base: Box | Predicate
    require: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()

    def permits(self, q: Any, k: Any) -> Any:
        """Whether query q may see key k; both tensors or, where all is boxes, arrays."""
        result = self.base.permits(q, k)
        for pattern in self.require:
            result = result & pattern.permits(q, k)
        for pattern in self.exclude:
            result = result & ~pattern.permits(q, k)
        return result


def _only_predicates(pattern: Pattern) -> bool:
    if isinstance(pattern, Union | Intersection):
        return _only_predicates(pattern.first) and _only_predicates(pattern.second)
    return isinstance(pattern, Predicate)


def split(pattern: Pattern) -> tuple[Part, ...]:
    """Disjoint parts, each based on one box or predicate, which says how it is cut into tiles."""
    if isinstance(pattern, Union):
        rest = (replace(part, exclude=(*part.exclude, pattern.first)) for part in split(pattern.second))
        return (*split(pattern.first), *rest)
    if isinstance(pattern, Intersection):
        base, other = pattern.first, pattern.second
        # A box knows which tiles it can touch; a predicate has to be asked about all of them.
        if _only_predicates(base) and not _only_predicates(other):
            base, other = other, base
        return tuple(replace(part, require=(*part.require, other)) for part in split(base))
    return (Part(pattern),)
