"""A model in evaluation: without a change of its mode, whether its weights are finite, and the unit of its losses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import nn

from igpt.errors import ArgumentTypeError, ConfigError, NonFiniteError
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import Attention, Block, ImageGPT, RMSNorm
from igpt.model.plain import is_plain_tensor
from igpt_kernels.messages import shown

M = TypeVar("M", bound=nn.Module)
# These compute the same in training and in evaluation.
_MODELESS = {Attention, Block, ImageGPT, RMSNorm, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList, nn.Sequential}


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a weight or buffer that holds a NaN or an infinity, or that has no values at all.

    What accelerate offloads, and tensors of classes that cannot say, are left out.

    Raises:
        NonFiniteError: names the first such weight.
        ConfigError: a weight on the device "meta".
    """
    for prefix, module in model.named_modules():
        for name, tensor in [
            *module.named_parameters(prefix, recurse=False),
            *module.named_buffers(prefix, recurse=False),
        ]:
            if tensor.is_meta:
                if not hasattr(module, "_hf_hook"):
                    raise ConfigError(f"model has no values yet: {name} is on the device meta; load weights first")
                continue
            try:
                finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
            except (NotImplementedError, RuntimeError, TypeError):  # float8; subclasses of Tensor
                continue
            if not finite:
                bad = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}; the model is broken")


def check_model(model: object) -> None:
    """Raise `ArgumentTypeError` unless `model` is an `igpt.ImageGPT`, or one compiled or wrapped."""
    wrapped = isinstance(model, nn.Module) and callable(getattr(model, "decode", None))
    if not wrapped or not isinstance(getattr(model, "config", None), ImageGPTConfig):
        raise ArgumentTypeError(f"model must be an igpt.ImageGPT, got {shown(type(model).__name__)[1:-1]}")


@contextlib.contextmanager
def evaluating(model: M) -> Iterator[M]:
    """`torch.inference_mode` inside, and the model to use there: in evaluation mode, while `model` keeps its own mode.

    Other threads may train or evaluate `model` meanwhile: nothing of it is changed, so nothing has to be put back. What is
    used is `model` itself where no module of it depends on the mode. Else, as with the dropout of a LoRA, it is a view:
    copies of the modules in evaluation mode, with the same weights, buffers and hooks. Hooks get the copies.

    Raises:
        ConfigError: a view is needed, but a module has a forward of its own (accelerate) or is scripted; names it.
    """
    # Views of a subclass of Tensor cannot be made in inference mode (pytorch 2.13: "Cannot set version_counter").
    plain = all(is_plain_tensor(weight) for weight in model.parameters())
    with torch.inference_mode() if plain else torch.no_grad():
        yield _in_evaluation(model)


def _in_evaluation(model: M) -> M:
    depends = [
        module
        for module in model.modules()
        if module.training
        and (type(module) not in _MODELESS or module._forward_hooks or module._forward_pre_hooks)
        and not _is_compiled(module)
    ]
    if not depends:
        return model
    for name, module in model.named_modules():
        own = "forward" in vars(module) and not _is_compiled(module)
        if own or isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"model is in training mode, and its module {name or type(module).__name__} has a forward of its own; "
                "call model.eval() first"
            )
    return cast(M, _view(model, {}))


def _is_compiled(module: nn.Module) -> bool:
    """Whether this is what torch.compile puts around a module."""
    return "_orig_mod" in module._modules


def _view(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module and those below it in evaluation mode, which shares everything else."""
    if _is_compiled(module):
        return _view(cast(nn.Module, module._orig_mod), made)  # its graphs are those of training mode
    if module not in made:
        view = made[module] = object.__new__(type(module))
        children = {name: None if child is None else _view(child, made) for name, child in module._modules.items()}
        vars(view).update(vars(module), training=False, _modules=children, _compiled_call_impl=None)
    return made[module]


BITS = 1.0 / math.log(2.0)  # bits in a nat
