"""Launch a kernel with little Python: find the compiled kernel by a key, and call its launcher.

``kernel[grid](...)`` of Triton specialises every argument anew in each call (10 µs for 30 arguments). `launch` hands the first
call with a key to Triton, and keeps the compiled kernel that comes back. The key is finer than what Triton specialises on
(its `native_specialize_impl`). So equal keys never need different kernels. It holds:

- of every argument: the type of the Python object. Floats, bools and None add nothing.
- of a tensor: its dtype, and its address modulo 16. Nothing else of an address is kept.
- of an integer: its value. Triton asks for 1, for divisibility by 16, and for the size.
- of an integer under ``do_not_specialize``: the value shifted right by 31 bits. Triton asks whether it takes 64 bits.
- of a tensor descriptor: dtype, shape of a block, layout.
- of compile-time arguments and options: names and values.
- the kernel, the device and its driver, and the switches for debugging and instrumentation.

Where something else may look at a launch, it goes the plain way through Triton: in the interpreter, with hooks, and where
`JITFunction.run` is replaced (audit, Proton). So do chips that are not NVIDIA's, and unknown versions of Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # a Triton without Gluon
    GluonDescriptor = TensorDescriptor

KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether compiled kernels take ``(grid x 3, stream, function, packed_metadata, launch_metadata, hooks x 2, *arguments)``."""
MOST = 1 << 12
"""Keys of one kernel; one more begins anew, so that ever new strides do not fill the memory."""
_RUN = JITFunction.run
_dtype = attrgetter("dtype")


def _pick(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the items at `places` out of a tuple, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


class _Form:
    """How calls of one kernel with arguments of the same types are keyed, and what was compiled for them.

    Attributes:
        direct: whether every argument is of a type that a key can describe.
        tensors: takes the tensors out of the arguments.
        descriptors: takes out the tensor descriptors; None without any.
        values: takes out what is keyed by value.
        ranges: takes out integers of which only the size matters.
        tail: names of compile-time arguments behind the arguments, in the order of the kernel.
        compiled: key -> (launcher, function, packed metadata, values of the tail).
    """

    def __init__(self, kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.kernel = kernel  # its id is part of a key, so it must live
        parameters = kernel.params
        tensors: list[int] = []
        descriptors: list[int] = []
        values: list[int] = []
        ranges: list[int] = []
        self.direct = len(args) <= len(parameters)
        for place, (parameter, arg) in enumerate(zip(parameters, args, strict=False)):
            kind = type(arg)
            if parameter.is_constexpr:
                values.append(place)
            elif isinstance(arg, Tensor):
                tensors.append(place)
            elif kind is int:
                (ranges if parameter.do_not_specialize else values).append(place)
            elif kind in (TensorDescriptor, GluonDescriptor):
                descriptors.append(place)
            elif kind not in (float, bool, type(None)):
                self.direct = False
        rest = parameters[len(args) :]
        for parameter in rest:
            if not parameter.is_constexpr and parameter.name in constants:
                raise TypeError(
                    f"{kernel.__name__}: {parameter.name} is no compile-time argument, so it must be passed by position"
                )
        self.tail = [(parameter.name, parameter.default) for parameter in rest]
        self.tensors, self.values, self.ranges = _pick(tensors), _pick(values), _pick(ranges)
        self.descriptors = _pick(descriptors) if descriptors else None
        self.compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def keep(self, key: tuple[Any, ...], compiled: object, constants: dict[str, Any]) -> None:
        """Remember what Triton compiled, if it can be launched directly."""
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            if len(self.compiled) >= MOST:
                self.compiled.clear()
            tail = tuple(constants.get(name, default) for name, default in self.tail)
            self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, tail


_forms: dict[tuple[Any, ...], _Form] = {}
_owner: list[object] = [None]


def clear() -> None:
    """Forget every compiled kernel; Triton keeps its own."""
    _forms.clear()


def plain() -> bool:
    """Whether something looks at launches that only Triton's own way of launching tells."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, on the current device and its current stream.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit``.
        grid: programs, in one to three dimensions.
        args: the arguments of the kernel, by position: tensors, tensor descriptors, numbers, None.
        constants: the compile-time arguments and the options (num_warps, num_stages, maxnreg), by name.

    Raises:
        TypeError: an argument that is no compile-time argument was passed by name.
    """
    if getattr(type(kernel), "run", None) is not _RUN or not KNOWN or kernel.pre_run_hooks or plain():
        kernel[grid](*args, **constants)
        return
    active = driver.active
    if active is not _owner[0]:
        clear()
        _owner[0] = active
    name = (id(kernel), *constants, *map(type, args))
    form = _forms.get(name)
    if form is None:
        form = _forms[name] = _Form(kernel, args, constants)
    if not form.direct:
        kernel[grid](*args, **constants)
        return
    tensors = form.tensors(args)
    misaligned = 0
    for x in tensors:
        misaligned = misaligned << 4 | x.data_ptr() & 15
    device = active.get_current_device()
    key = (
        device, misaligned, *map(_dtype, tensors), *form.values(args), *[x >> 31 for x in form.ranges(args)],
        *constants.values(), knobs.runtime.debug, knobs.compilation.instrumentation_mode,
    )  # fmt: skip
    if form.descriptors is not None:
        key += tuple((x.base.dtype, *x.block_shape, getattr(x, "layout", None)) for x in form.descriptors(args))
    found = form.compiled.get(key)
    if found is None:
        form.keep(key, kernel.run(*args, grid=grid, warmup=False, **constants), constants)
        return
    run, function, metadata, tail = found
    size = len(grid)
    run(
        grid[0], grid[1] if size > 1 else 1, grid[2] if size > 2 else 1, active.get_current_stream(device),
        function, metadata, None, None, None, *args, *tail,
    )  # fmt: skip
