"""Which implementation can run an operation, and why the others cannot: pure functions of plain facts.

A capability record says what a backend takes; `explain` turns it into a list of reasons, and `choose` into a
decision. The same check answers "choose for me" and "why not?". Nothing here needs a device or keeps state.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Capability:
    """What one backend of one operation takes."""

    backend: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None = None
    """Device types; None is any."""
    widest: int | None = None
    """Largest head dim; None is any."""
    needs_triton: bool = False


_ALL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON = Capability("triton", _ALL[:3], devices=("cuda",), widest=256, needs_triton=True)
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: searching the path costs more than a small attention
OLDEST = (8, 0)
"""Compute capability from which on the Triton kernels run: bfloat16 products, and 99 KiB of shared memory."""

# Best first: "auto" takes the first backend without a reason against it.
CAPABILITIES: dict[str, tuple[Capability, ...]] = {
    "flash_attention": (_TRITON, Capability("torch", _ALL), Capability("reference", _ALL)),
    "block_sparse_attention": (_TRITON, Capability("torch", _ALL), Capability("reference", _ALL)),
    "decode_attention": (_TRITON, Capability("torch", _ALL), Capability("reference", _ALL)),
}

SPARSE = ("block_sparse_attention", "decode_attention")
"""Operations that take a layout."""


class BackendUnavailable(ValueError):
    """A backend asked for by name cannot run this call; the message lists every reason."""


def explain(
    op: str, *, dtype: torch.dtype, device: torch.device | str, head_dim: int, layout: object = None
) -> list[tuple[str, list[str]]]:
    """The backends of `op`, best first, each with the reasons it cannot run (an empty list: it can).

    Args:
        op: name of a public operation, for example ``"flash_attention"``.
        dtype: dtype of the inputs.
        device: device of the inputs; need not exist.
        head_dim: width of a head.
        layout: the sparse pattern, for operations that take one; every backend takes every pattern.

    Raises:
        ValueError: unknown operation, or one that takes no layout.
    """
    if op not in CAPABILITIES:
        raise ValueError(f"op must be one of {', '.join(CAPABILITIES)}; got {op!r}")
    if layout is not None and op not in SPARSE:
        raise ValueError(f"layout must be None for {op}, got {layout}")
    kind = torch.device(device).type
    table = []
    for capability in CAPABILITIES[op]:
        reasons = []
        if capability.devices is not None and kind not in capability.devices:
            reasons.append(f"device {kind} is not one of {', '.join(capability.devices)}")
        if dtype not in capability.dtypes:
            reasons.append(f"dtype {dtype} is not one of {', '.join(map(str, capability.dtypes))}")
        if head_dim < 1:
            reasons.append(f"head_dim {head_dim} is below 1")
        if capability.widest is not None and head_dim > capability.widest:
            reasons.append(f"head_dim {head_dim} is above {capability.widest}")
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
