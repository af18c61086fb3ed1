"""Fixtures: correct bfloat16 rounding in Triton's interpreter, and a check of every memory access."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter.memory import watched

_ACCESSES: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bfloat16, twice the error of the rounding to nearest that every chip does."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: object, src: interpreter.TensorHandle, dst_type: tl.dtype) -> interpreter.TensorHandle:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = np.where(np.isnan(src.data), (bits >> 16) | 0x40, nearest)
        return interpreter.TensorHandle(nearest.astype(np.uint16), dst_type.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(autouse=True)
def language_is_patched_once_a_launch() -> Iterator[None]:
    """Each call of a device function patches triton.language anew, which changes nothing and takes a third of all time."""
    change, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def once(function: Any) -> object:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return change(function)

    def launch(self: object, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # the launch before has put things back
        run(self, *args, **kwargs)

    # Not by monkeypatch, which would undo this after the watch over accesses was undone, that wraps the same method.
    with patch.object(interpreter, "_patch_lang", once), patch.object(interpreter.GridExecutor, "__call__", launch):
        yield


def overflow_is_refused(_: object, lhs: Any, rhs: Any, operation: Any) -> None:
    """The interpreter's check that no sum, difference or product of integers leaves its type, on their numpy arrays."""
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    assert integer == rhs.type.scalar
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    low, high = integer.get_int_min_value(), integer.get_int_max_value()
    assert ((exact >= low) & (exact <= high)).all(), f"{integer} overflow in {operation.__name__}"


_TABLE = {
    dtype: interpreter._get_np_dtype(dtype)
    for dtype in map(tl.dtype, (*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES))
}


def numpy_dtype(dtype: Any) -> npt.DTypeLike:
    """The interpreter's own makes its table anew at every use."""
    dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else _TABLE[dtype]


@functools.cache
def shape_of(lengths: tuple[int, ...]) -> tuple[Any, Any]:
    """The shape of a tensor of the language, and its number of values."""
    return tl.tuple([tl.constexpr(length) for length in lengths]), tl.constexpr(math.prod(lengths))


def new_tensor(self: Any, handle: interpreter.TensorHandle, type: Any) -> None:
    """What the constructor of `tl.tensor` does, with shapes that are kept."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_of(type.shape if type.is_block() else ())


@pytest.fixture(autouse=True)
def little_is_made_twice() -> Iterator[None]:
    """A third of all time: a check of overflow in operations of the language, a table of dtypes, shapes."""
    semantic = type(interpreter.interpreter_semantic)
    with (
        patch.object(interpreter, "_get_np_dtype", numpy_dtype),
        patch.object(semantic, "binary_op_sanitize_overflow_impl", overflow_is_refused),
        patch.object(tl.tensor, "__init__", new_tensor),
    ):
        yield


@pytest.fixture(autouse=True)
def every_access_is_checked() -> Iterator[None]:
    """A kernel that leaves its arguments, or races with itself, fails the test that launches it."""
    with watched() as accesses:
        yield
    _ACCESSES.update(accesses)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kernels were watched, for the test that wants to know."""
    for kernel, count in sorted(_ACCESSES.items()):
        terminalreporter.write_line(f"watched {kernel}: {count} accesses")
