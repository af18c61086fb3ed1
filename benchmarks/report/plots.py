"""Plots: time and memory against the size of the image, one line a method, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.worker import Message
from benchmarks.registry import WAYS
from benchmarks.report import units

COLOURS = {
    "eager": "#8c8c8c",
    "hf-eager": "#8c8c8c",
    "transformers": "#8c8c8c",
    "plain": "#5f5f5f",
    "sdpa": "#1f77b4",
    "sdpa-flash": "#17becf",
    "sdpa-cudnn": "#9467bd",
    "flex": "#2ca02c",
    "compile": "#2ca02c",
    "hf-compile": "#2ca02c",
    "torch": "#1f77b4",
    "scipy": "#9467bd",
    "cdist": "#17becf",
    "pillow": "#bcbd22",
    "hf-kernels": "#e377c2",
    "flash": "#ff7f0e",
    "kernels": "#ff7f0e",
    "ours": "#ff7f0e",
    "decode": "#ff7f0e",
    "ext": "#ff7f0e",
    "sparse": "#d62728",
}


def panels(rows: Sequence[Message]) -> dict[str, list[Message]]:
    """What goes into one picture: file name -> rows. A pattern shares its picture with dense attention of the same shape."""
    found: dict[str, list[Message]] = {}
    for row in rows:
        if not row["resolution"] or row["way"] == "backward":
            continue
        op = "" if row["suite"] in ("attention", "train", "sample") else "-" + row["op"].replace(":", "-").replace("_", "-")
        name = f"{row['suite']}{op}-{row['preset']}-{row['way']}"
        found.setdefault(name, []).append(row)
    for name, some in found.items():
        if some[0]["suite"] == "sparse" and some[0]["op"] != "build":
            kept = ("eager", "sdpa", "sdpa-flash", "sdpa-cudnn", "flash")
            found[name] = some + [
                row
                for row in rows
                if row["suite"] == "attention"
                and row["method"] in kept
                and all(row[column] == some[0][column] for column in ("preset", "way", "dtype", "device"))
            ]
    found = {name: comparable(some) for name, some in found.items()}
    return {name: some for name, some in found.items() if _sizes(some) > 1}


def comparable(rows: Sequence[Message]) -> list[Message]:
    """All rows where no method has two of one size; else those of one batch, or of one number of tokens in a batch.

    Of these the group with most rows. A line through several batches would go up and down.
    """
    if len({(row["method"], row["resolution"]) for row in rows}) == len(rows):
        return list(rows)
    groups: dict[tuple[str, int], list[Message]] = {}
    for row in rows:
        for name, count in (("images", row["batch"]), ("tokens", row["batch"] * row["tokens"])):
            groups.setdefault((name, count), []).append(row)
    return max(groups.values(), key=len)


def _sizes(rows: Sequence[Message]) -> int:
    return len({row["resolution"] for row in rows if row["status"] == "ok"})


def draw(rows: Sequence[Message], out: Path) -> list[str]:
    """Write a PNG for each of `panels`; nothing where matplotlib is not installed. Returns file names."""
    try:
        from igpt.plots.curves import new_figure

        new_figure(1, 1)
    except (ImportError, RuntimeError, ValueError):
        return []
    written = []
    for name, some in panels(rows).items():
        figure = new_figure(10, 4.2)
        left, right = figure.subplots(1, 2)
        _panel(left, some, "median_s", "predicted_s", "time of a call")
        _panel(right, some, "peak_bytes", "predicted_bytes", "peak memory above inputs")
        first = some[0]
        what = {"attention": "dense causal attention", "train": "training", "sample": "one more pixel"}.get(
            first["suite"], first["op"]
        )
        preset = "" if first["suite"] == "palette" else f", Image GPT {first['preset']}"
        batch = "batch by size"
        if len({row["batch"] for row in some}) == 1:
            batch = f"batch {first['batch']}"
        elif len({row["batch"] * row["tokens"] for row in some}) == 1:
            batch = f"{first['batch'] * first['tokens']:,} tokens a batch"
        figure.suptitle(f"{what}{preset}, {WAYS[first['way']]}, {batch}, {first['dtype']}, {first['device']}", fontsize=11)
        figure.savefig(out / f"{name}.png", format="png")
        written.append(f"{name}.png")
    return written


def _panel(axes: Any, rows: Sequence[Message], column: str, predicted: str, label: str) -> None:
    sides = sorted({row["resolution"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["resolution"])
        good = [(row["resolution"], row[column]) for row in mine if row["status"] == "ok" and row.get(column)]
        colour = COLOURS.get(method, "#000000")
        if good:
            axes.plot(*zip(*good, strict=True), marker="o", markersize=4, color=colour, label=method)
        crosses = [
            (row["resolution"], row[predicted]) for row in mine if row["status"] in ("oom", "timeout") and row.get(predicted)
        ]
        if column == "median_s" and good:
            # Where memory ended there is no time; the cross stands where the last two sizes point to.
            crosses += [(row["resolution"], _continued(good, row["resolution"])) for row in mine if row["status"] == "oom"]
        if crosses:
            axes.plot(*zip(*crosses, strict=True), linestyle="none", marker="x", markersize=8, color=colour)
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within a decade or a factor of two the powers alone would leave an axis without a number.
    if column == "median_s":
        low, high = (low / 2, high * 2) if high < 5 * low else (low, high)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 30 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.seconds(value)))
    else:
        axes.set_ylim(2 ** math.floor(math.log2(low)), 2 ** math.ceil(math.log2(high)))
        axes.yaxis.set_major_locator(LogLocator(2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.size(value)))
    axes.set_xticks(sides, [f"{side}²" for side in sides])
    axes.minorticks_off()
    axes.set_xlabel("image (pixels); × = out of memory or of time, predicted")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _continued(good: Sequence[tuple[int, float]], side: int) -> float:
    last, value = good[-1]
    return value * (side / last) ** 4
