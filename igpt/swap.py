"""Which kernels an igpt model runs: `use_kernels`, its report, and the table that models read at call time.

A model asks `active(module, op)` in its forward: the answer is None (plain PyTorch) or a backend name for the kernel
library. Nothing is patched: the settings are plain attributes and a module-level table, which torch.compile guards, so a
compiled model follows a swap (measured on torch 2.11 and 2.13; patched methods and classes do not).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType

import torch
from torch import nn

from igpt.errors import ConfigError
from igpt_kernels import backends

OPS = ("attention", "norm", "mlp", "loss", "palette")
# What a caller may ask for, by operation. Operations without an entry have no kernel yet and stay plain PyTorch.
BACKENDS: Mapping[str, tuple[str, ...]] = {"attention": ("triton", "torch", "reference")}

Request = str | bool


# What runs, by operation: a backend name, or None for plain PyTorch. A plain dictionary, never changed once made:
# torch 2.11 cannot guard an object of a class of ours that it finds in a table or a thread's storage.
Settings = dict[str, str | None]


class _Table(threading.local):
    """The settings of this thread's innermost region; None outside any region."""

    def __init__(self) -> None:
        # On the instance from the start: torch 2.11 does not notice one that comes to hide a default of the class.
        self.region: Settings | None = None


_process: dict[str, Settings] = {"settings": {"attention": None}}
_thread = _Table()
_calls: Counter[str] = Counter()


def active(module: nn.Module, op: str) -> str | None:
    """The backend that `module` runs `op` with, or None for plain PyTorch.

    A setting of the model's own wins over this thread's region, and that over the process default.
    """
    settings: Settings | None = getattr(module, "kernels", None)
    if settings is None:
        settings = _thread.region
    if settings is None:
        settings = _process["settings"]
    backend = settings[op]
    if backend is not None and not torch.compiler.is_compiling():
        _calls[op] += 1
    return backend


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    op: str
    modules: int | None
    requested: str
    active: str
    reason: str


