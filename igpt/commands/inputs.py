"""What the commands `sample`, `complete` and `probe` are given by name: a model, and images for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from igpt.data.sources import has_own_test_split
from igpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from igpt.commands.complete import CompleteOptions
    from igpt.commands.probe import ProbeOptions
    from igpt.data.source import Source
    from igpt.model.image_gpt import ImageGPT

Array = npt.NDArray[Any]
CHUNK, PIXELS = 512, 1 << 25
"""Images, and pixels, that are read at once, at most: 100 MB."""


def open_model(source: str, device: str, kernels: str) -> ImageGPT:
    """The model that a command names (run folder, checkpoint, pretrained folder or hub id), ready on its device.

    Args:
        source: see `igpt.training.checkpoint.resolve_model`.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        kernels: ``"auto"`` calls `igpt.use_kernels` on it; ``"off"`` leaves it plain PyTorch.

    Raises:
        ConfigError: a device that is not there.
        CheckpointError: no readable model there.
    """
    from igpt.kernels.use import use_kernels
    from igpt.machine import pick_device
    from igpt.model.image_gpt import ImageGPT
    from igpt.training.checkpoint import resolve_model

    target = pick_device(device)
    model = ImageGPT.from_pretrained(resolve_model(source), device=target)
    if kernels == "auto":
        use_kernels(model)
    return model


def check_drawing(model: ImageGPT, images: int, batch_size: int) -> None:
    """Refuse to draw so many images that the system would kill the process for it.

    Raises:
        ConfigError: with what is needed and what is free.
    """
    from igpt.machine import check_memory
    from igpt.training import memory

    need = memory.drawing(model.config, images=images, at_once=batch_size).on_device(model.device.type == "cuda")
    advice = "fewer images (--n), or fewer at once (--batch-size)"
    check_memory(f"drawing {images:,} images, {min(images, batch_size):,} at once,", need, model.device, advice)


def check_features(options: ProbeOptions, model: ImageGPT, images: int) -> None:
    """Refuse a probe for which the system would kill the process.

    Raises:
        ConfigError: with what is needed and what is free.
    """
    from igpt.evaluation.features import VOTES
    from igpt.machine import check_memory
    from igpt.training import memory

    sets = (1 + options.raw + options.untrained) * (VOTES if model.config.objective == "bert" else 1)
    at_once, kernels = options.batch_size, options.kernels == "auto"
    need = memory.features(model.config, images=images, at_once=at_once, sets=sets, kernels=kernels)
    advice = "fewer images (--max-images), or fewer at once (--batch-size)"
    what = f"a probe of {images:,} images, {min(images, at_once):,} at once,"
    check_memory(what, need.on_device(model.device.type == "cuda"), model.device, advice)


def images_to_complete(options: CompleteOptions, model: ImageGPT) -> Array:
    """At most ``options.images`` images uint8 [N, h, w, 3], or tokens int64 [N, T], drawn at random by the seed.

    If the model is a run trained on this very source, they come from the part that it held out.

    Raises:
        ConfigError, DataError: a source that cannot be read, or does not fit to the model.
    """
    from igpt.data.orders import order

    split, val_fraction, seed = _held_out(options)
    with _open(options, model, split, val_fraction, seed) as source:
        chosen = order(len(source), options.seed, 0, min(options.images, len(source)))
        return _read(source, chosen)[0]


def images_to_probe(options: ProbeOptions, model: ImageGPT) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """(images or tokens, labels) to learn from; and to test on, where the source has a test part of its own (else None).

    With ``options.max_images``, that many are drawn at random by the seed; a source with a test part of its own then gives
    the share ``options.test_fraction`` of them from that. A damaged image that the source replaces by another is left out,
    so that no image stands on both sides.

    Raises:
        ConfigError, DataError: a source without labels, one that cannot be read, or does not fit to the model.
    """
    from igpt.data.orders import order

    own = has_own_test_split(options.source)
    share = options.test_fraction if own else 0.0
    found = []
    for split, part in (("train", 1 - share), ("val", share)) if own else (("all", 1.0),):
        with _open(options, model, split, 0.1, options.seed) as source:
            if source.labels is None:
                raise DataError(
                    f"{options.source} has no labels; a probe needs them (folder:DIR takes its sub-folders as classes)"
                )
            count = len(source) if options.max_images is None else min(len(source), max(1, round(part * options.max_images)))
            check_features(options, model, count)
            chosen = np.sort(order(len(source), options.seed, 0, count))
            inputs, used = _read(source, chosen)
            _, first = np.unique(used, return_index=True)
            found.append((inputs[first], source.labels[used[first]]))
    return found[0], found[1] if own else None


def _open(options: CompleteOptions | ProbeOptions, model: ImageGPT, split: str, val_fraction: float, seed: int) -> Source:
    from igpt.data.open import open_source
    from igpt.data.tokens import TokenSource

    source = open_source(
        options.source,
        height=model.config.height,
        width=model.config.width,
        split=split,
        val_fraction=val_fraction,
        seed=seed,
        bad_images=options.bad_images,
    )
    theirs = source.palette if isinstance(source, TokenSource) else None
    if theirs is not None and model.palette is not None and not np.array_equal(theirs.colors, model.palette.colors):
        raise ConfigError(f"{options.source} was made with another palette than the model's: its tokens mean other colours")
    return source


def _read(source: Source, chosen: npt.NDArray[np.int64]) -> tuple[Array, npt.NDArray[np.int64]]:
    """Images or tokens of the indices, and the indices that were used in their place where an image is damaged."""
    from tqdm import tqdm

    if source.kind == "tokens":
        return source.tokens(chosen), chosen
    size = max(1, min(CHUNK, PIXELS // (source.height * source.width)))
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    batches = [
        source.read(part) for part in tqdm(parts, desc="reading", leave=False, disable=True if len(parts) == 1 else None)
    ]
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.indices for batch in batches])


def _held_out(options: CompleteOptions) -> tuple[str, float, int]:
    """split, val_fraction and seed of the images that the model was not trained on; its run folder tells."""
    from igpt.training.run_folder import CONFIG, read_config

    folder = Path(options.model)
    for run in (folder, folder.absolute().parent.parent):  # the run, or RUN/checkpoints/step-N
        if (run / CONFIG).is_file():
            trained = read_config(run)
            own = has_own_test_split(trained.source)
            if trained.source == options.source and (own or trained.val_fraction > 0):
                return "val", trained.val_fraction, trained.seed
    return "all", 0.1, 0
