"""Fixtures: correct bfloat16 rounding in Triton's interpreter, and a check of every memory access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
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
