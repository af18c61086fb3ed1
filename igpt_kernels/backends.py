"""Which implementation can run an operation, and why the others cannot: one table, and pure functions of plain facts.

`IMPLEMENTATIONS` lists for every public operation its backends, best first: where their functions are (imported late), and
what they take. `reasons` gives everything that speaks against one of them, `explain` shows that for all, `select` decides.
A new backend is a record in the table and its own files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt_kernels import self_check, tuning
from igpt_kernels._native import load
from igpt_kernels.messages import shown
from igpt_kernels.self_check_cases import CASES
from igpt_kernels.tensors import needs_plain_operations, python_number


@dataclass(frozen=True)
class Implementation:
    """One backend of one operation.

    Attributes:
        backend: its name.
        functions: name of a step of the operation -> ``"module:function"``. All backends of an operation take the same
            positional arguments in a step. Empty for the reference, which the public functions call themselves.
        dtypes: of the inputs.
        devices: types of devices; None is any.
        min_size: smallest size of the kind that `SIZE_ARGUMENT` names for the operation.
        max_size: largest size of that kind; None is any.
        requires: what must be there: ``"triton"``, or ``"ext"``, the compiled extension.
    """

    backend: str
    functions: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    devices: tuple[str, ...] | None = None
    min_size: int = 1
    max_size: int | None = None
    requires: str | None = None


def _triton(functions: Mapping[str, str], *, min_size: int = 1, max_size: int | None) -> Implementation:
    places = {step: f"igpt_kernels._triton.{place}" for step, place in functions.items()}
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return Implementation("triton", places, dtypes, ("cuda",), min_size, max_size, "triton")


def _torch(functions: Mapping[str, str]) -> Implementation:
    return Implementation("torch", {step: f"igpt_kernels._torch.{place}" for step, place in functions.items()})


def _ext(functions: Mapping[str, str]) -> Implementation:
    places = {step: f"igpt_kernels.{place}" for step, place in functions.items()}
    return Implementation("ext", places, (torch.float16, torch.bfloat16, torch.float32), ("cpu",), requires="ext")


_REFERENCE = Implementation("reference")
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "flash_attention": (
        _triton(
            {
                "forward": "attention_forward:launch_flash_forward",
                "backward": "attention_backward:launch_flash_backward",
            },
            max_size=256,
        ),
        _torch({"forward": "attention:flash_forward", "backward": "attention:flash_backward"}),
        _REFERENCE,
    ),
    "block_sparse_attention": (
        _triton(
            {"forward": "sparse_forward:launch_sparse_forward", "backward": "sparse_backward:launch_sparse_backward"},
            max_size=256,
        ),
        _torch({"forward": "sparse:sparse_forward", "backward": "sparse:sparse_backward"}),
        _REFERENCE,
    ),
    "decode_attention": (
        _triton({"dense": "decode:launch_decode", "sparse": "sparse_decode:launch_sparse_decode"}, max_size=256),
        _ext({"dense": "_cpu.decode:decode", "sparse": "_cpu.decode:sparse_decode"}),
        _torch({"dense": "decode:decode", "sparse": "decode:sparse_decode"}),
        _REFERENCE,
    ),
    "rms_norm": (
        _triton({"forward": "norm:launch_rms_norm_forward", "backward": "norm:launch_rms_norm_backward"}, max_size=8192),
        _torch({"forward": "norm:rms_norm_forward", "backward": "norm:rms_norm_backward"}),
        _REFERENCE,
    ),
    "quick_gelu": (
        _triton(
            {"forward": "activation:launch_quick_gelu_forward", "backward": "activation:launch_quick_gelu_backward"},
            max_size=None,
        ),
        _torch({"forward": "activation:quick_gelu_forward", "backward": "activation:quick_gelu_backward"}),
        _REFERENCE,
    ),
    "linear_cross_entropy": (
        _triton(
            {
                "rows": "loss:launch_cross_entropy_forward",
                "rows_backward": "loss:launch_cross_entropy_backward",
                "sum": "loss:launch_cross_entropy_sum",
                "scale_": "loss:launch_cross_entropy_scale_",
                "scaled": "loss:launch_cross_entropy_scaled",
            },
            min_size=2,
            max_size=8192,
        ),
        _ext(
            {step: f"_cpu.loss:cross_entropy_{step}" for step in ("rows", "rows_backward", "sum", "scale_")}
            | {"scaled": "_torch.loss:cross_entropy_scaled"}
        ),
        _torch({step: f"loss:cross_entropy_{step}" for step in ("rows", "rows_backward", "sum", "scale_", "scaled")}),
        _REFERENCE,
    ),
    "palette_lookup": (
        Implementation("ext", dtypes=(torch.uint8,), devices=("cpu", "cuda"), requires="ext"),
        Implementation("torch", dtypes=(torch.uint8,)),
        Implementation("reference", dtypes=(torch.uint8,)),
    ),
}
"""Operation -> its backends, best first: "auto" takes the first without a reason against it."""

SIZE_ARGUMENT: Mapping[str, str | None] = {
    "flash_attention": "head_dim",
    "block_sparse_attention": "head_dim",
    "decode_attention": "head_dim",
    "rms_norm": "width",
    "quick_gelu": "width",
    "linear_cross_entropy": "vocab",
    "palette_lookup": None,
}
"""The one size that an operation's backends may be limited in, as `explain` takes it."""
MIN_COMPUTE_CAPABILITY = (8, 0)
"""From which on the Triton kernels run on NVIDIA GPUs: bfloat16 products, and 99 KiB of shared memory."""
AMD_STATE = f"compiled for {', '.join(tuning.AMD_CHIPS)}, not run"
"""What is known about the Triton kernels on AMD GPUs. Other chips than these take the same table."""
_TRITON = importlib.util.find_spec("triton")  # once: searching the path costs more than a small attention
_HAS_TRITON = _TRITON is not None
_HAS_TRITON_FOR_AMD = any(
    (Path(folder) / "backends" / "amd").is_dir() for folder in (_TRITON and _TRITON.submodule_search_locations) or ()
)


