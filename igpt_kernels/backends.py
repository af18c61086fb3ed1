"""Which implementation can run an operation, and why the others cannot: pure functions of plain facts.

A capability record says what a backend takes; `explain` turns it into a list of reasons, and `choose` into a
decision. The same check answers "choose for me" and "why not?". Nothing here needs a device or keeps state.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Capability:
    """What one backend of one operation takes."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None = None
    """Device types; None is any."""
    least: int = 1
    """Smallest size of the kind that `SIZES` names for the operation."""
    widest: int | None = None
    """Largest size of that kind; None is any."""
    needs_triton: bool = False


_ALL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON = Capability("triton", _ALL[:3], devices=("cuda",), widest=256, needs_triton=True)
_ANYWHERE = (Capability("torch", _ALL), Capability("reference", _ALL))
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: searching the path costs more than a small attention
OLDEST = (8, 0)
"""Compute capability from which on the Triton kernels run: bfloat16 products, and 99 KiB of shared memory."""

# Best first: "auto" takes the first backend without a reason against it.
CAPABILITIES: dict[str, tuple[Capability, ...]] = {
    "flash_attention": (_TRITON, *_ANYWHERE),
    "block_sparse_attention": (_TRITON, *_ANYWHERE),
    "decode_attention": (_TRITON, *_ANYWHERE),
    "rms_norm": (replace(_TRITON, widest=8192), *_ANYWHERE),
    "quick_gelu": (replace(_TRITON, widest=None), *_ANYWHERE),
    "linear_cross_entropy": (replace(_TRITON, least=2, widest=8192), *_ANYWHERE),
}
SIZES: Mapping[str, str] = {"rms_norm": "width", "quick_gelu": "width", "linear_cross_entropy": "vocab"}
"""The one size that an operation's backends may be limited in; that of attention is head_dim."""

SPARSE = ("block_sparse_attention", "decode_attention")
"""Operations that take a layout."""


class BackendUnavailable(ValueError):
    """A backend asked for by name cannot run this call; the message lists every reason."""


def explain(
    op: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head_dim: int | None = None,
    width: int | None = None,
    vocab: int | None = None,
    layout: object = None,
) -> list[tuple[str, list[str]]]:
    """The backends of `op`, best first, each with the reasons it cannot run (an empty list: it can).

    Args:
        op: name of a public operation, for example ``"flash_attention"``.
        dtype: dtype of the inputs.
        device: device of the inputs; need not exist.
        head_dim: width of a head, for attention; each operation takes the one size that `SIZES` names.
        width: values in a row, for ``"rms_norm"`` and ``"quick_gelu"``.
        vocab: classes, for ``"linear_cross_entropy"``.
        layout: the sparse pattern, for operations that take one; every backend takes every pattern.

    Raises:
        TypeError: the operation's size is missing, or another one was given.
        ValueError: unknown operation, or one that takes no layout.
    """
    if op not in CAPABILITIES:
        raise ValueError(f"op must be one of {', '.join(CAPABILITIES)}; got {op!r}")
    if layout is not None and op not in SPARSE:
        raise ValueError(f"layout must be None for {op}, got {layout}")
    kind, name = torch.device(device).type, SIZES.get(op, "head_dim")
    size = None
    for one, value in (("head_dim", head_dim), ("width", width), ("vocab", vocab)):
        if one == name:
            size = value
        elif value is not None:
            raise TypeError(f"{one} must be None for {op}, which takes {name}; got {value!r}")
    if size is None:
        raise TypeError(f"{name} must be given for {op}")
    table = []
    for capability in CAPABILITIES[op]:
        reasons = []
        if capability.devices is not None and kind not in capability.devices:
            reasons.append(f"device {kind} is not one of {', '.join(capability.devices)}")
        if dtype not in capability.dtypes:
            reasons.append(f"dtype {dtype} is not one of {', '.join(map(str, capability.dtypes))}")
        if size < capability.least:
            reasons.append(f"{name} {size} is below {capability.least}")
        if capability.widest is not None and size > capability.widest:
            reasons.append(f"{name} {size} is above {capability.widest}")
        if capability.needs_triton:
            reasons.extend(_without_triton(torch.device(device)))
        table.append((capability.backend, reasons))
    return table


def _without_triton(device: torch.device) -> list[str]:
    """Why Triton cannot run on `device`; a GPU that is not in this machine is taken to be new enough."""
    reasons = []
    if not _HAS_TRITON:
        reasons.append("triton is not installed (pip install triton)")
    # torch.compile folds the properties into a constant, but neither the count nor get_device_capability; and what it traces
    # has its tensors on a device that is there.
    cuda = device.type == "cuda" and torch.cuda.is_available()
    if cuda and (torch.compiler.is_compiling() or (device.index or 0) < torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(device)
        if (found.major, found.minor) < OLDEST:
            reasons.append(f"compute capability {found.major}.{found.minor} is below {OLDEST[0]}.{OLDEST[1]}")
    return reasons


def choose(backend: str, table: Sequence[tuple[str, list[str]]], op: str) -> str:
    """The backend to run: the first able one for ``"auto"``, else the one asked for.

    Raises:
        ValueError: unknown backend name.
        BackendUnavailable: the named backend (or, for auto, every backend) has a reason against it.
    """
    names = [name for name, _ in table]
    if backend != "auto" and backend not in names:
        raise ValueError(f"backend must be auto, {', '.join(names)} for {op}; got {backend!r}")
    for name, reasons in table:
        if backend in ("auto", name) and not reasons:
            return name
    refused = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in table if backend in ("auto", name))
    raise BackendUnavailable(f"{op} cannot run with backend={backend!r}: {refused}")
