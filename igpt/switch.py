"""The tables that say which kernels a model runs: `igpt.swap` writes them, models read them at call time.

A module asks `active(module, op)` in its forward: the answer is None (plain PyTorch) or a backend's name for the kernel
library. Nothing is patched: settings are plain attributes, module-level dictionaries and thread-locals, which torch.compile
guards, so a compiled model follows a swap (measured on torch 2.11 and 2.13; patched methods and classes do not). Modules of
Hugging Face's ImageGPT do not ask; `igpt.hf` gives each an instance `forward` that does.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

# What runs: a backend's name or None for plain PyTorch by operation, and how (the keys behind the operations). A plain
# dictionary, never changed once made: torch 2.11 cannot guard an object of a class of ours in a table or a thread's storage.
Settings = dict[str, str | None]

OPS = ("attention", "norm", "mlp", "loss", "palette")
PLAIN: Settings = {"attention": None, "norm": None, "mlp": None, "loss": None, "token": "", "scale": None, "strict": None}


class Region(threading.local):
    """The settings of this thread's innermost region; one for all models, and one on each module that reads settings."""

    def __init__(self) -> None:
        # On the instance from the start: torch 2.11 does not notice one that comes to hide a default of the class.
        self.settings: Settings | None = None

    def __reduce__(self) -> tuple[type[Region], tuple[()]]:
        return Region, ()  # a copy or a pickle of a module is outside of its regions


_process: dict[str, Settings] = {"settings": PLAIN}
_everywhere = Region()
_defaults: list[Settings] = [PLAIN]
_own: weakref.WeakKeyDictionary[nn.Module, list[Settings | None]] = weakref.WeakKeyDictionary()
_calls: Counter[tuple[str, str]] = Counter()
_compiled: Counter[str] = Counter()
_refused: Counter[tuple[str, str, str]] = Counter()


def prepare(module: nn.Module) -> None:
    """Give a module what `settings_of` reads: settings of its own, and this thread's region."""
    module.kernels = None  # type: ignore[assignment]
    module.kernels_region = Region()  # type: ignore[assignment]


def settings_of(module: nn.Module) -> Settings:
    """What `module` runs: this thread's region of its model, else its own, else this thread's region, else the default."""
    settings: Settings | None = module.kernels_region.settings  # type: ignore[assignment,union-attr]
    if settings is None:
        settings = module.kernels  # type: ignore[assignment]
    if settings is None:
        settings = _everywhere.settings
    if settings is None:
        settings = _process["settings"]
    return settings


def active(module: nn.Module, op: str) -> str | None:
    """The backend that `module` runs `op` with, or None for plain PyTorch; counted, because the module now calls it."""
    settings = settings_of(module)
    backend = settings[op]
    if backend is not None:
        count(settings, op)
    return backend


def count(settings: Settings, op: str) -> None:
    """Count a call of `op` by a kernel, or, while torch.compile traces, a place in a compiled graph."""
    if torch.compiler.is_compiling():
        _compile_in(op)
    else:
        _calls[str(settings["token"]), op] += 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # called once, when the graph is made
def _compile_in(op: str) -> int:
    _compiled[op] += 1
    return 0


def refuse(settings: Settings, op: str, reason: str) -> None:
    """Note a call that a kernel cannot serve, and that goes the plain way; said once, and an error when strict.

    Raises:
        KernelRefused: the swap was strict.
    """
    from igpt.errors import KernelRefused

    if settings["strict"] is not None:
        raise KernelRefused(f"use_kernels(strict=True): {op} cannot run this call by {settings[op]}: {reason}")
    if torch.compiler.is_compiling():
        return
    key = (str(settings["token"]), op, reason)
    _refused[key] += 1
    if _refused[key] == 1:
        warnings.warn(f"{op} runs as plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)


def calls(settings: Settings, op: str) -> int:
    """Calls of `op` by a kernel under these settings."""
    return _calls[str(settings["token"]), op]


def compiled_in(op: str) -> int:
    """Places of `op` in graphs that torch.compile has made in this process."""
    return _compiled[op]


def refusals(settings: Settings, op: str) -> Mapping[str, int]:
    """Calls of `op` that went the plain way under these settings, by reason."""
    token = str(settings["token"])
    return {reason: number for (key, name, reason), number in _refused.items() if (key, name) == (token, op)}


class Target:
    """Where settings are put on and taken off, in any order: the newest that still stands counts.

    Args:
        regions: of the modules, or the one of all models.
    """

    def __init__(self, regions: list[Region]) -> None:
        self._regions = regions
        self._covered: list[Settings | None] = []

    def put(self, settings: Settings) -> None:
        """Make `settings` those of the target; inside a region of this thread they count there too, being newer."""
        self._covered = [region.settings for region in self._regions]
        for region in self._regions:
            if region.settings is not None:
                region.settings = settings

    def take(self, settings: Settings) -> None:
        """Take `settings` off, whichever came after them."""
        for region, before in zip(self._regions, self._covered, strict=True):
            if region.settings is settings:
                region.settings = before

    def enter(self, settings: Settings) -> list[Settings | None]:
        """Make `settings` this thread's region of the target; returns what `leave` puts back."""
        before = [region.settings for region in self._regions]
        for region in self._regions:
            region.settings = settings
        return before

    def leave(self, before: list[Settings | None]) -> None:
        """Leave the region."""
        for region, settings in zip(self._regions, before, strict=True):
            region.settings = settings


class Everything(Target):
    """All igpt models: the process default."""

    def __init__(self) -> None:
        super().__init__([_everywhere])

    def put(self, settings: Settings) -> None:
        """Make `settings` the default."""
        super().put(settings)
        _defaults.append(settings)
        _process["settings"] = settings

    def take(self, settings: Settings) -> None:
        """Take `settings` off, whichever came after them."""
        super().take(settings)
        _remove(_defaults, settings)
        _process["settings"] = _defaults[-1]


class OneModel(Target):
    """The modules of one model."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__([module.kernels_region for module in modules])  # type: ignore[misc]
        self._modules = modules

    def put(self, settings: Settings) -> None:
        """Make `settings` those of the modules."""
        super().put(settings)
        for module in self._modules:
            _own.setdefault(module, [module.kernels]).append(settings)  # type: ignore[list-item]
            module.kernels = settings  # type: ignore[assignment]

    def take(self, settings: Settings) -> None:
        """Take `settings` off, whichever came after them."""
        super().take(settings)
        for module in self._modules:
            _remove(_own[module], settings)
            module.kernels = _own[module][-1]  # type: ignore[assignment]


def _remove(stack: list[Settings] | list[Settings | None], settings: Settings) -> None:
    """Take out the entry that is `settings` itself; equal ones are other swaps."""
    for index, entry in enumerate(stack):
        if entry is settings:
            del stack[index]
            return