@dataclass
class KernelReport:
    """What `use_kernels` did. Print it; `restore()` undoes it; as a context manager it undoes itself.

    Attributes:
        rows: one for each operation.
        model: the model it was called with, or None for the process default.
    """

    rows: tuple[Row, ...]
    model: nn.Module | None
    _settings: Settings
    _before: list[tuple[nn.Module, Settings | None]] | Settings
    _calls_before: Counter[str] = field(default_factory=lambda: Counter(_calls))
    _region_before: list[Settings | None] = field(default_factory=list)
    _restored: bool = False

    def calls(self, op: str) -> int:
        """Calls of `op` through a kernel, in this process, since the swap (compiled graphs are not counted)."""
        return _calls[op] - self._calls_before[op]

    def restore(self) -> None:
        """Put back what ran before the swap. A second call does nothing."""
        if self._restored:
            return
        self._restored = True
        if isinstance(self._before, dict):
            _process["settings"] = self._before
        else:
            for module, settings in self._before:
                module.kernels = settings  # type: ignore[assignment]

    def __enter__(self) -> KernelReport:
        # A region belongs to its thread: the process default goes back at once, and only this thread keeps the setting.
        if isinstance(self._before, dict):
            self.restore()
            self._region_before.append(_thread.region)
            _thread.region = self._settings
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._region_before:
            _thread.region = self._region_before.pop()
        else:
            self.restore()

    def as_dict(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            row.op: {f.name: getattr(row, f.name) for f in fields(row)} | {"calls": self.calls(row.op)} for row in self.rows
        }

    def __str__(self) -> str:
        head = ("op", "modules", "requested", "active", "calls", "reason")
        lines = [head]
        for row in self.rows:
            modules = "all" if row.modules is None else str(row.modules)
            lines.append((row.op, modules, row.requested, row.active, str(self.calls(row.op)), row.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _facts(model: nn.Module | None) -> tuple[torch.device, torch.dtype, int]:
    """Device, dtype and head dim that a model's attention will see; without a model, this machine's best device."""
    if model is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32, 64
    weight = next(model.parameters())
    head_dim = next(getattr(module, "head_dim") for module in model.modules() if hasattr(module, "kernels"))  # noqa: B009
    return weight.device, weight.dtype, head_dim


def _explain(model: nn.Module | None) -> list[tuple[str, list[str]]]:
    device, dtype, head_dim = _facts(model)
    return backends.explain("flash_attention", dtype=dtype, device=device, head_dim=head_dim)


def _backend(op: str, request: Request, model: nn.Module | None) -> tuple[str | None, str]:
    """The setting for a request, and why it is not the one asked for (empty when it is)."""
    if request is False or request == "off":
        return None, "switched off"
    known = BACKENDS.get(op, ())
    name = "auto" if request is True else request
    if name == "auto":
        return ("auto", "") if known else (None, "no fused kernel in this version")
    if name not in known:
        return None, f"{op} has {', '.join(known) or 'no fused kernel'} in this version, not {name}"
    reasons = dict(_explain(model))[name]
    return (None, f"{name} cannot run: {', '.join(reasons)}") if reasons else (name, "")


def _runs(backend: str | None, model: nn.Module | None) -> str:
    """What a setting comes to, for the report: `auto` as the backend that it chooses."""
    return backend or "plain" if backend != "auto" else backends.choose("auto", _explain(model), "attention")


def _palette_row(request: Request) -> Row:
    from igpt_kernels import _ext

    status = _ext.status()
    reason = "exact table, always on; C++ lookup" if status.loaded else f"exact table, always on; torch lookup: {status.reason}"
    return Row("palette", None, str(request), "ext" if status.loaded else "torch", reason)


def use_kernels(
    model: nn.Module | None = None,
    *,
    attention: Request = "auto",
    norm: Request = "auto",
    mlp: Request = "auto",
    loss: Request = "auto",
    palette: Request = "auto",
    strict: bool = False,
) -> KernelReport:
    """Run a model's operations by fast kernels instead of plain PyTorch: how it is computed, never what.

    ``use_kernels()`` sets the process default, for every igpt model built already or later. ``use_kernels(model)`` sets
    one model, which then ignores the default. ``with use_kernels(...):`` does so for a region: without a model, for this
    thread only; it is undone on exit, after exceptions too, and regions nest.

    Args:
        model: an `igpt.ImageGPT`, or None for the process default.
        attention: ``"auto"``, a backend of `igpt_kernels.flash_attention` by name, or ``"off"`` / False.
        norm: ``"auto"`` or ``"off"``; this version has no fused norm.
        mlp: ``"auto"`` or ``"off"``; this version has no fused activation.
        loss: ``"auto"`` or ``"off"``; this version has no fused loss.
        palette: ``"auto"``; the palette lookup is exact on every backend and always on.
        strict: raise when an operation asked for by name does not run as asked.

    Returns:
        A report: print it, `restore()` it, or use it as a context manager. `state_dict` is untouched.

    Raises:
        ConfigError: a value that is not a backend's name, or, when strict, a request that cannot be met (all reasons).
        TypeError: `model` has no igpt attention in it.
    """
    requests: dict[str, Request] = {"attention": attention, "norm": norm, "mlp": mlp, "loss": loss, "palette": palette}
    for op, request in requests.items():
        if not isinstance(request, (str, bool)):
            raise ConfigError(f"{op} must be 'auto', 'off' or a backend's name, got {request!r}")
    modules = None
    if model is not None:
        modules = [module for module in model.modules() if hasattr(module, "kernels")] if isinstance(model, nn.Module) else []
        if not modules:
            raise TypeError(f"model must be an igpt.ImageGPT (or hold one), got {type(model).__name__}")
    chosen: dict[str, str | None] = {}
    rows, unmet = [], []
    for op in OPS[:-1]:
        backend, reason = _backend(op, requests[op], model)
        chosen[op] = backend
        count = None if modules is None else len(modules) if op in BACKENDS else 0
        rows.append(Row(op, count, str(requests[op]), _runs(backend, model), reason))
        if backend is None and requests[op] not in ("auto", "off", True, False):
            unmet.append(f"{op}: {reason}")
    rows.append(_palette_row(palette))
    if strict and unmet:
        raise ConfigError("use_kernels(strict=True) cannot be met: " + "; ".join(unmet))
    settings: Settings = {"attention": chosen["attention"]}
    before: list[tuple[nn.Module, Settings | None]] | Settings
    if modules is None:
        before = _process["settings"]
        _process["settings"] = settings
    else:
        before = [(module, getattr(module, "kernels")) for module in modules]  # noqa: B009
        for module in modules:
            module.kernels = settings  # type: ignore[assignment]
    return KernelReport(rows=tuple(rows), model=model, _settings=settings, _before=before)
