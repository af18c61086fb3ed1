"""`igpt complete`: keep a part of real images, and let the model draw the rest."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from igpt.checks import AtLeast, Between, Count, Device, Natural, Options
from igpt.training.options import BadImages, Kernels


@dataclass(frozen=True)
class CompleteOptions(Options):
    """Options of `igpt complete`: keep a part of real images, and let the model draw the rest."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    source: str
    """Images: a picture file, or a source."""
    out: Path = Path("completions.png")
    """PNG to write: each row is original, kept part, completions."""
    images: Count = 8
    """How many images of the source."""
    n: Count = 3
    """Completions of each."""
    keep: str = "top-half"
    """top-half, rows:N (N rows), pixels:N (N pixels in raster order), or a .npy file of booleans [height, width]."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Divides the logits."""
    top_k: Count | None = None
    """Keep the k most likely colours of each pixel."""
    top_p: Annotated[float, Between(0, 1, low_open=True)] | None = None
    """Keep the most likely colours up to this probability."""
    batch_size: Count = 64
    """Images drawn at once."""
    seed: Natural = 0
    """Seed of the choice of images and of the drawing."""
    scale: Count | None = None
    """Enlargement of the pixels in the PNG; chosen by size when left out."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


def run_complete(options: CompleteOptions) -> Path:
    """The command `igpt complete`: a PNG of originals, kept parts and completions, and the tokens as .npy [N, n, T].

    The images are drawn at random (by `seed`) from the source; see `igpt.commands.inputs.images_to_complete`.

    Returns:
        The PNG.

    Raises:
        IgptError: as `complete` and `open_model`; a source that cannot be read; files that cannot be written.
    """
    import numpy as np
    import torch

    from igpt.commands import pictures
    from igpt.commands.inputs import check_drawing, images_to_complete, open_model
    from igpt.generation.sample import complete, keep_mask
    from igpt.plots import grids

    pictures.check_outputs(options.out)
    model = open_model(options.model, options.device, options.kernels)
    decode = pictures.decoder(model)
    shape = (model.config.height, model.config.width)
    keep: str | np.ndarray = options.keep
    if options.keep.endswith(".npy"):
        from igpt.files import open_npy

        keep = np.array(open_npy(Path(options.keep), ndim=2, kinds="b"))
    mask = keep_mask(keep, *shape).reshape(shape)
    given = images_to_complete(options, model)
    grids.check_scale(options.scale, len(given) * (2 + options.n), *shape, columns=2 + options.n)
    check_drawing(model, len(given) * options.n, options.batch_size)
    began = time.perf_counter()
    tokens = complete(
        model,
        given,
        mask,
        n=options.n,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
    )
    seconds = time.perf_counter() - began
    originals = given if given.ndim == 4 else decode(torch.from_numpy(given))
    pictures.write(
        options.out,
        dataclasses.asdict(options),
        model,
        lambda: grids.completion_grid(originals, mask, decode(tokens), scale=options.scale),
        tokens,
        seconds,
    )
    return options.out
