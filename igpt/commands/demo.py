"""`igpt demo`: the whole main job on real data in minutes, and one page that shows what came of it.

Every part is the command that a user would type (the page prints them); only the page itself is made here.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from igpt.checks import Count, Natural, Options
from igpt.commands import info
from igpt.commands.complete import CompleteOptions
from igpt.commands.probe import ProbeOptions
from igpt.commands.sample import SampleOptions
from igpt.console import say
from igpt.errors import ConfigError, import_extra
from igpt.files import make_folder, replacing, write_text
from igpt.plots.page import Section, page
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import RunLock

if TYPE_CHECKING:
    import torch

    from igpt.evaluation.probe import ProbeResult
    from igpt.training.loop import TrainResult

MARKER = ".igpt-demo"


@dataclass(frozen=True)
class DemoOptions(Options):
    """Options of `igpt demo`: the whole main job on real data, and one page that shows it."""

    out: Path = Path("runs/demo")
    """Folder for the run and report.html."""
    steps: Count = 1200
    """Pretraining steps."""
    fresh: bool = True
    """Start over; --no-fresh continues an interrupted demo."""
    seed: Natural = 0
    """Seed of everything."""


def run_demo(options: DemoOptions) -> Path:
    """Palette, pretraining, samples, completions, probe; returns ``out/report.html``.

    Raises:
        ConfigError: `out` holds files that no demo wrote, or takes none.
        CheckpointError: another demo trains in `out`.
        MissingExtra: scikit-learn or matplotlib is not installed.
    """
    import_extra("sklearn", "eval")
    import_extra("matplotlib", "eval")
    began = time.perf_counter()
    out = _prepare(options)
    sections, headline = [], []
    for title, part in (
        ("palette", _palette),
        ("pretraining", _pretrain),
        ("samples", _samples),
        ("completions", _completions),
        ("probe", _probe),
        ("attention", _attention),
    ):
        say(f"\n== {title}")
        section, claim = part(out, options)
        sections.append(section)
        headline.append(claim)
    report = out / "report.html"
    seconds = time.perf_counter() - began
    write_text(report, page("Image GPT, trained a moment ago", sections, headline, seconds, info.collect()))
    say("\n" + "\n".join(headline) + f"\n{seconds:.0f} s in all; open {report}")
    return report


def _prepare(options: DemoOptions) -> Path:
    from igpt.commands.pictures import check_file, check_folder

    out = options.out
    check_folder(out)
    check_file(out / "report.html")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ConfigError(f"out: {out} holds files that no demo wrote; name an empty or new folder")
    if options.fresh and (out / "run").exists():
        with RunLock(out / "run"):  # refuses where another demo trains
            shutil.rmtree(out / "run")
    make_folder(out)
    (out / MARKER).touch()
    return out


def _palette(out: Path, options: DemoOptions) -> tuple[Section, str]:
    """A real photograph through 512 learned colours, and through 512 evenly spaced ones."""
    from igpt.palette.palette import Palette
    from igpt.plots.grids import before_after

    photo = import_extra("sklearn.datasets", "eval").load_sample_image("china.jpg")
    uniform = Palette.uniform(512).error(photo)
    palette = Palette.fit(photo[None], 512, max_pixels=60_000, seed=options.seed)
    error = palette.error(photo)
    palette.save(out / "palette")
    picture = out / "photo.png"
    with replacing(picture) as part:
        before_after(photo, palette).save(part, format="PNG")
    start = time.perf_counter()
    palette.encode(photo)
    rate = photo.shape[0] * photo.shape[1] / (time.perf_counter() - start) / 1e6
    text = (
        f"A {photo.shape[1]} × {photo.shape[0]} photograph, one token per pixel: the nearest of 512 colours learned from it by "
        f"k-means. Learned palette: {error}. Evenly spaced 8×8×8 palette: {uniform}. The lookup is exact for each of the "
        f"16,777,216 colours; this picture went through it at {rate:.0f} million pixels/s."
    )
    section = Section("A photograph as tokens", "igpt palette photos:DIR --k 512", text, ((picture, ""),))
    return section, f"palette      512 colours, {error} (evenly spaced: {uniform})"


def _pretrain(out: Path, options: DemoOptions) -> tuple[Section, str]:
    """An Image GPT on the 1,797 digits of scikit-learn."""
    from igpt.plots.curves import plot_loss
    from igpt.training.pretrain import pretrain

    settings = PretrainOptions(
        source="digits",
        out=out / "run",
        steps=options.steps,
        batch_size=32,
        n_layer=6,
        n_head=4,
        n_embd=96,
        lr=0.003,
        weight_decay=0.1,
        warmup=min(50, options.steps // 10),
        val_every=max(options.steps // 12, 1),
        checkpoint_every=max(options.steps // 3, 1),
        sample_every=max(options.steps // 3, 1),
        seed=options.seed,
        resume=not options.fresh and (out / "run").exists(),
    )
    start = time.perf_counter()
    result = pretrain(settings)
    if result.stopped_by is not None:
        # What was trained is kept; igpt's command line turns this into the exit code that shells expect of a signal.
        raise SystemExit(128 + result.stopped_by)
    seconds = time.perf_counter() - start
    curve = out / "loss.png"
    with replacing(curve) as part:
        plot_loss(out / "run" / "metrics.jsonl", part)
    ours, baseline = _bits(result)
    text = (
        f"{result.parameters:,} parameters, {result.step} steps on nine tenths of 1,797 real 8×8 digits, in {seconds:.0f} s. "
        f"On the digits held out: <b>{ours:.3f} bits per pixel</b>; a histogram of each pixel position, without any context, "
        f"needs {baseline:.3f}."
    )
    command = (
        f"igpt pretrain digits --out {settings.out} --steps {settings.steps} "
        f"--batch-size {settings.batch_size} --n-embd {settings.n_embd} --weight-decay {settings.weight_decay} "
        f"--warmup {settings.warmup}"
    )
    section = Section("Pretraining", command, text, ((curve, "Loss on training and held-out digits."),))
    return section, f"pretraining  {ours:.3f} bits per pixel on held-out digits, histogram baseline {baseline:.3f}"


def _bits(result: TrainResult) -> tuple[float, float]:
    """Bits per pixel of the last validation and of its histogram baseline."""
    if result.val_loss is None or result.histogram_loss is None:
        raise ConfigError("steps is too small for a validation; give the demo at least 1")
    from igpt.model.inference import BITS

    return result.val_loss * BITS, result.histogram_loss * BITS


def _samples(out: Path, options: DemoOptions) -> tuple[Section, str]:
    from igpt.commands.sample import run_sample

    settings = SampleOptions(model=str(out / "run"), out=out / "samples.png", n=64, seed=options.seed)
    start = time.perf_counter()
    run_sample(settings)
    rate = settings.n / (time.perf_counter() - start)
    text = (
        "Digits that the model drew, pixel after pixel, from nothing: temperature 1, no top-k, none left out. "
        f"{rate:.0f} images/s with a key-value cache."
    )
    command = f"igpt sample {settings.model} --n {settings.n} --out {settings.out}"
    return Section("Samples", command, text, ((settings.out, ""),)), f"samples      {settings.out}"


def _completions(out: Path, options: DemoOptions) -> tuple[Section, str]:
    from igpt.commands.complete import run_complete

    settings = CompleteOptions(
        model=str(out / "run"), source="digits", out=out / "completions.png", images=10, n=6, seed=options.seed
    )
    run_complete(settings)
    text = "Digits it has never seen: the original, the upper half that it was given, and six ways it went on."
    command = f"igpt complete {settings.model} digits --images {settings.images} --n {settings.n} --out {settings.out}"
    return Section("Completions", command, text, ((settings.out, ""),)), f"completions  {settings.out}"


def _probe(out: Path, options: DemoOptions) -> tuple[Section, str]:
    from igpt.commands.probe import run_probe

    settings = ProbeOptions(model=str(out / "run"), source="digits", out=out / "probe", seed=options.seed, raw=False)
    result = run_probe(settings)
    best, untrained, pixels = _accuracies(result)
    text = (
        "Logistic regression on the mean over pixels of each layer's features: a model that only learned to draw tells digits "
        f"apart. Best layer {result.best_layer}: <b>{best:.1f} %</b>; the best layer of the same model before training: "
        f"{untrained:.1f} %; raw pixels: {pixels:.1f} %. Ten classes; mean of {settings.seeds} splits."
    )
    picture = settings.out / "probe.png"
    command = f"igpt probe {settings.model} digits --out {settings.out}"
    section = Section("What each layer knows", command, text, ((picture, ""),), table=result.table())
    return (
        section,
        f"probe        best layer {result.best_layer}: {best:.1f} %, untrained {untrained:.1f} %, raw pixels {pixels:.1f} %",
    )


def _accuracies(result: ProbeResult) -> tuple[float, float, float]:
    """Percent correct: best layer, best layer of the untrained model, raw pixels."""
    nothing = float("nan")
    untrained = nothing if result.untrained is None else float(result.untrained.mean(axis=0).max())
    pixels = nothing if result.pixels is None else float(result.pixels.mean())
    return 100 * float(result.normed.mean(axis=0).max()), 100 * untrained, 100 * pixels


def _attention(out: Path, options: DemoOptions) -> tuple[Section, str]:
    """One attention layer, forward and backward, at growing images: plain, by the kernel of `use_kernels`, and sparse."""
    import torch

    from igpt.model.image_gpt import plain_attention
    from igpt_kernels import block_sparse_attention, flash_attention, layouts

    rows = ["image    tokens  plain, ms  kernel, ms  ratio  sparse, ms  ratio"]
    ratios = (0.0, 0.0)
    generator = torch.Generator().manual_seed(options.seed)
    for side in (16, 32, 48, 64):
        inputs = [torch.randn(1, 4, side * side, 64, generator=generator, requires_grad=True) for _ in range(3)]
        layout = layouts.local2d(side, side, 7)
        plain_ms, expected = _time(functools.partial(plain_attention, causal=True), inputs)
        kernel_ms, found = _time(flash_attention, inputs)
        _, expected_near = _time(functools.partial(plain_attention, causal=True, layout=layout), inputs, repeats=1)
        sparse_ms, near = _time(functools.partial(block_sparse_attention, layout=layout), inputs)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(near, expected_near, atol=1e-4, rtol=0)
        ratios = plain_ms / kernel_ms, plain_ms / sparse_ms
        rows.append(
            f"{side:3d}×{side:<3d}  {side * side:6d}  {plain_ms:9.1f}  {kernel_ms:10.1f}  {ratios[0]:5.1f}"
            f"  {sparse_ms:10.1f}  {ratios[1]:5.1f}"
        )
    text = (
        "The reason for this project: plain attention keeps a score for every pair of pixels. Forward and backward of one "
        "layer, batch 1, 4 heads of 64, float32, on this machine, after outputs and gradients were found equal to the plain "
        "ones; median of 3. Sparse is local2d:7, where a pixel sees the earlier pixels at most 7 rows and columns away."
    )
    section = Section("What attention costs", "igpt.use_kernels()", text, table="\n".join(rows))
    fast = f"the kernel is {ratios[0]:.1f} times as fast as plain attention, local2d:7 {ratios[1]:.1f} times"
    return section, f"attention    64×64 pixels: {fast}"


def _time(
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], inputs: list[torch.Tensor], repeats: int = 3
) -> tuple[float, list[torch.Tensor]]:
    """Median milliseconds of forward and backward after one to warm up, and what they gave: output and gradients."""
    import torch

    times, results = [], []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        out = attention(*inputs)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        times.append(1e3 * (time.perf_counter() - start))
        results = [out.detach(), *gradients]
    return statistics.median(times[1:]), results
