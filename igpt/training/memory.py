"""How much memory a model takes, before it takes it. Imports no torch.

Letters: B images at once, T tokens of an image, C width, H heads, V colours, L layers, P parameters; numbers of float32.

- training: 4P for weights, gradients and moments.
  With kernels + B·T·(L·16C + 16C + V): what each layer keeps for its backward pass, and one that works.
  Plain + B·T·(L·(23C + H·T) + 16C + 3H·T + 2V): scores of all pairs of pixels are kept too.
- drawing: P + 2·L·B·T·C + B·(16C + 3V): weights, the cache of keys and values, one pixel that is worked on.
- features: P + B·T·14C, plain + 3·B·H·T·T: nothing is kept for a backward pass.

bfloat16 takes 0.6 of the activations, as measured. `tests/igpt/training/test_memory.py` compares with what processes take.
"""

from __future__ import annotations

from dataclasses import dataclass

from igpt.console import gibibytes
from igpt.model.config import ImageGPTConfig

FLOAT = 4
_BF16 = 0.6
_TOKEN = 48
"""Bytes for each token of a batch on the host: pixels, int64 tokens, and those of the batch that is read ahead."""
_DRAWN = 16
"""Bytes for each token of all images that are drawn: int64, and a copy."""
_IMAGE = 200
"""Bytes for each image that is drawn: its random stream's key."""
_CUDA = 1 << 30
"""On a GPU: the context, cuBLAS' workspaces and what the allocator cannot use, about a GiB."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a piece of work takes.

    Attributes:
        weights: on the device, whatever the number of images: weights, gradients, moments.
        activations: on the device, for the images that are there at once.
        images: on the host, for all images.
    """

    weights: int
    activations: int
    images: int

    def on_device(self, cuda: bool) -> int:
        """What the device must hold; the CPU's is the host's memory too."""
        return self.weights + self.activations + (_CUDA if cuda else self.images)


def parameters(config: ImageGPTConfig) -> int:
    """P of a model."""
    width, layers = config.n_embd, config.n_layer
    biases = 9 * width * layers if config.bias else 0
    tables = (config.n_ctx + 2 * config.vocab_size) * width
    return layers * (12 * width**2 + 2 * width) + biases + tables + (2 if config.objective == "ar" else 1) * width


def training(config: ImageGPTConfig, *, batch: int, part: int, bf16: bool, kernels: bool) -> Estimate:
    """What a training step takes.

    Args:
        config: the model.
        batch: images in a step.
        part: images that go through the model at once.
        bf16: under bfloat16 autocast.
        kernels: with `igpt.use_kernels`.
    """
    tokens, width = config.n_ctx, config.n_embd
    pairs = 0 if kernels else config.n_head * tokens
    kept = config.n_layer * ((16 if kernels else 23) * width + pairs)
    each = kept + 16 * width + 3 * pairs + (1 if kernels else 2) * config.vocab_size
    count = parameters(config)
    return Estimate(
        weights=4 * count * FLOAT + (2 * count if bf16 else 0),
        activations=int(part * tokens * each * FLOAT * (_BF16 if bf16 else 1)),
        images=batch * tokens * _TOKEN,
    )


def drawing(config: ImageGPTConfig, *, images: int, at_once: int) -> Estimate:
    """What drawing takes: weights, the cache of the images that are drawn at once, and all images."""
    cache = 2 * config.n_layer * config.n_ctx * config.n_embd + 16 * config.n_embd + 3 * config.vocab_size
    return Estimate(
        weights=parameters(config) * FLOAT,
        activations=min(images, at_once) * cache * FLOAT,
        images=images * (config.n_ctx * _DRAWN + _IMAGE),
    )


def features(config: ImageGPTConfig, *, images: int, at_once: int, sets: int, kernels: bool) -> Estimate:
    """What the features of all layers take.

    Args:
        config: the model.
        images: all of them.
        at_once: images in a forward pass.
        sets: how many sets of features are in memory.
        kernels: with `igpt.use_kernels`.
    """
    pairs = 0 if kernels else 3 * config.n_head * config.n_ctx
    rows = min(images, at_once)
    return Estimate(
        weights=parameters(config) * FLOAT,
        activations=rows * config.n_ctx * (14 * config.n_embd + pairs) * FLOAT,
        images=images * (config.n_ctx * _DRAWN + sets * (config.n_layer + 1) * config.n_embd * FLOAT),
    )


def training_refusal(
    config: ImageGPTConfig, *, batch: int, accumulate: int, bf16: bool, kernels: bool, cuda: bool, free: int, host: int
) -> str | None:
    """Why a training step does not fit and what would, or None when it fits.

    Args:
        config, batch, bf16, kernels: as in `training`.
        accumulate: parts of a batch.
        cuda: on a GPU.
        free: bytes free on the device.
        host: bytes free on the host.
    """

    def takes(part: int, images: int = batch) -> int:
        return training(config, batch=images, part=part, bf16=bf16, kernels=kernels).on_device(cuda)

    read = training(config, batch=batch, part=1, bf16=bf16, kernels=kernels).images
    if takes(batch // accumulate) <= free and read <= host:
        return None
    what = f"a step takes about {gibibytes(max(takes(batch // accumulate), read))}, {gibibytes(free)} are free"
    one, alone = takes(1, 1) - takes(0, 1), takes(0, 0)
    if alone > free:
        return f"{what}: weights, gradients and moments alone take {gibibytes(alone)}; a smaller model takes less (--preset)"
    if alone + one > free:
        less = ", or --kernels auto" if not kernels else ""
        return f"{what}: one image alone takes {gibibytes(alone + one)}; smaller images or a smaller model take less{less}"
    if takes(1) > free or read > host:
        most = (min(free - alone - one, host) if not cuda else host) // (config.n_ctx * _TOKEN)
        return f"{what}: --batch-size {most} --accumulate {most} is the most that fits"
    part = next(part for part in range((free - takes(0)) // one, 0, -1) if batch % part == 0)
    return f"{what}: --accumulate {batch // part} takes {gibibytes(takes(part))} for the same gradient"
