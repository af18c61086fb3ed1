"""The optimizer of a run: Adam in groups, and the learning rate of each step as a pure function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from igpt.errors import ConfigError

# Tables that weight decay would pull towards zero without making the model simpler: a position is used as it is added.
_NEVER_DECAYED = ("wpe.weight",)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float = 0.0) -> float:
    """The learning rate of update `step`, counted from 0: a linear rise to `peak`, then half a cosine down.

    ``peak·(step+1)/warmup`` for step < warmup, then ``peak·(final + (1-final)·(1+cos(π·t))/2)`` with
    ``t = (step-warmup)/(steps-warmup)``. It is `peak` at ``step = warmup`` and would be ``peak·final`` at ``step = steps``,
    where it stays. Warm-up of one epoch and a cosine to 0 are the paper's (Chen et al. 2020, appendix A).

    Args:
        step: updates made so far.
        peak: highest rate.
        warmup: updates of linear rise; 0 starts at the peak.
        steps: updates of the whole run.
        final: rate at the end, as a share of `peak`.

    Raises:
        ConfigError: `step` is negative, or `warmup` does not lie between 0 and `steps`.
    """
    if step < 0:
        raise ConfigError(f"step must not be negative, got {step}")
    if not 0 <= warmup <= steps:
        raise ConfigError(f"warmup must be from 0 to steps ({steps}), got {warmup}")
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min((step - warmup) / (steps - warmup), 1.0) if steps > warmup else 1.0
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups: matrices with `weight_decay`; gains, biases, positions and start vector without.

    Both keep the order of ``model.named_parameters()``, so that groups made twice are equal. An empty group is left out.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and not name.endswith(_NEVER_DECAYED)
            (decayed if matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, *, lr: float, beta1: float = 0.9, beta2: float = 0.95, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; without decay that is Adam, which is what the paper used.

    On CUDA the update is one fused kernel, element by element and therefore as repeatable as the plain one; elsewhere
    torch's default. β2 is 0.95, because 0.999 gave loss spikes in the paper.

    Raises:
        ConfigError: the model has nothing to train.
    """
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ConfigError("the model has no parameter that requires a gradient")
    on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8, fused=True if on_cuda else None)