class BackendUnavailable(ValueError):
    """A backend asked for by name cannot run this call; the message lists every reason."""


def reasons(
    implementation: Implementation, *, dtype: torch.dtype, device: torch.device, size: int | None, size_name: str | None
) -> list[str]:
    """Everything that speaks against an implementation for such inputs; empty when it can run."""
    found = []
    if implementation.devices is not None and device.type not in implementation.devices:
        meant = f" ({_triton_chips()})" if implementation.requires == "triton" else ""
        found.append(f"device {device.type} is not one of {', '.join(implementation.devices)}{meant}")
    if dtype not in implementation.dtypes:
        found.append(f"dtype {dtype} is not one of {', '.join(map(str, implementation.dtypes))}")
    if size is not None:
        if size < implementation.min_size:
            found.append(f"{size_name} {size} is below {implementation.min_size}")
        if implementation.max_size is not None and size > implementation.max_size:
            found.append(f"{size_name} {size} is above {implementation.max_size}")
    if implementation.requires == "triton":
        found.extend(_without_triton(device))
    elif implementation.requires == "ext" and device.type in (implementation.devices or (device.type,)):
        found.extend(_without_extension(device))
    return found


def _triton_chips() -> str:
    """What the device ``cuda`` is for Triton."""
    return "NVIDIA or AMD GPUs" if torch.version.hip is None else f"AMD GPUs, {AMD_STATE}"


def _without_triton(device: torch.device) -> list[str]:
    """Why Triton cannot run on `device`; a GPU that is not in this machine is taken to be new enough."""
    found = []
    if not _HAS_TRITON:
        found.append("triton is not installed (pip install triton)")
    if torch.version.hip is not None:  # no capability to compare: what a chip lacks, Triton's compiler does in another way
        if device.type == "cuda" and _HAS_TRITON and not _HAS_TRITON_FOR_AMD:
            found.append("the installed triton has no compiler for AMD GPUs (pip install triton, or the one of torch for ROCm)")
        return found
    # torch.compile folds the properties into a constant, but neither the count nor get_device_capability; and what it traces
    # has its tensors on a device that is there.
    cuda = device.type == "cuda" and torch.cuda.is_available()
    if cuda and (torch.compiler.is_compiling() or (device.index or 0) < torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) < MIN_COMPUTE_CAPABILITY:
            needed = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
            found.append(f"compute capability {properties.major}.{properties.minor} is below {needed}")
    return found


def _without_extension(device: torch.device) -> list[str]:
    """Why the compiled extension does not serve tensors of `device`."""
    if not load.status().loaded:
        return [load.status().reason]
    if device.type == "cuda" and not load.status("cuda").loaded:
        return [load.status("cuda").reason]
    return []


