"""Small models and palettes for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from igpt.palette.palette import Palette


def random_model(noise: float, seed: int = 0, **config: Any) -> ImageGPT:
    """A model for evaluation whose every weight is random: the gains and the output matrix too, which begin equal or small.

    Args:
        noise: standard deviation of what is added to each weight.
        seed: of that noise.
        config: fields of `ImageGPTConfig`.
    """
    model = ImageGPT(ImageGPTConfig.from_dict(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def greys(count: int) -> Palette:
    """Black to white in equal steps."""
    return Palette(np.repeat(np.linspace(0, 255, count)[:, None], 3, axis=1))
