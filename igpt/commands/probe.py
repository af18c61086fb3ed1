"""`igpt probe`: how well does each layer classify?"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from igpt.checks import Above, Between, Count, Device, Natural, Options
from igpt.console import say
from igpt.errors import import_extra
from igpt.training.options import BadImages, Kernels

if TYPE_CHECKING:
    from igpt.evaluation.probe import ProbeResult


@dataclass(frozen=True)
class ProbeOptions(Options):
    """Options of `igpt probe`: how well does each layer classify? Logistic regression on mean-pooled features."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    source: str
    """Labelled images, see the sources."""
    out: Path = Path("probe")
    """Folder for probe.json and probe.png."""
    test_fraction: Annotated[float, Between(0, 1, low_open=True, high_open=True)] = 0.2
    """Share held out for testing; sources with a test split of their own use that."""
    max_images: Count | None = None
    """Images used, at most; all when left out."""
    seeds: Annotated[int, Between(1, 1000)] = 3
    """Train/test splits (or subsamples) to average over."""
    c: Annotated[float, Above(0)] = 1.0
    """Inverse L2 strength of the regression on standardised features; the paper does not state its own."""
    raw: bool = True
    """Also probe the residual stream before the norm."""
    untrained: bool = True
    """Also probe the same model before training, as a baseline."""
    batch_size: Count = 64
    """Images in a forward pass."""
    seed: Natural = 0
    """First seed."""
    device: Device = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


def run_probe(options: ProbeOptions) -> ProbeResult:
    """The command `igpt probe`: prints the table, writes `probe.json` and `probe.png` into ``options.out``.

    Raises:
        IgptError: as `linear_probe`; a source without labels; a model that cannot be read; files that cannot be written.
    """
    from igpt.commands.inputs import images_to_probe, open_model
    from igpt.commands.pictures import check_file, check_folder
    from igpt.evaluation.probe import linear_probe
    from igpt.files import replacing, write_json
    from igpt.plots import curves

    import_extra("matplotlib", "eval")
    check_folder(options.out)
    for name in ("probe.json", "probe.png"):
        check_file(options.out / name)
    model = open_model(options.model, options.device, options.kernels)
    train, test = images_to_probe(options, model)
    began = time.perf_counter()
    result = linear_probe(
        model,
        train,
        test,
        c=options.c,
        raw=options.raw,
        untrained=options.untrained,
        pixels=model.palette is not None,
        test_fraction=options.test_fraction,
        seeds=options.seeds,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
    )
    seconds = time.perf_counter() - began
    given = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(options).items()}
    write_json(options.out / "probe.json", {**result.as_dict(), "options": given, "seconds": round(seconds, 2)})
    with replacing(options.out / "probe.png") as part:
        curves.plot_probe(result, part)
    counts = "{train_images} images to learn from, {test_images} to test on, {classes} classes".format(**result.settings)
    say(f"{options.source}: {counts}\n{result.table()}\n{seconds:.1f} s: probe.json and probe.png in {options.out}")
    return result
