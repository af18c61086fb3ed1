"""The settings that say which kernels a model runs: `igpt.kernels.use` writes them, models read them at call time.

A module asks `active(module, op)` in its forward: the answer is None (plain PyTorch) or a backend's name for the kernel
library. Nothing is patched: settings are plain attributes and module-level dictionaries, which torch.compile guards. So a
compiled model follows a swap (patched methods do not: torch 2.11 and 2.13). Modules of Hugging Face's ImageGPT do not ask;
`igpt.kernels.classes` gives each a class that does.

Settings belong to a model or to the process, never to a thread: autograd runs backward on threads of its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
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
_warned: set[tuple[str, str, str]] = set()
"""What has been warned of: of a swap once, of graphs of torch.compile once since the newest swap."""


class Swappable:
    """Has settings of its own, once `prepare` was called. Copies and pickles do not take them along."""

    kernels: Settings | None
    kernels_ran: Settings | None
    kernels_awaited: bool

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # a module's leaves out what `module.compile()` made
        attributes: dict[str, Any] = vars(self) if inherited is None else inherited()
        return attributes | {"kernels": None, "kernels_ran": None, "kernels_awaited": False}


def prepare(owner: Any) -> None:
    """Give an object the attributes that `settings_of` and `running` read.

    On the instance from the start: torch 2.11 does not notice one that comes to hide a default of the class.
    """
    owner.kernels = None
    owner.kernels_ran = None
    owner.kernels_awaited = False


def settings_of(owner: Any) -> Settings:
    """What a module (or palette) runs: its own settings, else those of the process."""
    own: Settings | None = owner.kernels
    return _process["settings"] if own is None else own


def running(owner: Any, settings: Settings) -> Settings:
    """The settings of a call: `settings`, or inside of a backward pass those of the owner's last forward pass.

    Gradient checkpointing computes a forward pass again there. It must save the same tensors, also where a region has begun or
    ended in between, or something was evaluated. Graphs of torch.compile do that by themselves.
    """
    if torch.compiler.is_compiling():
        return settings
    attributes = vars(owner)
    if in_backward():
        return attributes.get("kernels_ran") or PLAIN
    if _may_run_again(attributes.get("training", False)):
        attributes["kernels_awaited"] = True
    elif is_evaluation(owner):
        return settings
    if attributes.get("kernels_ran") is not settings:
        attributes["kernels_ran"] = settings
    return settings


def is_evaluation(owner: Any) -> bool:
    """Whether a call is none of those whose backward pass may compute it again, while one of the owner's may come."""
    return not torch.is_grad_enabled() and vars(owner).get("kernels_awaited", False) and not vars(owner).get("training", False)


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def _may_run_again(training: bool) -> bool:
    """Whether a backward pass may compute this forward pass again, as gradient checkpointing does.

    It saves tensors by hooks, or (reentrant) runs what is in training without gradients.
    """
    if not torch.is_grad_enabled():
        return training
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def active(owner: Any, op: str) -> str | None:
    """The backend that a module runs `op` with, or None for plain PyTorch; counted, because the module now calls it."""
    settings = running(owner, settings_of(owner))
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
        _note_in_graph(op, reason)  # not the swap's number: a graph that depends on it would be made again by each swap
    else:
        _note(str(settings["swap_id"]), op, reason)


def _note(swap_id: str, op: str, reason: str) -> None:
    _refused[swap_id, op, reason] += 1
    if (swap_id, op, reason) not in _warned:
        _warned.add((swap_id, op, reason))
        warnings.warn(f"{op} runs as plain PyTorch: {reason}", RuntimeWarning, stacklevel=5)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # called once, when the graph is made
def _note_in_graph(op: str, reason: str) -> int:
    _note("", op, reason)
    return 0


def calls(settings: Settings, op: str) -> int:
    """Calls of `op` by a kernel under these settings."""
    return _calls[str(settings["swap_id"]), op]


def compiled_in(op: str) -> int:
    """Places of `op` in graphs that torch.compile has made in this process."""
    return _compiled[op]


def refusals(settings: Settings | None, op: str) -> Counter[str]:
    """Calls of `op` that went the plain way under these settings, by reason; with None, places in graphs of torch.compile."""
    swap_id = "" if settings is None else str(settings["swap_id"])
    return Counter({reason: number for (key, name, reason), number in _refused.items() if (key, name) == (swap_id, op)})


def put(settings: Settings, owners: Sequence[Any] | None) -> None:
    """Make `settings` the newest of the modules, or of the process when None."""
    with _lock:
        _warned.difference_update([key for key in _warned if not key[0]])
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
            _defaults[:] = _without(_defaults, settings)
            _process["settings"] = _defaults[-1]
        for owner in owners or ():
            stack = _own[owner] = _without(_own.get(owner, []), settings)
            owner.kernels = stack[-1] if stack else None
            if not stack:
                del _own[owner]


def stands(owner: Any) -> bool:
    """Whether an owner has settings of its own that were not taken off."""
    return owner in _own


def _without(stack: list[Settings], settings: Settings) -> list[Settings]:
    """The entries but `settings` itself; equal ones are other swaps."""
    return [entry for entry in stack if entry is not settings]
