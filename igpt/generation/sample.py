"""Drawing images from a model, pixel by pixel with a key/value cache, and images of which a part is kept.

Letters: n drawn images, N given images, T = h·w pixels in raster order, V colours, B images drawn at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from igpt.checks import check_bool, check_int
from igpt.console import Console
from igpt.errors import ConfigError, DataError, NonFiniteError
from igpt.generation.sampler import TokenSampler, exponential_noise, stream
from igpt_kernels.messages import shown

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT
from igpt.model.inference import check_finite, check_model, evaluating
from igpt.palette.arrays import as_array

Array = npt.NDArray[Any]


def sample(
    model: ImageGPT,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Draw `n` images, one pixel after another in raster order.

    Image i is drawn with random numbers that depend on `seed` and i alone: neither the batch size nor `n` changes it.
    (Only the rounding of the logits, which may differ with the batch size, can tip a draw: 7 in ten million pixels for the
    `tiny` model with 512 colours in float32.)

    With both `top_k` and `top_p`, the k likeliest colours are renormalised before `top_p` is applied. Ties go to the lower
    token. No global random state is read or changed, nor the model's training mode: threads may share the model, and train it.

    Args:
        model: with objective ``ar``.
        n: images, at least 1.
        temperature: divides the logits; 1 is the model's own distribution, 0 always takes the likeliest colour.
        top_k: draw among the k likeliest colours only, 1..V.
        top_p: draw among the fewest likeliest colours whose probabilities sum to at least this, in (0, 1].
        seed: 0 or above.
        batch_size: images drawn at once. The cache takes ``2 · L · B · T · C`` numbers.
        progress: show a bar of pixels drawn, with images/s, on a terminal.

    Returns:
        int64 [n, T] on the CPU.

    Raises:
        ConfigError: an argument out of range (named), or a ``bert`` model, which cannot be sampled.
        TypeError: `model` is no `igpt.ImageGPT`.
        NonFiniteError: a weight is NaN or infinite (named; nothing is drawn), or a logit became so.
    """
    check_model(model)
    n = check_int("n", n, 1)
    seed = check_int("seed", seed, 0)
    batch_size, progress = check_int("batch_size", batch_size, 1), check_bool("progress", progress)
    sampler = TokenSampler(temperature, top_k, top_p, model.config.vocab_size)
    tokens = _memory(n, model.config.n_ctx)
    return _draw(model, tokens, range(model.config.n_ctx), lambda row: (seed, row), sampler, batch_size, progress)