def explain(
    op: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head_dim: int | None = None,
    width: int | None = None,
    vocab: int | None = None,
) -> list[tuple[str, list[str]]]:
    """The backends of `op`, best first, each with the reasons it cannot run (an empty list: it can).

    A torch for ROCm calls AMD GPUs ``cuda``. The Triton kernels are compiled for gfx90a, gfx942 and gfx950, and not run there.

    Args:
        op: name of a public operation, for example ``"flash_attention"``.
        dtype: dtype of the inputs.
        device: device of the inputs; need not exist.
        head_dim: width of a head, for attention; each operation takes the one size that `SIZE_ARGUMENT` names.
        width: values in a row, for ``"rms_norm"`` and ``"quick_gelu"``.
        vocab: classes, for ``"linear_cross_entropy"``.

    Raises:
        TypeError: the operation's size is missing or no int, or another one was given; `dtype` is none.
        ValueError: unknown operation or device.
    """
    if not isinstance(op, str) or op not in IMPLEMENTATIONS:
        raise ValueError(f"op must be one of {', '.join(IMPLEMENTATIONS)}; got {shown(op)}")
    name = SIZE_ARGUMENT[op]
    size: object = None
    for argument, value in (("head_dim", head_dim), ("width", width), ("vocab", vocab)):
        if argument == name:
            size = python_number(value)
        elif value is not None:
            raise TypeError(f"{argument} must be None for {op}, which takes {name or 'no size'}; got {shown(value)}")
    if name is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise TypeError(f"{name} must be given for {op}" + ("" if size is None else f" as an int, got {shown(size)}"))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be a torch.device or the name of one, got {shown(device)}") from error
    return _table(op, dtype, place, size if isinstance(size, int) else None)


def _table(op: str, dtype: torch.dtype, device: torch.device, size: int | None) -> list[tuple[str, list[str]]]:
    return [
        (each.backend, reasons(each, dtype=dtype, device=device, size=size, size_name=SIZE_ARGUMENT[op]))
        for each in IMPLEMENTATIONS[op]
    ]


def choose(backend: str, table: Sequence[tuple[str, list[str]]], op: str) -> str:
    """The backend to run, from what `explain` gives: the first able one for ``"auto"``, else the one asked for.

    Raises:
        ValueError: unknown backend name.
        BackendUnavailable: the named backend (or, for auto, every backend) has a reason against it.
    """
    names = [name for name, _ in table]
    if not isinstance(backend, str) or backend not in ("auto", *names):
        raise ValueError(f"backend must be auto, {', '.join(names)} for {op}; got {shown(backend)}")
    for name, found in table:
        if backend in ("auto", name) and not found:
            return name
    refused = "; ".join(f"{name}: {', '.join(found)}" for name, found in table if backend in ("auto", name))
    raise BackendUnavailable(f"{op} cannot run with backend={backend!r}: {refused}")


def select(op: str, backend: str, tensors: Sequence[Tensor], size: int | None = None) -> str:
    """The backend that runs a call of `op`; a name never falls back. Stops at the first that can run.

    Args:
        op: name of a public operation.
        backend: what the caller asked for.
        tensors: the floating-point inputs of the call; the first one's dtype and device count.
        size: of the kind that `SIZE_ARGUMENT` names.

    Raises:
        ValueError, BackendUnavailable: see `choose`.
    """
    name, dtype, device = SIZE_ARGUMENT[op], tensors[0].dtype, tensors[0].device
    limit = needs_plain_operations(tensors)
    if not limit and isinstance(backend, str):
        for each in IMPLEMENTATIONS[op]:
            if backend not in ("auto", each.backend) or (each.devices is not None and device.type not in each.devices):
                continue
            if not reasons(each, dtype=dtype, device=device, size=size, size_name=name):
                return each.backend
    table = [
        (each, [*found, limit] if limit and each != "reference" else found) for each, found in _table(op, dtype, device, size)
    ]
    return choose(backend, table, op)


@functools.cache
def _load(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


_CHECKED = {(op, name, "triton") for op, name in CASES}


@functools.cache
def _checked(op: str, name: str) -> Callable[..., Any]:
    """A step of the Triton backend that checks its operation's kernels before they run for the first time."""
    functions = next(each.functions for each in IMPLEMENTATIONS[op] if each.backend == "triton")

    def load(step: str) -> Callable[..., Any]:
        return _load(functions[step])

    def run(*arguments: Any) -> Any:
        self_check.ensure(op, name, arguments, load)
        return load(name)(*arguments)

    return run


def step(op: str, backend: str, name: str) -> Callable[..., Any]:
    """The function of a backend for a step of an operation, for example ``step("rms_norm", "triton", "backward")``.

    Raises:
        ValueError: no such backend of the operation, or no such step of it.
    """
    for each in IMPLEMENTATIONS[op]:
        if each.backend == backend and name in each.functions:
            return _checked(op, name) if (op, name, backend) in _CHECKED else _load(each.functions[name])
    known = [each.backend for each in IMPLEMENTATIONS[op] if name in each.functions]
    raise ValueError(f"backend must be one of {', '.join(known)} for {name} of {op}; got {shown(backend)}")
