"""Curves by matplotlib: accuracy by layer, and the losses of a run. Needs the extra `eval`; pyplot is not touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from igpt.errors import DataError, import_extra
from igpt.files import json_lines, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
LARGEST = 1e30
"""Beyond it, no axis can be drawn."""
BLUE, ORANGE, GREY = "#1f5fa8", "#d1701c", "#707070"


class Accuracies(Protocol):
    """What `plot_probe` draws: accuracies of S splits by layer, see `igpt.evaluation.probe.ProbeResult`."""

    @property
    def normed(self) -> Floats:
        """[S, L+1], after each layer's norm."""

    @property
    def raw(self) -> Floats | None:
        """[S, L+1], the residual stream."""

    @property
    def untrained(self) -> Floats | None:
        """[S, L+1], of the untrained model."""

    @property
    def pixels(self) -> Floats | None:
        """[S], of the pixels themselves."""

    @property
    def best_layer(self) -> int:
        """The layer that is marked."""


def plot_probe(result: Accuracies, path: Path | str) -> None:
    """Accuracy by layer as a PNG: mean over the seeds with a band of one standard deviation, baselines, best layer.

    Args:
        result: what `igpt.linear_probe` returned.
        path: the PNG to write; its folder must exist.

    Raises:
        MissingExtra: matplotlib is not installed.
    """

    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    curves: list[tuple[npt.NDArray[np.float64] | None, str, dict[str, Any]]] = [
        (result.normed, "after the layer's norm", {"color": BLUE, "marker": "o", "linewidth": 2, "zorder": 4}),
        (result.raw, "raw residual stream", {"color": ORANGE, "marker": "s", "markersize": 4, "zorder": 3}),
        (result.untrained, "untrained model", {"color": GREY, "marker": "^", "markersize": 4, "linestyle": "--", "zorder": 2}),
    ]
    seeds, layers = result.normed.shape
    x = np.arange(layers)
    for values, name, style in curves:
        if values is None:
            continue
        mean, std = 100 * values.mean(axis=0), 100 * spread(values)
        axes.plot(x, mean, label=name, **style)
        axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.18, linewidth=0)
    if result.pixels is not None:
        axes.axhline(100 * result.pixels.mean(), color="black", linestyle=":", linewidth=1.5, label="raw pixels")
    best, score = result.best_layer, 100 * result.normed.mean(axis=0)[result.best_layer]
    axes.plot([best], [score], marker="o", markersize=15, markerfacecolor="none", markeredgecolor=BLUE, zorder=5)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low - 0.04 * (high - low), -2), min(high + 0.14 * (high - low), 106))  # space for the note
    side = "left" if best < layers / 3 else "right" if best > 2 * (layers - 1) / 3 else "center"
    text = f"best: layer {best}, {score:.1f} %"
    axes.annotate(text, (best, score), xytext=(0, 13), textcoords="offset points", ha=side, color=BLUE, weight="bold")
    axes.xaxis.set_major_locator(import_extra("matplotlib.ticker", "eval").MaxNLocator(integer=True))
    axes.set_xlabel(f"layer (0 = before the first block, {layers - 1} = final norm)")
    axes.set_ylabel("test accuracy (%)")
    caption = f"mean of {seeds} splits, band = 1 standard deviation" if seeds > 1 else "one fit"
    axes.set_title(f"Linear probe by layer\n{caption}", fontsize=12)
    _finish(figure, axes, Path(path))


def plot_loss(metrics: Path | str, path: Path | str) -> None:
    """Loss curves of a run as a PNG: nats per pixel on the left, bits per pixel on the right.

    Args:
        metrics: the `metrics.jsonl` of a run. Each line is an object with `step` and any of `loss` (training),
            `val_loss` and `histogram_loss` (the per-position histogram baseline); other keys are ignored, and so is a
            last line cut short by a crash.
        path: the PNG to write; its folder must exist.

    Raises:
        DataError: no such file, a damaged line, or no loss in it.
        MissingExtra: matplotlib is not installed.
    """
    series = _read_metrics(Path(metrics))
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    if "loss" in series:
        steps, losses = series["loss"]
        many = len(steps) > 60  # below that, averaging would hide what there is
        axes.plot(steps, losses, color=BLUE, alpha=0.3 if many else 1.0, linewidth=1, label=None if many else "training")
        if many:
            window = max(5, len(steps) // 40 | 1)
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(
                steps[window // 2 : -(window // 2)], smooth, color=BLUE, linewidth=2, label=f"training (mean of {window} lines)"
            )
    if "val_loss" in series:
        axes.plot(*series["val_loss"], color=ORANGE, marker="o", markersize=5, linewidth=2, label="validation", zorder=4)
    if "histogram_loss" in series:
        value = float(series["histogram_loss"][1][-1])
        axes.axhline(value, color="black", linestyle=":", linewidth=1.5, label=f"histogram of each position ({value:.3f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per pixel)")
    axes.secondary_yaxis("right", functions=(_bits, _nats)).set_ylabel("bits per pixel")
    axes.set_title("Loss while training", fontsize=12)
    _finish(figure, axes, Path(path))


def _bits(nats: Any) -> Any:
    return nats / math.log(2.0)


def _nats(bits: Any) -> Any:
    return bits * math.log(2.0)


def _read_metrics(path: Path) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    found: dict[str, dict[int, float]] = {}
    try:
        for _, row in json_lines(path, number="step"):
            for name in ("loss", "val_loss", "histogram_loss"):
                value = row.get(name)
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST:
                    raise DataError(f"{path}: {name} of step {row['step']} must be a number, got {str(value)[:40]}")
                # A resumed run writes a step again: the later line holds.
                found.setdefault(name, {})[row["step"]] = float(value)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from error
    if not found:
        raise DataError(f"{path} holds no loss, val_loss or histogram_loss")
    ordered = {name: sorted(values.items()) for name, values in found.items()}
    return {name: (np.array([s for s, _ in rows]), np.array([v for _, v in rows])) for name, rows in ordered.items()}


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches at 120 dots an inch, drawn by Agg: no window, no global state."""
    figure: Figure = import_extra("matplotlib.figure", "eval").Figure(figsize=(width, height), dpi=120, layout="constrained")
    import_extra("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def spread(values: Floats) -> Floats:
    """Standard deviation over the splits of [S, ...], with S - 1 in the denominator; 0 for a single split."""
    if len(values) < 2:
        return np.zeros(values.shape[1:])
    return np.asarray(values.std(axis=0, ddof=1))
