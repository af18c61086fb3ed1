"""What a GPU's sanitizers check, in Triton's interpreter: every access of every program of a launch, exactly.

Each tensor argument gets addresses of its own, far from all others, that exist only here. An access is looked up before it is
made: it must lie on an element of the view that was passed (not merely in its allocation: a gap between two rows is outside),
reached from the pointer of that argument. And the programs of a launch run in no order, so none may touch what
another has written, and no element is written twice. Nor may a program store to what it has loaded, unless a barrier stands
between: the warps of a program run in no order either, and a layout of registers may hold one element in several warps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

SPAN = 1 << 44
"""Bytes of addresses for each argument, which begins in the middle: no offset that a kernel computes leaves it unseen."""
LARGEST = 1 << 26
"""Elements up to which each is accounted for; views beyond it (tests of 64-bit offsets) are checked by their ends alone."""
NONE = -1
MANY = -2


class MemoryFault(AssertionError):
    """An access that no GPU promises to survive, or whose result depends on which program comes first."""


class Argument:
    """A tensor argument: where it pretends to be, where it is, and which places of that stretch it consists of."""

    def __init__(self, tensor: Tensor, names: str, number: int) -> None:
        self.tensor = tensor  # keeps the memory
        self.names = names
        self.base = number * SPAN + SPAN // 2
        self.moved = np.uint64((tensor.data_ptr() - self.base) % (1 << 64))
        self.bytes = tensor.element_size()
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        self.extent = 1 + sum((size - 1) * stride for size, stride in lengths) if tensor.numel() else 0
        self.places: npt.NDArray[np.bool_] | None = None
        if self.extent <= LARGEST and self.extent != tensor.numel():
            places = torch.zeros(self.extent, dtype=torch.bool)
            places.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.places = places.numpy()

    def elements(self, addresses: npt.NDArray[np.uint64], bytes_each: int) -> npt.NDArray[np.int64]:
        """Element numbers of addresses, all checked; `MemoryFault` names the first that is none."""
        offsets = (addresses - np.uint64(self.base)).view(np.int64)
        found = offsets // self.bytes
        bad = (found < 0) | (found >= self.extent) | (offsets % self.bytes != 0)
        if bytes_each != self.bytes:
            bad[:] = True
        elif self.places is not None and not bad.any():
            bad = ~self.places[found]
        if bad.any():
            where = (
                f"element {int(found[bad][0])} of a view of shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()}"
            )
            raise MemoryFault(f"{self.names}: {int(bad.sum())} accesses outside, the first at {where}")
        return found


class Cells:
    """Which programs of a launch have read and written each element of one storage."""

    def __init__(self, size: int) -> None:
        self.reader: npt.NDArray[np.int32] | None = None
        self.writer: npt.NDArray[np.int32] | None = None
        self.unordered: npt.NDArray[np.bool_] | None = None
        self.size = size

    def barrier(self, program: int) -> None:
        """Note that every warp of a program has made its loads: the program may store there from now on."""
        if self.reader is not None and self.unordered is not None:
            self.unordered[self.reader == program] = False

    def read(self, places: npt.NDArray[np.int64], program: int, names: str) -> None:
        """Note a load; none may follow a store of this launch, for nothing orders the two."""
        if self.writer is not None and (self.writer[places] != NONE).any():
            raise MemoryFault(f"{names}: program {program} loads what this launch has stored")
        if self.reader is None:
            self.reader = np.full(self.size, NONE, np.int32)
            self.unordered = np.zeros(self.size, np.bool_)
        before = self.reader[places]
        self.reader[places] = np.where((before == NONE) | (before == program), program, MANY)
        self.unordered[places] = True

    def write(self, places: npt.NDArray[np.int64], program: int, names: str) -> None:
        """Note a store; none may follow another, nor a load."""
        if self.writer is None:
            self.writer = np.full(self.size, NONE, np.int32)
        if (self.writer[places] != NONE).any():
            raise MemoryFault(f"{names}: program {program} stores to a place that was stored to before")
        self.writer[places] = program
        if np.bincount(places - places.min()).max() > 1:
            raise MemoryFault(f"{names}: program {program} stores two values of one tile to one place")
        if self.reader is not None and self.unordered is not None:
            if (~np.isin(self.reader[places], (NONE, program))).any():
                raise MemoryFault(f"{names}: program {program} stores to what another loads")
            if (self.unordered[places] & (self.reader[places] == program)).any():
                raise MemoryFault(f"{names}: program {program} stores to what it has loaded, with no barrier between")


class Launch:
    """One launch: its arguments by number, and the cells of their storages."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.names: dict[int, str] = {}
        for name, given in named.items():
            value = given.base if isinstance(given, TensorDescriptor) else given
            if isinstance(value, Tensor):
                others = self.names.get(value.data_ptr())
                self.names[value.data_ptr()] = f"{others} or {name}" if others else name
        self.arguments: list[Argument] = []
        self.cells: dict[int, Cells] = {}
        self.accesses = 0

    def base_of(self, tensor: Tensor) -> int:
        """Register a tensor argument; the address it pretends to have."""
        self.arguments.append(Argument(tensor, self.names[tensor.data_ptr()], len(self.arguments) + 1))
        return self.arguments[-1].base

    def real(
        self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle, *, store: bool
    ) -> npt.NDArray[np.uint64]:
        """Check and note an access; the addresses where it is to be made."""
        everywhere: npt.NDArray[np.uint64] = pointers.data
        touched = everywhere[np.broadcast_to(mask.data, everywhere.shape) != 0]  # a mask can be of integers
        if not touched.size:
            return everywhere
        self.accesses += 1
        number = int(touched[0] // SPAN)
        if not 1 <= number <= len(self.arguments):
            raise MemoryFault(f"address {int(touched[0]):#x} belongs to no argument")
        argument = self.arguments[number - 1]
        places = argument.elements(touched, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        storage = argument.tensor.untyped_storage()
        if storage.nbytes() <= LARGEST * argument.bytes:
            at = storage.data_ptr()
            if at not in self.cells:
                self.cells[at] = Cells(storage.nbytes() // argument.bytes)
            places += (argument.tensor.data_ptr() - at) // argument.bytes
            note = self.cells[at].write if store else self.cells[at].read
            note(places, self.program(), argument.names)
        return everywhere + argument.moved

    @staticmethod
    def program() -> int:
        """The number of the program that runs."""
        _, height, depth = interpreter.interpreter_builder.grid_dim
        x, y, z = interpreter.interpreter_builder.grid_idx
        return int((x * height + y) * depth + z)

    def barrier(self) -> None:
        """What the program that runs has loaded comes before what it does next."""
        for cells in self.cells.values():
            cells.barrier(self.program())


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Within it, every interpreted launch is checked; the interpreter is as before afterwards.

    Yields:
        How many loads and stores of each kernel were looked at, so that a test can tell that something was.

    Raises:
        triton.runtime.errors.InterpreterError: around a `MemoryFault`, from the launch that made it.
    """
    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    accesses: Counter[str] = Counter()
    launches: list[Launch] = []
    run, convert, load, store = (
        executor.__call__,
        interpreter._implicit_cvt,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(Launch(dict(zip(self.arg_names, args, strict=False)) | kwargs))
        try:
            run(self, *args, **kwargs)
        finally:
            accesses[self.fn.__name__] += launches.pop().accesses

    def convert_watched(value: Any) -> Any:
        made = convert(value)
        if isinstance(value, Tensor):
            made.handle.data = np.array([launches[-1].base_of(value)], np.uint64)
        return made

    def load_watched(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        real = launches[-1].real(pointers, mask, store=False)
        return load(self, interpreter.TensorHandle(real, pointers.dtype), mask, *rest, **named)

    def store_watched(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real = launches[-1].real(pointers, mask, store=True)
        return store(self, interpreter.TensorHandle(real, pointers.dtype), value, mask, *rest)

    def barrier_watched(self: Any) -> None:
        launches[-1].barrier()

    def refused(*_: Any) -> None:
        raise MemoryFault("an atomic operation: its order is not the same in every run")

    with ExitStack() as changes:
        for owner, name, replacement in (
            (executor, "__call__", launch),
            (interpreter, "_implicit_cvt", convert_watched),
            (builder, "create_masked_load", load_watched),
            (builder, "create_masked_store", store_watched),
            (builder, "create_barrier", barrier_watched),
            (builder, "create_atomic_cas", refused),
            (builder, "create_atomic_rmw", refused),
        ):
            changes.enter_context(patch.object(owner, name, replacement))
        yield accesses
