"""`igpt sample`: draw new images from a model."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from igpt.checks import AtLeast, Between, Count, Device, Natural, Options
from igpt.training.options import Kernels


@dataclass(frozen=True)
class SampleOptions(Options):
    """Options of `igpt sample`: draw new images from a model."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    out: Path = Path("samples.png")
    """PNG grid to write; tokens go beside it as .npy."""
    n: Count = 16
    """Images."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Divides the logits; 1 is the model's own distribution, near 0 is greedy."""
    top_k: Count | None = None
    """Keep the k most likely colours of each pixel."""
    top_p: Annotated[float, Between(0, 1, low_open=True)] | None = None
    """Keep the most likely colours up to this probability."""
    batch_size: Count = 64
    """Images drawn at once."""
    seed: Natural = 0
    """Seed; the same seed draws the same images, whatever the batch size."""
    scale: Count | None = None
    """Enlargement of the pixels in the PNG; chosen by size when left out."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""


def run_sample(options: SampleOptions) -> Path:
    """The command `igpt sample`: a PNG grid with the settings inside, and the tokens beside it as .npy [n, T].

    Returns:
        The PNG.

    Raises:
        IgptError: as `sample` and `open_model`; a model without a palette; files that cannot be written.
    """
    from igpt.commands import pictures
    from igpt.commands.inputs import check_drawing, open_model
    from igpt.generation.sample import sample
    from igpt.plots import grids

    pictures.check_outputs(options.out)
    model = open_model(options.model, options.device, options.kernels)
    decode = pictures.decoder(model)
    grids.check_scale(options.scale, options.n, model.config.height, model.config.width)
    check_drawing(model, options.n, options.batch_size)
    began = time.perf_counter()
    tokens = sample(
        model,
        options.n,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
    )
    seconds = time.perf_counter() - began
    pictures.write(
        options.out,
        dataclasses.asdict(options),
        model,
        lambda: grids.grid(decode(tokens), scale=options.scale),
        tokens,
        seconds,
    )
    return options.out
