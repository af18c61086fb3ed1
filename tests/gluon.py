"""Runs the source of a Gluon kernel on the CPU, with a thread for each partition of warps. Triton's interpreter cannot.

Every name that the kernel takes from Gluon is replaced. What the hardware does late, happens as late as it may: a product
reads shared memory when it is waited for, and a copy arrives after a random time. Shared memory starts as NaN. So a tile that
is overwritten too early, or read before it is there, gives a wrong result. A barrier that is never completed raises.

It knows nothing of layouts, registers, fences and the barriers that the compiler adds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PATIENCE = 20.0
"""Seconds after which a wait is a deadlock."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that it expects have come."""

    def __init__(self) -> None:
        self.changed, self.phase, self.count, self.left, self.bytes = threading.Condition(), 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def move(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.left -= arrivals
            self.bytes += size
            assert self.left >= 0, "more arrivals than a phase has"
            if self.left == 0 and self.bytes == 0:
                self.phase, self.left = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int | Tensor) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE):
                raise TimeoutError("a barrier that is never completed")


class Barriers:
    """An array of barriers; one of a single barrier stands for that."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.each = [Barrier() for _ in range(shape[0])]

    def index(self, i: int | Tensor) -> Barrier:
        return self.each[int(i)]


def one(barrier: Barrier | Barriers) -> Barrier:
    return barrier.each[0] if isinstance(barrier, Barriers) else barrier


class Shared:
    """Shared memory: NaN until something is written."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int | Tensor) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Descriptor:
    """A tensor [B,H,T,D] in tiles [1,1,rows,width]; beyond it lie zeros."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: object) -> None:
        assert list(base.shape) == shape
        assert list(base.stride()) == strides
        self.base, self.block, self.layout, self.dtype = base, block, layout, base.dtype
        self.block_type = SimpleNamespace(nbytes=block[2] * block[3] * base.element_size())

    def part(self, at: Sequence[int | Tensor]) -> Tensor:
        batch, head, row, column = (int(each) for each in at)
        assert min(batch, head, row, column) >= 0
        return self.base[batch, head, row : row + self.block[2], column : column + self.block[3]]


class Products:
    """Matrix products of one thread that have been started and not waited for."""

    def __init__(self) -> None:
        self.mine = threading.local()

    def start(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> SimpleNamespace:
        assert is_async
        started = SimpleNamespace(a=a, b=b, acc=acc if use_acc else torch.zeros_like(acc), value=None)
        self.mine.__dict__.setdefault("queue", []).append(started)
        return started

    def wait(self, left: int, deps: Sequence[SimpleNamespace]) -> Tensor:
        queue = self.mine.queue
        while len(queue) > left:
            time.sleep(random.random() * 1e-3)
            first = queue.pop(0)
            a = first.a.data if isinstance(first.a, Shared) else first.a
            first.value = first.acc + a.float() @ first.b.data.float()
        assert deps[0].value is not None, "used before it is there"
        return deps[0].value


class Pointer:
    """A pointer and offsets from it."""

    def __init__(self, data: Tensor, offset: int | Tensor = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, more: int | Tensor) -> Pointer:
        return Pointer(self.data, self.offset + more)


class Kernel:
    """A function of Gluon; launched, it runs one program after another."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return self.function(*arguments, **more)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            wrapped = [
                Pointer(each.view(-1)) if isinstance(each, Tensor) else torch.tensor(each) if isinstance(each, int) else each
                for each in arguments
            ]
            for program in range(grid[0]):
                Kernel.program = program
                self.function(*wrapped, **constants)

        return launch


