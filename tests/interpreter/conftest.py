"""Triton's interpreter, mended where it computes what no GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


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
