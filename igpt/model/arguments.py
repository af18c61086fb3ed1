"""Checks of what the model's methods are given. Each error names the argument, what came and what is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from igpt.errors import ArgumentTypeError, ConfigError
from igpt_kernels.messages import shown

_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)
LARGEST = 2**31 - 1
"""Of numbers of images: what is above fits into no memory."""


def check_tokens(tokens: Any, *, context: str, least: int, most: int, colors: int) -> Tensor:
    """Tokens as int64 [B,T], with ``least <= T <= most`` and values from 0 to ``colors - 1``; `context` says what T is.

    Raises:
        ArgumentTypeError: no tensor of integers.
        ConfigError: another shape or layout, or a value out of range.
    """
    tokens = _integers("tokens", tokens)
    if tokens.dim() != 2 or not least <= tokens.shape[1] <= most:
        raise ConfigError(f"tokens must be [B,T] with T = {context}, got {tuple(tokens.shape)}")
    if is_readable(tokens) and tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= colors:
            raise ConfigError(f"tokens must be from 0 to {colors - 1}, got {low}..{high}")
    return tokens


def check_targets(targets: Any, tokens: Tensor, colors: int) -> Tensor:
    """Targets as int64 of the shape of `tokens`: values from 0 to ``colors - 1``, or -100.

    Raises:
        ArgumentTypeError: no tensor of integers.
        ConfigError: another shape, device or layout, or a value out of range.
    """
    targets = _integers("targets", targets)
    _same("targets", targets, tokens)
    if is_readable(targets):
        wrong = targets[((targets < 0) | (targets >= colors)) & (targets != -100)]
        if wrong.numel():
            raise ConfigError(f"targets must be from 0 to {colors - 1} or -100, got {int(wrong[0])}")
    return targets


def check_mask(mask: Any, tokens: Tensor, objective: str) -> None:
    """Refuse what is no mask bool [B,T] of the shape of `tokens`, or any mask where the objective has none."""
    if mask is None:
        return
    if objective == "ar":
        raise ConfigError("mask belongs to the bert objective; this model has objective 'ar'")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ArgumentTypeError(f"mask must be a bool tensor [B,T], got {shown(mask)}")
    _strided("mask", mask)
    _same("mask", mask, tokens)


def check_generator(generator: Any) -> None:
    """Refuse what is neither a `torch.Generator` nor None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without cost: on the CPU, with no tracer, transform or fake tensor in between.

    On a GPU a look would wait for the device on every step.
    """
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not is_in_torch_dispatch_mode()
    )


def _integers(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        raise ArgumentTypeError(f"{name} must be a tensor of integers [B,T], got {shown(value)}")
    _strided(name, value)
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def _strided(name: str, value: Tensor) -> None:
    if value.is_nested or value.layout != torch.strided:
        raise ConfigError(f"{name} must be a dense tensor [B,T], got {shown(value)}")
    if is_readable(value) and value.numel() and value.untyped_storage().nbytes() == 0:
        raise ConfigError(f"{name} must hold values, got {shown(value)} whose memory was freed")


def _same(name: str, value: Tensor, tokens: Tensor) -> None:
    if value.shape != tokens.shape:
        raise ConfigError(f"{name} must have the shape of tokens {tuple(tokens.shape)}, got {tuple(value.shape)}")
    if value.device != tokens.device:
        raise ConfigError(f"{name} must be on the device of tokens ({tokens.device}), got {value.device}")