def warp_specialize(parts: Iterable[tuple[Kernel, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    """Run the partitions side by side; what one raises is raised here."""
    failures: list[BaseException] = []

    def run(function: Kernel, arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    assert len(threads) == len(warps) + 1 == len(registers) + 1
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def copy_in(desc: Descriptor, at: Sequence[int | Tensor], barrier: Barrier | Barriers, target: Shared) -> None:
    """A copy into shared memory, which arrives later."""
    part = desc.part(at)

    def arrive() -> None:
        time.sleep(random.random() * 1e-3)
        target.data.zero_()
        target.data[0, 0, : part.shape[0], : part.shape[1]] = part
        one(barrier).move(0, -desc.block_type.nbytes)

    threading.Thread(target=arrive, daemon=True).start()


def copy_out(desc: Descriptor, at: Sequence[int | Tensor], source: Shared) -> None:
    """A copy to memory; nothing beyond the tensor is written."""
    part = desc.part(at)
    part.copy_(source.data[0, 0, : part.shape[0], : part.shape[1]])


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    """Store where the mask is true, within the tensor."""
    at = torch.as_tensor(pointer.offset)[mask]
    assert at.numel() == 0 or 0 <= int(at.min()) <= int(at.max()) < pointer.data.numel()
    pointer.data[at] = value[mask]


def allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Shared | Barriers:
    """Barriers where values are int64."""
    return Barriers(shape) if dtype == torch.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))


def stand_ins() -> dict[str, ModuleType]:
    """The modules of Gluon that kernels import."""
    products = Products()
    tensor = torch.as_tensor

    def jit(function: Callable[..., Any] | None = None, **options: object) -> Any:
        return Kernel(function) if function is not None else Kernel

    def anything(**options: object) -> SimpleNamespace:
        return SimpleNamespace(**options)

    language: dict[str, Any] = {
        "constexpr": lambda value: value,
        "int64": torch.int64,
        "float32": torch.float32,
        "program_id": lambda axis: torch.tensor(Kernel.program),
        "to_tensor": tensor,
        "static_range": range,
        "minimum": lambda a, b: torch.minimum(tensor(a), tensor(b)),
        "maximum": lambda a, b: torch.maximum(tensor(a), tensor(b)),
        "where": lambda condition, a, b: torch.where(condition, tensor(a), tensor(b)),
        "max": lambda x, axis: x.amax(axis),
        "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2,
        "log2": torch.log2,
        "arange": lambda start, end, layout: torch.arange(start, end),
        "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "convert_layout": lambda x, layout: x,
        "store": store,
        "allocate_shared_memory": allocate,
        "warp_specialize": warp_specialize,
        "NVMMADistributedLayout": anything,
        "NVMMASharedLayout": anything,
        "DotOperandLayout": anything,
        "SliceLayout": lambda dim, parent: parent,
    }
    mbarrier = SimpleNamespace(
        MBarrierLayout=anything,
        init=lambda barrier, count: one(barrier).init(count),
        wait=lambda barrier, phase: one(barrier).wait(phase),
        expect=lambda barrier, size: one(barrier).move(1, size),
        arrive=lambda barrier, count: one(barrier).move(count, 0),
    )
    tma = SimpleNamespace(
        async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=lambda pendings: None
    )
    hopper = {
        "mbarrier": mbarrier,
        "tma": tma,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": products.start,
        "warpgroup_mma_wait": products.wait,
    }
    base = "triton.experimental.gluon"
    contents = {
        base: {"jit": jit},
        f"{base}.language": language,
        f"{base}.language.nvidia": {},
        f"{base}.language.nvidia.hopper": hopper,
        f"{base}.nvidia": {},
        f"{base}.nvidia.hopper": {"TensorDescriptor": Descriptor},
    }
    modules = {}
    for name, names in contents.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(names)
    vars(modules[base])["language"] = modules[f"{base}.language"]
    vars(modules["triton.experimental.gluon"])["__path__"] = []
    experimental = ModuleType("triton.experimental")
    vars(experimental).update({"gluon": modules[base], "__path__": []})
    return {"triton.experimental": experimental, **modules}


@functools.cache
def load(path: Path) -> ModuleType:
    """The module at `path`, with Gluon replaced."""
    specification = importlib.util.spec_from_file_location(f"{path.stem}_on_the_cpu", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    importlib.import_module("igpt_kernels._triton.common")  # what is first imported inside the patch is forgotten after it
    with mock.patch.dict(sys.modules, stand_ins()):
        specification.loader.exec_module(module)
    return module
