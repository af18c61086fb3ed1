"""The baseline of pretraining: how often each colour stands at each position."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from igpt.errors import ConfigError


def histogram_baseline(
    train_tokens: Tensor | Iterable[Tensor], val_tokens: Tensor, vocab: int, *, mask: Tensor | None = None
) -> float:
    """What a model would reach that knows only how often each colour stands at each position: nats per pixel.

    ``-mean log((count[t, v] + 1) / (n + V))``: counts over the training images, add-one smoothing, the mean over all
    pixels of the validation images.

    Args:
        train_tokens: int [n,T], or batches of them.
        val_tokens: int [N,T].
        vocab: V.
        mask: bool [N,T]; only these pixels are counted, first over each image, then over images that have any: the loss of
            the bert objective.

    Raises:
        ConfigError: no images, or other numbers of positions.

    Cost: ``8 · T · V`` bytes.
    """
    positions = val_tokens.shape[1]
    offsets = torch.arange(positions) * vocab
    counts = torch.zeros(positions * vocab, dtype=torch.float64)
    images = 0
    for batch in [train_tokens] if isinstance(train_tokens, Tensor) else train_tokens:
        if batch.dim() != 2 or batch.shape[1] != positions:
            raise ConfigError(f"train_tokens must be [n,{positions}] like val_tokens, got {tuple(batch.shape)}")
        counts += torch.bincount((batch.long() + offsets).flatten(), minlength=positions * vocab)
        images += len(batch)
    if images == 0 or len(val_tokens) == 0:
        raise ConfigError(f"a histogram needs images on both sides, got {images} and {len(val_tokens)}")
    nats = math.log(images + vocab) - torch.log1p(counts)
    total = weight = 0.0
    for start in range(0, len(val_tokens), 256):  # [256,T] float64 at a time
        found = nats[val_tokens[start : start + 256].long() + offsets]
        hidden = None if mask is None else mask[start : start + 256]
        if hidden is None:
            total, weight = total + float(found.mean(1).sum()), weight + len(found)
        else:
            seen = hidden.sum(1)
            total += float(((found * hidden).sum(1) / seen.clamp(min=1)).sum())
            weight += int((seen > 0).sum())
    return total / max(weight, 1.0)
