"""Checks of settings and arguments. Imports neither torch nor numpy, so that commands start fast.

A settings class declares what its fields may hold by their annotations: types, `Literal` choices, ``None``, and ranges in
``Annotated``. `check_fields` compares every value with them; `Options` does that for the options of all commands::

    @dataclass(frozen=True)
    class Example(Options):
        steps: Annotated[int, AtLeast(1)] = 100
        rate: Annotated[float, Between(0.0, 1.0, high_open=True)] = 0.5
        mode: Literal["a", "b"] = "a"
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import operator
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

from igpt.errors import ArgumentTypeError, ConfigError
from igpt_kernels.messages import shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Between:
    """A range of numbers, ends included unless they are open; None has no end."""

    low: float | None
    high: float | None
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies inside."""
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return above and below

    def __str__(self) -> str:
        if self.high is None:
            return f"above {self.low}" if self.low_open else f"of at least {self.low}"
        if not self.low_open and not self.high_open:
            return f"from {self.low} to {self.high}"
        low = f"above {self.low}" if self.low_open else f"of at least {self.low}"
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


def AtLeast(low: float) -> Between:
    """``low`` or more."""
    return Between(low, None)


def Above(low: float) -> Between:
    """More than ``low``."""
    return Between(low, None, low_open=True)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Texts of a form.

    Attributes:
        pattern: regular expression that the whole text must match.
        form: the form in words.
    """

    pattern: str
    form: str

    def holds(self, value: str) -> bool:
        """Whether the text has the form."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.form


Limit = Between | Matches
Count = Annotated[int, AtLeast(1)]
Natural = Annotated[int, AtLeast(0)]
MAX_SIDE = 4096
Side = Annotated[int, Between(1, MAX_SIDE)]
"""Pixels along an image."""
Device = Annotated[str, Matches(r"auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:N")]


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """The annotations of a class, resolved."""
    return typing.get_type_hints(cls, include_extras=True)


def _describe(hint: Any, limit: Limit | None = None) -> str:
    """What a value of this annotation is, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [each for each in arguments[1:] if isinstance(each, Limit)]
        return _describe(arguments[0], limits[0] if limits else limit)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        named = [_describe(each, limit) for each in arguments if each is not type(None)]
        return " or ".join([*named, "left out"] if type(None) in arguments else named)
    if origin is tuple:
        return f"a sequence, each {_describe(arguments[0])}"
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", Path: "a path"}
    if isinstance(limit, Matches):
        return str(limit)
    return names[hint] + (f" {limit}" if limit is not None else "")


def _accept(hint: Any, value: Any, limit: Limit | None = None) -> Any:
    """The value as the annotation has it (lists become tuples, strings paths), or `_Wrong`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [each for each in arguments[1:] if isinstance(each, Limit)]
        return _accept(arguments[0], value, limits[0] if limits else limit)
    if origin is typing.Literal:
        return value if any(value is each or (type(value) is type(each) and value == each) for each in arguments) else _Wrong
    if origin in (typing.Union, types.UnionType):
        for each in arguments:
            found = None if each is type(None) and value is None else _Wrong
            found = _accept(each, value, limit) if each is not type(None) else found
            if found is not _Wrong:
                return found
        return _Wrong
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _Wrong
        items = tuple(_accept(arguments[0], each) for each in value)
        return _Wrong if any(each is _Wrong for each in items) else items
    if hint in (bool, int, float):
        value = as_number(value)
    if hint is Path:
        return Path(value) if isinstance(value, (str, Path)) else _Wrong
    if hint is int or hint is float:
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        fits = number and (_fits_64_bits(value) if isinstance(value, int) else math.isfinite(value))
        return value if fits and (limit is None or limit.holds(value)) else _Wrong
    return value if isinstance(value, hint) and (limit is None or limit.holds(value)) else _Wrong


def _fits_64_bits(value: int) -> bool:
    """Whether TOML, which keeps the settings of runs, and torch can hold the integer."""
    return -(2**63) <= value < 2**63


class _Wrong:
    """Stands for a value that an annotation does not allow."""


def check_fields(owner: Any) -> None:
    """Check every field of a frozen dataclass against its annotation; lists become tuples and strings paths where wanted.

    Raises:
        ConfigError: the field, what it must be, and what came.
    """
    known: dict[str, Any] = hints(owner.__class__)
    for name in (field.name for field in dataclasses.fields(owner)):
        hint, value = known[name], getattr(owner, name)
        found = _accept(hint, value)
        if found is _Wrong:
            wide = isinstance(value, int) and not _fits_64_bits(value)
            raise ConfigError(f"{name} must be {_describe(hint)}{' (64 bits)' if wide else ''}, got {shown(value)}")
        if found is not value:
            object.__setattr__(owner, name, found)


class Options:
    """What the options of all commands share: each field is checked when an object is made."""

    def __post_init__(self) -> None:
        check_fields(self)


def from_mapping(cls: type[T], values: dict[str, Any]) -> T:
    """Build a settings class from a mapping, refusing keys it does not have.

    Raises:
        ConfigError: an unknown or missing key, or a value that the class refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(fields)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {str(error).partition('() ')[2] or error}") from error


def as_number(value: Any) -> Any:
    """A number of NumPy, or a tensor of one number without dimensions, as Python's own; anything else as it is."""
    if isinstance(value, float):
        return float(value)  # numpy.float64 is one
    try:
        number = value.item() if value.shape == () else value
    except Exception:  # most things have no shape; tensors on the device meta, nested and traced ones have no value
        return value
    return number if type(number) in (bool, int, float) else value


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int; NumPy's integers are welcome, and tensors of one.

    Raises:
        ConfigError: no integer, below `low` or above `high`; names `name`.
    """
    try:
        number = operator.index(as_number(value))
    except (TypeError, ValueError, RuntimeError):  # the last two for tensors of several numbers, or without any
        number = None
    if number is None or isinstance(as_number(value), bool) or number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be an integer {limits}, got {shown(value)}")
    return number


def check_number(name: str, value: Any, limits: Between) -> float:
    """`value` as a finite float inside `limits`; numbers of NumPy are welcome.

    Raises:
        ConfigError: no number, NaN, infinite, or outside; names `name`.
    """
    number = as_number(value)
    fits = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
    if not fits or not limits.holds(number):
        raise ConfigError(f"{name} must be a number {limits}, got {shown(value)}")
    return float(number)


def check_bool(name: str, value: Any) -> bool:
    """`value` as a bool; NumPy's are welcome. Raises `ConfigError` naming `name` for anything else."""
    flag = as_number(value)
    if not isinstance(flag, bool):
        raise ConfigError(f"{name} must be True or False, got {shown(value)}")
    return flag


def check_path(name: str, value: Any) -> Path:
    """`value` as a path, which need not exist. Raises `ConfigError` naming `name` for what no system call takes."""
    if not isinstance(value, (str, Path)):
        raise ArgumentTypeError(f"{name} must be a path, got {shown(value)}")
    try:
        os.stat(value)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        # What stands there is for the caller to say; a name that is too long, or has a null character, is no path.
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{name} must be a path that a system call takes, got {shown(str(value))}") from error
    return Path(value)
