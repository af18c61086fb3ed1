"""One cache for what is made of layouts: block lists, plans, masks. It is bounded in bytes.

What was used longest ago goes first. A value is made in a thread of its own, because modes of the caller must not enter it:
fake tensors, inference mode, or a default device would be in the cache for everyone after.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
LIMIT = 256 << 20
"""Bytes that the process keeps. A value that alone is larger is kept beside them, until the next such one comes."""

_OBJECT = 512  # bytes of a Python object, about
_making = threading.local()


def bytes_of(value: object) -> int:
    """Bytes of the tensors and arrays in a value, and about as many as its objects take."""
    if hasattr(value, "untyped_storage"):
        return int(value.untyped_storage().nbytes()) + _OBJECT
    if hasattr(value, "nbytes"):
        return int(value.nbytes) + _OBJECT
    if isinstance(value, (tuple, list)):
        return sum(map(bytes_of, value)) + _OBJECT
    if dataclasses.is_dataclass(value):
        return sum(bytes_of(getattr(value, field.name)) for field in dataclasses.fields(value)) + _OBJECT
    return _OBJECT


class Cache:
    """Values by key, at most `limit` bytes of them.

    Attributes:
        limit: bytes.
        held: bytes of the values that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._large: Hashable | None = None
        self._lock = threading.Lock()

        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it at the fork

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Hashable) -> tuple[Any, int] | None:
        """The value of a key, with its size; None where it is not kept. Takes no lock: a launch asks it a few times."""
        try:
            found = self._values[key]
            self._values.move_to_end(key)
        except KeyError:  # of the second line, when another thread has just dropped it
            return None
        return found

    def put(self, key: Hashable, value: object) -> None:
        """Keep a value, and drop what was used longest ago."""
        size = bytes_of(value)
        with self._lock:
            self._drop(key)
            if size > self.limit:
                if self._large is not None:
                    self._drop(self._large)
                self._large = key
            self._values[key] = value, size
            self.held += size
            if self._large != key:
                large = self._values[self._large][1] if self._large is not None else 0
                for old in [old for old in self._values if old not in (key, self._large)]:
                    if self.held - large <= self.limit:
                        break
                    self._drop(old)

    def _drop(self, key: Hashable) -> None:
        self.held -= self._values.pop(key, (None, 0))[1]
        if key == self._large:
            self._large = None

    def forget(self, wanted: Callable[[Any], bool]) -> None:
        """Drop the values whose keys are wanted no more."""
        with self._lock:
            for key in [key for key in self._values if wanted(key)]:
                self._drop(key)


SHARED = Cache(LIMIT)
"""The cache of this process."""


def _apart(make: Callable[[], R]) -> R:
    """What `make` gives in a thread without modes; in such a thread at once."""
    if getattr(_making, "apart", False):
        return make()
    found: list[R] = []
    errors: list[BaseException] = []

    def work() -> None:
        _making.apart = True
        try:
            found.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="igpt-kernels layout", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


class Kept(Generic[P, R]):
    """A function whose results `SHARED` keeps; its arguments are given by place and must be hashable. See `kept`."""

    def __init__(self, function: Callable[P, R], apart: bool) -> None:
        self._function = function
        self._apart = apart
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result for these arguments, made or kept. Two threads may both make one; the later is kept."""
        key = self._function, args
        found = SHARED.find(key)
        if found is None:
            make = functools.partial(self._function, *args, **kwargs)
            value = _apart(make) if self._apart else make()
            SHARED.put(key, value)
            return value
        known: R = found[0]
        return known

    def cache_clear(self) -> None:
        """Forget the results of this function."""
        SHARED.forget(lambda key: key[0] is self._function)


def kept(function: Callable[P, R], *, apart: bool = True) -> Kept[P, R]:
    """Keep the results of a function in the one cache, as `functools.lru_cache` would in one of its own.

    Args:
        function: pure.
        apart: make them in a thread of its own, which takes 0.1 ms. False: in the caller's, for what is quickly made.
    """
    return Kept(function, apart)
