"""A model in evaluation: its modes, whether its weights are finite, and the unit of its losses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from igpt.errors import NonFiniteError
from igpt.model.config import ImageGPTConfig


def check_finite(model: torch.nn.Module) -> None:
    """Raise `NonFiniteError` naming the first weight or buffer of `model` that holds a NaN or an infinity."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}; the model is broken")


def check_model(model: object) -> None:
    """Raise `TypeError` unless `model` is an `igpt.ImageGPT`, or one compiled."""
    if not isinstance(getattr(model, "config", None), ImageGPTConfig):
        raise TypeError(f"model must be an igpt.ImageGPT, got {type(model).__name__}")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and `torch.inference_mode` inside; every module's own training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


BITS = 1.0 / math.log(2.0)  # bits in a nat
