"""Which implementation can run an operation, and why the others cannot: pure functions of plain facts.

A capability record says what a backend takes; `explain` turns it into a list of reasons, and `choose` into a
decision. The same check answers "choose for me" and "why not?". Nothing here needs a device or keeps state.
"""

from __future__ import annotations

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


_ALL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Best first: "auto" takes the first backend without a reason against it.
CAPABILITIES: dict[str, tuple[Capability, ...]] = {
    "flash_attention": (Capability("torch", _ALL), Capability("reference", _ALL)),
    "decode_attention": (Capability("torch", _ALL), Capability("reference", _ALL)),
}


class BackendUnavailable(ValueError):
    """A backend asked for by name cannot run this call; the message lists every reason."""


def explain(op: str, *, dtype: torch.dtype, device: torch.device | str, head_dim: int) -> list[tuple[str, list[str]]]:
    """The backends of `op`, best first, each with the reasons it cannot run (an empty list: it can).

    Args:
        op: name of a public operation, for example ``"flash_attention"``.
        dtype: dtype of the inputs.
        device: device of the inputs; need not exist.
        head_dim: width of a head.

    Raises:
        ValueError: unknown operation.
    """
    if op not in CAPABILITIES:
        raise ValueError(f"op must be one of {', '.join(CAPABILITIES)}; got {op!r}")
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
        table.append((capability.backend, reasons))
    return table


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
