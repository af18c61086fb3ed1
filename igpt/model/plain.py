"""Whether reading the weight of a module is the same as calling it.

Fused code reads weights: the norm that adds a residual, the loss without logits, the rows of the position table. What other
code has put on or around a module would be left out: hooks, adapters, parametrizations, offloading, a forward of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as hooks

# As they were when this module was imported: other libraries patch classes.
_FORWARD: dict[type[nn.Module], Any] = {nn.Linear: nn.Linear.forward, nn.Embedding: nn.Embedding.forward}


def remember(kind: type[nn.Module]) -> type[nn.Module]:
    """Note the forward of a class, for `is_plain`; a decorator."""
    _FORWARD[kind] = kind.forward
    return kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` and nothing more: its class, no hooks on it or on all modules, the forward of its class."""
    return (
        type(module) is kind
        and getattr(module.forward, "__func__", None) is _FORWARD[kind]
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
        and not (hooks._global_backward_hooks or hooks._global_backward_pre_hooks)
    )


def is_plain_table(module: nn.Module) -> bool:
    """Whether rows of the weight of an embedding are what calling it gives, gradients included."""
    return (
        is_plain(module, nn.Embedding)
        and is_plain_tensor(module.weight)
        and module.max_norm is None
        and module.padding_idx is None
        and not (module.scale_grad_by_freq or module.sparse)
    )


def is_plain_tensor(tensor: object) -> bool:
    """Whether kernels may read the memory of a weight: it is of no class that says itself what operations do."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)