def complete(
    model: ImageGPT,
    images_or_tokens: Tensor | Array,
    keep: str | Tensor | Array = "top-half",
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Keep a part of each image and draw the rest, in raster order.

    A drawn pixel knows the pixels before it, kept or drawn, and not the kept ones that come later. Completion j of image i
    depends on `seed`, i and j alone, as in `sample`, whose other arguments these are.

    Args:
        model: with objective ``ar``; needs a palette when images are given.
        images_or_tokens: images, uint8 [N, h, w, 3] or [h, w, 3]; or tokens, integers [N, T] or [T].
        keep: what stays: ``"top-half"`` (h // 2 rows), ``"rows:N"``, ``"pixels:N"`` (the first N in raster order); or
            booleans [h, w] or [T], True = stays.
        n: completions of each image.
        temperature, top_k, top_p, seed, batch_size, progress: as in `sample`.

    Returns:
        int64 [N, n, T] on the CPU; the kept pixels are those given.

    Raises:
        ConfigError: an argument out of range or of the wrong shape (named), or a ``bert`` model.
        NonFiniteError: as in `sample`.
    """
    check_model(model)
    config = model.config
    n = check_int("n", n, 1)
    seed = check_int("seed", seed, 0)
    batch_size, progress = check_int("batch_size", batch_size, 1), check_bool("progress", progress)
    sampler = TokenSampler(temperature, top_k, top_p, config.vocab_size)
    kept = keep_mask(keep, config.height, config.width)
    given = _as_tokens(model, images_or_tokens)
    count = len(given)
    # What is not kept is overwritten before it is read; zeroing it makes that visible if it were ever otherwise.
    known = _memory(count * n, config.n_ctx)
    known.view(count, n, -1)[:] = torch.where(torch.from_numpy(kept), given, 0)[:, None]
    free = [int(position) for position in np.flatnonzero(~kept)]
    drawn = _draw(model, known, free, lambda row: (seed, row // n, row % n), sampler, batch_size, progress)
    return drawn.view(count, n, config.n_ctx)


def keep_mask(keep: str | Tensor | Array, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The pixels that `keep` means (see `complete`), as bool [T]: True = stays.

    Raises:
        ConfigError: an unknown word, a number beyond the image, or booleans of another shape.
    """
    height, width = check_int("height", height, 1, 65536), check_int("width", width, 1, 65536)
    pixels = height * width
    if isinstance(keep, str):
        word, colon, number = keep.partition(":")
        sizes = {"rows": (width, height), "pixels": (1, pixels)}
        if keep == "top-half":
            first = height // 2 * width
        elif colon and word in sizes and number.isdecimal() and int(number) <= sizes[word][1]:
            first = int(number) * sizes[word][0]
        else:
            raise ConfigError(f"keep must be top-half, rows:0..{height}, pixels:0..{pixels} or a boolean mask, got {keep!r}")
        return np.arange(pixels) < first
    try:
        mask = as_array("keep", keep)
    except DataError as error:
        raise ConfigError(f"keep must be bool [{height}, {width}] or [{pixels}], got {shown(keep)}") from error
    if mask.dtype != np.bool_ or mask.shape not in ((height, width), (pixels,)):
        raise ConfigError(f"keep must be bool [{height}, {width}] or [{pixels}], got {mask.dtype} {list(mask.shape)}")
    return mask.reshape(pixels)


def _draw(
    model: ImageGPT,
    known: Tensor,
    free: Sequence[int],
    key: Callable[[int], tuple[int, ...]],
    sampler: TokenSampler,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Fill the positions `free` (ascending) of `known` [n, T] in place; row i draws with the numbers of ``key(i)``."""
    if model.config.objective != "ar":
        raise ConfigError("model has objective 'bert', which predicts hidden pixels and cannot draw; it needs 'ar'")
    check_finite(model)
    if not free:
        return known
    began = time.perf_counter()
    bar = Console(progress).progress(len(known) * len(free), 0, "drawing", "px", unit_scale=True)
    with evaluating(model) as model, bar:
        for start in range(0, len(known), batch_size):
            rows = known[start : start + batch_size].to(model.device)
            numbers = range(start, min(start + batch_size, len(known)))
            streams = torch.tensor([stream(*key(row)) for row in numbers], device=model.device)
            cache = model.new_cache(len(rows), free[-1] + 1)
            finite = torch.ones((), dtype=torch.bool, device=model.device)
            fed = 0
            for position in free:
                # Everything known since the last draw in one call: the kept beginning, or a kept stretch in between.
                logits = model.decode(rows[:, fed:position], cache)
                finite &= torch.isfinite(logits).all()
                rows[:, position] = sampler.choose(logits, exponential_noise(streams, position, sampler.colors))
                fed = position
                bar.update(len(rows))
                if not bar.disable:
                    speed = bar.n / len(free) / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{speed:.3g} images/s", refresh=False)
            if not bool(finite):
                raise NonFiniteError(f"the model gave NaN or infinite logits while drawing images from number {start} on")
            known[start : start + batch_size] = rows.to(known.device)
    return known


def _memory(images: int, pixels: int) -> Tensor:
    """Zeros for drawn images, int64 [n, T]. Raises `ConfigError` where they do not fit into memory."""
    try:
        return torch.zeros(images, pixels, dtype=torch.int64)
    except (RuntimeError, TypeError, OverflowError) as error:  # the last two for numbers beyond 64 bits
        raise ConfigError(f"n must be a number of images that fits into memory, got {shown(images)}") from error


def _as_tokens(model: ImageGPT, given: Tensor | Array) -> Tensor:
    """Images or tokens, as `complete` takes them, to int64 [N, T] on the CPU, never the caller's own memory."""
    config = model.config
    array = as_array("images_or_tokens", given)
    if array.ndim >= 3:
        array = array[None] if array.ndim == 3 else array
        wanted = (config.height, config.width, 3)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != wanted or not len(array):
            shape = ", ".join(map(str, wanted))
            raise ConfigError(
                f"images_or_tokens must be uint8 [N, {shape}] for this model, got {array.dtype} {list(array.shape)}"
            )
        if model.palette is None:
            raise ConfigError("images_or_tokens are images, but the model has no palette: set model.palette, or give tokens")
        return model.palette.encode(array).cpu()
    array = array[None] if array.ndim == 1 else array
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 2 or array.shape[1] != config.n_ctx or not len(array):
        raise ConfigError(
            f"images_or_tokens must be integers [N, {config.n_ctx}] or uint8 images, got {array.dtype} {list(array.shape)}"
        )
    if array.min() < 0 or array.max() >= config.vocab_size:
        low, high = array.min(), array.max()
        raise ConfigError(f"images_or_tokens must be tokens from 0 to {config.vocab_size - 1}, got {low}..{high}")
    return torch.from_numpy(array.astype(np.int64))
