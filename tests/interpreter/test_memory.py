"""The watch over the memory of interpreted kernels catches what it is there for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(X, Out, n, shift, stride_x, stride_out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # A number and a block: the interpreter makes integers of this mask.
    x = tl.load(X + (at + shift) * stride_x, mask=(n >= 0) & (at < n), other=0.0)
    tl.store(Out + at * stride_out, x, mask=at < n)


@triton.jit
def _in_place_kernel(X, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + (at + shift) % n)
    tl.debug_barrier()
    tl.store(X + at, x + 1)


@triton.jit
def _reach_kernel(X, Other, Out, distance):
    tl.store(Out, tl.load(X + distance))


@triton.jit
def _same_place_kernel(Out, BLOCK: tl.constexpr, BY_PROGRAM: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    place = lanes + 0 * tl.program_id(0) if BY_PROGRAM else lanes // 2 + BLOCK * tl.program_id(0)
    tl.store(Out + place, lanes.to(tl.float32))


@triton.jit
def _neighbour_kernel(X, Out, n, AXIS: tl.constexpr):
    program = tl.program_id(AXIS)
    tl.store(Out + program, tl.load(X + (program + 1) % n))


@triton.jit
def _last_stores_kernel(X, last):
    tl.store(X, tl.load(X), mask=tl.program_id(0) == last)


@triton.jit
def _count_kernel(Out, SWAP: tl.constexpr):
    if SWAP:
        tl.atomic_cas(Out, 0, 1)
    else:
        tl.atomic_add(Out, 1)


@triton.jit
def _cast_kernel(X, Out):
    tl.store(Out, tl.load(X.to(tl.pointer_type(tl.float16))).to(tl.float32))


@triton.jit
def _unaligned_kernel(X, Out):
    tl.store(Out, tl.load((X.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.float32))))


@triton.jit
def _from_a_number_kernel(Out, address):
    tl.store(Out, tl.load(address.to(tl.int64).to(tl.pointer_type(tl.float32))))


@triton.jit
def _integers_kernel(Out, number, factor, OPERATION: tl.constexpr):
    if OPERATION == "add":
        made = number + factor
    elif OPERATION == "sub":
        made = number - factor
    else:
        made = number * factor
    tl.store(Out + tl.arange(0, 2), made + tl.zeros([2], tl.int32))


def copied(x: Tensor, out: Tensor, n: int | None = None, shift: int = 0) -> Tensor:
    """`_copy_kernel` in blocks of 16."""
    n = x.numel() if n is None else n
    _copy_kernel[(triton.cdiv(n, 16),)](x, out, n, shift, x.stride(0), out.stride(0), BLOCK=16)
    return out


def far_from(x: Tensor, other: Tensor) -> int:
    """Elements between the first values of two tensors."""
    return (other.data_ptr() - x.data_ptr()) // x.element_size()


def row(n: int = 37) -> Tensor:
    return torch.arange(n, dtype=torch.float32)


@pytest.mark.parametrize("step", [1, 3])
def test_what_stays_inside_is_left_alone(step: int) -> None:
    x = row(37 * step)[::step]
    assert torch.equal(copied(x, torch.empty(37)), x)
    buffer = row(74)
    assert torch.equal(copied(buffer[:37], buffer[37:]), row())  # two views of one storage


OUTSIDE: dict[str, Callable[[], Any]] = {
    "one behind the end": lambda: copied(row(), torch.empty(37), 36, shift=2),
    "one before the start": lambda: copied(row(), torch.empty(37), 36, shift=-1),
    "behind a view, inside its storage": lambda: copied(row(80)[:37], torch.empty(37), shift=1),
    "between the rows of a view": lambda: _copy_kernel[(1,)](row(80)[::2], torch.empty(16), 16, 0, 1, 1, BLOCK=16),
    "a store behind the end": lambda: copied(row(40), torch.empty(37)),
    "an empty tensor": lambda: copied(torch.empty(0), torch.empty(1), 1),
    "an empty view with a step": lambda: copied(torch.empty(0, 3)[:, 0], torch.empty(1), 1),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_access_outside_of_a_view_is_found(name: str) -> None:
    with pytest.raises(InterpreterError, match=r"accesses? outside, the first at element"):
        OUTSIDE[name]()


def test_an_argument_is_not_reached_from_another() -> None:
    x, other, out = row(), row(), torch.empty(1)
    _reach_kernel[(1,)](x, other, out, 36)
    with pytest.raises(InterpreterError, match="X: 1 accesses outside"):
        _reach_kernel[(1,)](x, other, out, far_from(x, other))


def test_values_of_another_width_are_found() -> None:
    with pytest.raises(InterpreterError, match="X: 1 accesses outside"):
        _cast_kernel[(1,)](row(), torch.empty(1))
    with pytest.raises(InterpreterError, match="X: 1 accesses outside"):
        _unaligned_kernel[(1,)](row(), torch.empty(1))


def test_an_address_from_nowhere_is_found() -> None:
    with pytest.raises(InterpreterError, match="belongs to no argument"):
        _from_a_number_kernel[(1,)](torch.empty(1), 64)


def test_programs_that_race_are_found() -> None:
    _same_place_kernel[(1,)](torch.empty(64), BLOCK=16, BY_PROGRAM=True)
    with pytest.raises(InterpreterError, match="program 1 stores to a place that was stored to before"):
        _same_place_kernel[(2,)](torch.empty(64), BLOCK=16, BY_PROGRAM=True)
    with pytest.raises(InterpreterError, match="two values of one tile"):
        _same_place_kernel[(1,)](torch.empty(64), BLOCK=16, BY_PROGRAM=False)
    x = row(12)
    with pytest.raises(InterpreterError, match="program 1 loads what this launch has stored"):
        _neighbour_kernel[(2,)](x, x[2:], 12, AXIS=0)


def test_a_program_that_stores_to_what_it_has_loaded_is_found() -> None:
    in_place = row()
    with pytest.raises(InterpreterError, match="program 0 stores to what it has loaded"):
        copied(in_place, in_place)  # each program its own part, but warps of a program run in no order


def test_a_barrier_orders_the_warps_of_one_program_alone() -> None:
    x = row(64)
    _in_place_kernel[(4,)](x, 64, 0, BLOCK=16)
    assert torch.equal(x, row(64) + 1)
    with pytest.raises(InterpreterError, match="program 0 stores to what it has loaded"):
        copied(x, x)  # without one
    with pytest.raises(InterpreterError, match="program 1 stores to what another loads"):
        _in_place_kernel[(4,)](x, 64, 16, BLOCK=16)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_place_that_another_program_loads_is_not_stored_to(axis: int) -> None:
    grid = tuple(8 if one == axis else 1 for one in range(3))
    _neighbour_kernel[grid](row(8), torch.empty(8), 8, AXIS=axis)
    x = row(8)
    with pytest.raises(InterpreterError, match="program 1 stores to what another loads"):
        _neighbour_kernel[grid](x, x, 8, AXIS=axis)


def test_a_place_that_several_programs_load_is_not_stored_to_by_the_last() -> None:
    with pytest.raises(InterpreterError, match="program 1 stores to what another loads"):
        _last_stores_kernel[(2,)](row(), 1)


@pytest.mark.parametrize("swap", [False, True])
def test_atomic_operations_are_refused(swap: bool) -> None:
    with pytest.raises(InterpreterError, match="atomic"):
        _count_kernel[(2,)](torch.zeros(1, dtype=torch.int32), SWAP=swap)


@pytest.mark.parametrize(
    ("operation", "number", "most"), [("add", 2**31 - 8, 7), ("sub", -(2**31) + 7, 7), ("mul", 2**28, 7), ("mul", -(2**28), 8)]
)
def test_integers_that_leave_their_type_are_found(operation: str, number: int, most: int) -> None:
    out = torch.empty(2, dtype=torch.int32)
    _integers_kernel[(1,)](out, number, most, OPERATION=operation)
    exact = {"add": number + most, "sub": number - most, "mul": number * most}[operation]
    assert out.tolist() == [exact, exact]
    with pytest.raises(InterpreterError, match=f"int32 overflow in {operation}"):
        _integers_kernel[(1,)](out, number, most + 1, OPERATION=operation)
