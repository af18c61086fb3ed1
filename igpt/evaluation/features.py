"""Mean-pooled features of all layers, for probes: one pass of the model over the images.

Letters: N images, T pixels, L layers, C width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from igpt.console import Console
from igpt.model.inference import evaluating

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT

VOTES = 5  # masks that a bert model is evaluated with (paper, section 2.4)


def extract(
    model: ImageGPT,
    tokens: Tensor,
    *,
    raw: bool = False,
    batch_size: int = 64,
    masks: Sequence[Tensor | None] = (None,),
    progress: bool = False,
) -> dict[str, npt.NDArray[np.float32]]:
    """Features of all layers in one pass: `model.features` of every image, as float32.

    Args:
        model: any objective.
        tokens: int64 [N, T].
        raw: also give the residual stream.
        batch_size: images in a forward pass.
        masks: one pass for each; None, or bool [N, T] for ``bert``.
        progress: show a bar, on a terminal.

    Returns:
        ``"normed"`` and, with `raw`, ``"raw"``: [masks, L+1, N, C].
    """
    shape = (len(masks), model.config.n_layer + 1, len(tokens), model.config.n_embd)
    found = {name: np.empty(shape, np.float32) for name in (("normed", "raw") if raw else ("normed",))}
    residual: list[Tensor] = []
    mine = threading.get_ident()

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == mine:  # others may run the model meanwhile
            residual.append(inputs[0].mean(1))

    # The input of every block, and of ln_f, is the residual stream: reading it along the way saves a second forward pass.
    watched = [*model.blocks, model.ln_f] if raw else []
    handles = [module.register_forward_pre_hook(note) for module in watched]
    bar = Console(progress).progress(len(masks) * len(tokens), 0, "features", "image")
    try:
        with evaluating(model) as model, bar:
            for vote, mask in enumerate(masks):
                for start in range(0, len(tokens), batch_size):
                    part = slice(start, start + batch_size)
                    hidden = None if mask is None else mask[part].to(model.device)
                    residual.clear()
                    normed = model.features(tokens[part].to(model.device), mask=hidden)
                    found["normed"][vote, :, part] = normed.float().cpu().numpy()
                    if raw:
                        found["raw"][vote, :, part] = torch.stack(residual).float().cpu().numpy()
                    bar.update(normed.shape[1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def vote_masks(model: ImageGPT, count: int, seed: int) -> list[Tensor | None]:
    """The pixels hidden in each pass: nothing once for ``ar``; `VOTES` random masks bool [count, T] by `seed` for ``bert``."""
    if model.config.objective == "ar":
        return [None]
    generator = torch.Generator().manual_seed(seed)
    return [model.draw_mask(count, generator).cpu() for _ in range(VOTES)]
