"""The settings that say which kernels a model runs: `igpt.kernels.use` writes them, models read them at call time.

A module asks `active(module, op)` in its forward: the answer is None (plain PyTorch) or a backend's name for the kernel
library. Nothing is patched: settings are plain attributes and module-level dictionaries, which torch.compile guards. So a
compiled model follows a swap (measured on torch 2.11 and 2.13; patched methods and classes do not). Modules of Hugging Face's
ImageGPT do not ask; `igpt.kernels.huggingface` gives each an instance `forward` that does.

Settings belong to a model or to the process, never to a thread: autograd runs backward on threads of its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# What runs: a backend's name or None for plain PyTorch by operation, and how (the keys behind the operations). A plain
# dictionary, never changed once made: torch 2.11 cannot guard an object of a class of ours.
Settings = dict[str, str | None]

OPS = ("attention", "norm", "mlp", "loss", "palette")
PLAIN: Settings = {**dict.fromkeys(OPS), "swap_id": "", "scale": None, "strict": None}

_process: dict[str, Settings] = {"settings": PLAIN}
_defaults: list[Settings] = [PLAIN]
_own: weakref.WeakKeyDictionary[Any, list[Settings]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_calls: Counter[tuple[str, str]] = Counter()
_compiled: Counter[str] = Counter()
_refused: Counter[tuple[str, str, str]] = Counter()


class Swappable:
    """Has settings of its own, once `prepare` was called. Copies and pickles do not take them along."""

    kernels: Settings | None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "kernels"} | {"kernels": None}


def prepare(owner: Swappable) -> None:
    """Give an object the attribute that `settings_of` reads.

    On the instance from the start: torch 2.11 does not notice one that comes to hide a default of the class.
    """
    owner.kernels = None


def settings_of(owner: Any) -> Settings:
    """What a module (or palette) runs: its own settings, else those of the process."""
    own: Settings | None = owner.kernels
    return _process["settings"] if own is None else own


def active(owner: Any, op: str) -> str | None:
    """The backend that a module runs `op` with, or None for plain PyTorch; counted, because the module now calls it."""
    settings = settings_of(owner)
    backend = settings[op]
    if backend is not None:
        count(settings, op)
    return backend


def count(settings: Settings, op: str) -> None:
    """Count a call of `op` by a kernel, or, while torch.compile traces, a place in a compiled graph."""
    if torch.compiler.is_compiling():
        _compile_in(op)
    else:
        _calls[str(settings["swap_id"]), op] += 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # called once, when the graph is made
def _compile_in(op: str) -> int:
    _compiled[op] += 1
    return 0


def refuse(settings: Settings, op: str, reason: str) -> None:
    """Note a call that a kernel cannot run, and that goes the plain way; warned of once, and an error when strict.

    Raises:
        KernelRefused: the swap was strict.
    """
    from igpt.errors import KernelRefused

    if settings["strict"] is not None:
        raise KernelRefused(f"use_kernels(strict=True): {op} cannot run this call by {settings[op]}: {reason}")
    if torch.compiler.is_compiling():
        return
    key = (str(settings["swap_id"]), op, reason)
    _refused[key] += 1
    if _refused[key] == 1:
        warnings.warn(f"{op} runs as plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)


def calls(settings: Settings, op: str) -> int:
    """Calls of `op` by a kernel under these settings."""
    return _calls[str(settings["swap_id"]), op]


def compiled_in(op: str) -> int:
    """Places of `op` in graphs that torch.compile has made in this process."""
    return _compiled[op]


def refusals(settings: Settings, op: str) -> Mapping[str, int]:
    """Calls of `op` that went the plain way under these settings, by reason."""
    swap_id = str(settings["swap_id"])
    return {reason: number for (key, name, reason), number in _refused.items() if (key, name) == (swap_id, op)}


def put(settings: Settings, owners: Sequence[Any] | None) -> None:
    """Make `settings` the newest of the modules, or of the process when None."""
    with _lock:
        if owners is None:
            _defaults.append(settings)
            _process["settings"] = settings
        for owner in owners or ():
            _own.setdefault(owner, []).append(settings)
            owner.kernels = settings


def take(settings: Settings, owners: Sequence[Any] | None) -> None:
    """Take `settings` off, whichever came after them: the newest that still stands counts."""
    with _lock:
        if owners is None:
            _remove(_defaults, settings)
            _process["settings"] = _defaults[-1]
        for owner in owners or ():
            stack = _own[owner]
            _remove(stack, settings)
            owner.kernels = stack[-1] if stack else None
            if not stack:
                del _own[owner]


def _remove(stack: list[Settings], settings: Settings) -> None:
    """Remove the entry that is `settings` itself; equal ones are other swaps."""
    del stack[next(index for index, entry in enumerate(stack) if entry is settings)]
