"""A module of another library whose methods ask for kernels: it gets a subclass of its class, and back.

The class, not the instance, carries the methods. So whatever shares or copies the instance's attributes runs with its own
weights: replicas of DataParallel, `copy.copy`, `torch.func.functional_call`. A `forward` that others put on the instance calls
these methods and stays. torch.compile guards the class of a module (measured on torch 2.11 and 2.13).
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from igpt.kernels import state

# Called with the method that it replaces, not bound, and with the method's own arguments.
Method = Callable[..., Any]


class Swapped:
    """First base of the classes that `install` makes."""

    kernels_base: type[nn.Module]
    """The class that the module had."""
    kernels_plain: Mapping[str, Any]
    """The methods of that class which are replaced, by name, as they were."""
    kernels_own: Mapping[str, Any]
    """What replaces them."""
    kernels: state.Settings | None
    kernels_ran: state.Settings | None
    kernels_awaited: bool

    def __init_subclass__(cls, **options: Any) -> None:
        """Without a word to the base: transformers takes a subclass for a new model."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are modules of the original class, without settings: they need not have this project."""
        make, arguments, attributes, *rest = (*super().__reduce_ex__(protocol), None)[:5]  # type: ignore[misc]
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]  # which makes the object's own class alone
            make, arguments = copyreg._reconstructor, (type(self), object, None)  # type: ignore[attr-defined]
        arguments = tuple(self.kernels_base if one is type(self) else one for one in arguments)
        if isinstance(attributes, dict):
            attributes = {name: value for name, value in attributes.items() if name not in _ATTRIBUTES}
        return make, arguments, attributes, *rest


_classes: dict[type, type[Any]] = {}
"""By the original class. The same class each time: torch.compile finds its graphs again by it."""
_ATTRIBUTES = ("kernels", "kernels_ran", "kernels_awaited", "kernels_shared")
"""What a swap sets on a module."""


def installed(module: nn.Module) -> bool:
    """Whether the module's methods ask for kernels."""
    return isinstance(module, Swapped)


def install(module: nn.Module, methods: Mapping[str, Method]) -> None:
    """Let a module run `methods` in place of those of its class. A second call does nothing."""
    if installed(module):
        return
    made = _classes.get(type(module))
    if made is None or any(vars(made)[name] is not own for name, own in made.kernels_own.items()):
        # None yet, or others have patched the last one, which was the class of a swapped module.
        made = _classes[type(module)] = _make(type(module), methods)
    state.prepare(module)
    module.__class__ = made


def _make(base: type[nn.Module], methods: Mapping[str, Method]) -> type[Any]:
    """A subclass of `base` that runs `methods`, by the name of `base`."""
    plain = {name: getattr(base, name) for name in methods}
    own = {name: _method(base, name, plain[name], methods[name]) for name in methods} | {"__init__": _constructor(base)}
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    values = {**own, **names, "kernels_base": base, "kernels_plain": plain, "kernels_own": own}
    return type(base.__name__, (Swapped, base), values)


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back, once no settings stand.

    Where gradient checkpointing may compute a forward pass again, the next one does it, see `settings_of`. A class that others
    have made of ours since stays (fully_shard, parametrize): its methods find no settings.
    """
    if not vars(module).get("kernels_awaited", False):
        _give_class_back(module)


def _give_class_back(module: nn.Module) -> None:
    base = vars(type(module)).get("kernels_base")
    if base is not None:
        module.__class__ = base
        for name in _ATTRIBUTES:
            vars(module).pop(name, None)


def settings_of(module: Any) -> state.Settings:
    """What a call of an installed module runs. The process default is for igpt's models."""
    settings: state.Settings | None = module.kernels
    if settings is None:
        settings = state.PLAIN
        if not (torch.compiler.is_compiling() or state.in_backward() or state.is_evaluation(module)):
            _give_class_back(module)
            return settings
    return state.running(module, settings)


def changed(module: Any) -> str:
    """Why the replaced methods are no longer the module's own; empty when they are."""
    base, attributes = module.kernels_base, module.__dict__
    for name, plain in module.kernels_plain.items():
        if getattr(base, name) is not plain:
            return f"{base.__name__}.{name} has been patched"
        if name != "forward" and name in attributes:
            return f"something else has replaced its {name}"
    return ""


def _constructor(base: type[nn.Module]) -> Any:
    """Of a made class: what is built by the class of a swapped module (`type(model)(config)`) is of the original class."""

    @functools.wraps(base.__init__)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        state.prepare(self)
        base.__init__(self, *args, **kwargs)
        _give_class_back(self)

    return construct


def _method(base: type[nn.Module], name: str, plain: Any, run: Method) -> Any:
    """The method that a made class has in place of `plain`, with the same signature."""

    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(base, name)
        # A forward that was kept by others from the time of the swap comes here too.
        return run(own, self, *args, **kwargs) if isinstance(self, Swapped) else own(self, *args, **kwargs)

    return method
