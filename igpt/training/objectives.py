"""The objectives: which pixels a step hides, and the loss in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT

Purpose = Literal["training", "validation"]


def draw_mask(model: ImageGPT, seed: int, what: Purpose, step: int, images: int) -> Tensor | None:
    """The pixels that the bert objective masks in a step: bool [images,T] on the CPU; None for the ar objective.

    Drawn for the whole batch, by (seed, what, step) alone.
    """
    if model.config.objective == "ar":
        return None
    seeds = np.random.SeedSequence([seed, {"training": 0, "validation": 1}[what], step])
    generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    return model.draw_mask(images, generator).cpu()


def losses(model: ImageGPT, tokens: Tensor, mask: Tensor | None, size: int, *, bf16: bool) -> Iterator[Tensor]:
    """The loss in parts of `size` images, weighted: the parts (and their gradients) add up to that of all.

    Args:
        model: computes ``model(tokens, tokens, mask=mask).loss``.
        tokens: int [N,T], on any device.
        mask: bool [N,T], or None.
        size: images in a part.
        bf16: compute under bfloat16 autocast.
    """
    device = model.device
    images = torch.ones(len(tokens)) if mask is None else mask.any(1)  # an image without a masked pixel has no loss
    whole = max(int(images.sum()), 1)
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size].to(device, torch.int64, non_blocking=True)
        masked = None if mask is None else mask[start : start + size].to(device, non_blocking=True)
        share = int(images[start : start + size].sum()) / whole
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss: Tensor = model(part, part, mask=masked).loss
        yield loss * share
