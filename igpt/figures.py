"""Pictures: grids of images by Pillow, crisp at any enlargement, and curves by matplotlib.

Shape letters: n or N images, h x w pixels, V palette colours. Pillow and matplotlib are imported when a picture is
made, not with this module; the curves need the extra `eval`. Nothing here touches matplotlib's global state (pyplot).
"""

from __future__ import annotations

import colorsys
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from igpt.errors import ConfigError, DataError, need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image, ImageFont

    from igpt.palette import Palette
    from igpt.probe import ProbeResult

Pixels = npt.NDArray[np.uint8]

GAP = (205, 205, 205)  # between images: seen against white digits' black and against a white page alike
HIDDEN = (110, 122, 148)  # pixels that the model was not shown: bluish, so that grey images do not contain it
INK = (32, 32, 32)
WIDTH, HEIGHT = 900, 3000  # pixels that an automatic enlargement aims at, and does not exceed
BLUE, ORANGE, GREY = "#1f5fa8", "#d1701c", "#707070"


def grid(images: Pixels, *, columns: int | None = None, scale: int | None = None, pad: int = 1) -> Image.Image:
    """Images side by side, row by row, each pixel enlarged to a square of `scale` x `scale`.

    Pixel (y, x) of image i, at row r = i // columns and column c = i % columns, covers the square that starts at
    ``((r * (h + pad) + pad + y) * scale, (c * (w + pad) + pad + x) * scale)``.

    Args:
        images: uint8 [n, h, w, 3], n >= 1.
        columns: images in a row; the nearest to a square when left out.
        scale: enlargement; when left out, the largest that keeps the grid within 900 x 3000 pixels (1 at least).
        pad: grey border around each image, in pixels before enlargement.

    Raises:
        ConfigError: no images, another dtype or shape, or a number out of range.
    """
    from PIL import Image

    _check_images("images", images, 4)
    n, h, w, _ = images.shape
    columns = whole("columns", math.ceil(math.sqrt(n)) if columns is None else columns, 1)
    columns = min(columns, n)
    pad = whole("pad", pad, 0)
    rows = -(-n // columns)
    canvas = np.empty((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), np.uint8)
    canvas[:] = GAP
    for i in range(n):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        canvas[y : y + h, x : x + w] = images[i]
    scale = _scale(scale, canvas.shape[0], canvas.shape[1])
    return Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def completion_grid(
    originals: Pixels, kept_masks: npt.NDArray[np.bool_], completions: Pixels, *, scale: int | None = None
) -> Image.Image:
    """One row for each image: the original, the part that was kept (the rest grey), and the completions, under a header.

    The kept part is shown as the model saw it: in the colours of the first completion, which holds it unchanged.
    The header is left out where a column is too narrow to read it. Below the header, the picture is that of `grid`
    with 2 + n columns.

    Args:
        originals: uint8 [N, h, w, 3].
        kept_masks: bool [h, w], or [N, h, w] for a mask of its own for each image. True = kept.
        completions: uint8 [N, n, h, w, 3].
        scale: as in `grid`.

    Raises:
        ConfigError: shapes that do not belong together, or another dtype.
    """
    _check_images("originals", originals, 4)
    _check_images("completions", completions, 5)
    count, h, w, _ = originals.shape
    if completions.shape[0] != count or completions.shape[2:] != originals.shape[1:]:
        raise ConfigError(f"completions must be [{count}, n, {h}, {w}, 3] like originals, got {list(completions.shape)}")
    masks = np.asarray(kept_masks)
    if masks.dtype != np.bool_ or masks.shape not in ((h, w), (count, h, w)):
        raise ConfigError(f"kept_masks must be bool [{h}, {w}] or [{count}, {h}, {w}], got {masks.dtype} {list(masks.shape)}")
    kept = np.where(np.broadcast_to(masks, (count, h, w))[..., None], completions[:, 0], np.array(HIDDEN, np.uint8))
    rows = np.concatenate([originals[:, None], kept[:, None], completions], axis=1)
    n = completions.shape[1]
    scale = _scale(scale, count * (h + 1) + 1, (2 + n) * (w + 1) + 1)
    body = grid(rows.reshape(-1, h, w, 3), columns=2 + n, scale=scale)
    cell = (w + 1) * scale
    labels = [("original", scale, w * scale), ("kept", scale + cell, w * scale)]
    labels.append(("completions" if n > 1 else "completion", scale + 2 * cell, (n * (w + 1) - 1) * scale))
    return _under_header(body, labels)


def palette_picture(palette: Palette, *, scale: int | None = None) -> Image.Image:
    """All V colours as squares: bright rows above dark ones, ordered by hue within a row.

    Args:
        palette: a `Palette`.
        scale: side of a square in pixels; chosen to make the picture about 900 pixels wide when left out.
    """
    from PIL import Image

    colors = np.clip(np.rint(palette.colors), 0, 255).astype(np.uint8)
    size = len(colors)
    columns = math.ceil(math.sqrt(2 * size))
    bright = np.argsort(-(colors @ np.array([0.299, 0.587, 0.114])), kind="stable")
    rows = [bright[start : start + columns] for start in range(0, size, columns)]
    canvas = np.empty((len(rows), columns, 3), np.uint8)
    canvas[:] = 255
    for y, row in enumerate(rows):
        ordered = sorted(row, key=lambda i: colorsys.rgb_to_hsv(*(colors[i] / 255.0))[:2])
        canvas[y, : len(row)] = colors[ordered]
    scale = _scale(scale, *canvas.shape[:2])
    picture = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    if scale >= 8:  # a white line between squares, where they are large enough to spare it
        picture[scale - 1 :: scale] = 255
        picture[:, scale - 1 :: scale] = 255
    return Image.fromarray(picture)


def before_after(image: Pixels, palette: Palette, *, scale: int | None = None) -> Image.Image:
    """A photograph, the same in the palette's colours, and their absolute difference times 8, with the error in numbers.

    Args:
        image: uint8 [h, w, 3].
        palette: a `Palette`.
        scale: as in `grid`.

    Raises:
        ConfigError: another dtype or shape.
    """
    _check_images("image", image, 3)
    h, w, _ = image.shape
    decoded = np.asarray(palette.decode(palette.encode(image), h, w), np.uint8)
    delta = np.abs(image.astype(np.int16) - decoded)
    difference = np.minimum(delta * 8, 255).astype(np.uint8)
    error = palette.error(image)
    scale = _scale(scale, h + 2, 3 * (w + 1) + 1)
    body = grid(np.stack([image, decoded, difference]), columns=3, scale=scale)
    cell = (w + 1) * scale
    texts = (
        "photo",
        f"{palette.size} colours, PSNR {error.psnr:.1f} dB",
        f"8 x difference, mean {error.mean_delta:.2f} of 255",  # the built-in font has no multiplication sign
    )
    return _under_header(body, [(text, scale + i * cell, w * scale) for i, text in enumerate(texts)])


def plot_probe(result: ProbeResult, path: Path | str) -> None:
    """Accuracy by layer as a PNG: mean over the seeds with a band of one standard deviation, baselines, best layer.

    Args:
        result: what `igpt.linear_probe` returned.
        path: the PNG to write; its folder must exist.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    from igpt.probe import spread

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
    axes.set_ylim(max(low - 0.04 * (high - low), -2), min(high + 0.14 * (high - low), 106))  # room for the note
    side = "left" if best < layers / 3 else "right" if best > 2 * (layers - 1) / 3 else "center"
    text = f"best: layer {best}, {score:.1f} %"
    axes.annotate(text, (best, score), xytext=(0, 13), textcoords="offset points", ha=side, color=BLUE, weight="bold")
    axes.xaxis.set_major_locator(need("matplotlib.ticker", "eval").MaxNLocator(integer=True))
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


def whole(name: str, value: int, least: int) -> int:
    """`value` as an int; `ConfigError` naming `name` when it is no integer or below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def _bits(nats: Any) -> Any:
    return nats / math.log(2.0)


def _nats(bits: Any) -> Any:
    return bits * math.log(2.0)


def _read_metrics(path: Path) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not a JSON object with a step: {line[:80]!r}") from error
        for name in ("loss", "val_loss", "histogram_loss"):
            if row.get(name) is not None:
                found.setdefault(name, {})[step] = float(row[name])  # a resumed run writes a step again: the later line holds
    if not found:
        raise DataError(f"{path} holds no loss, val_loss or histogram_loss")
    ordered = {name: sorted(values.items()) for name, values in found.items()}
    return {name: (np.array([s for s, _ in rows]), np.array([v for _, v in rows])) for name, rows in ordered.items()}


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches at 120 dots an inch, drawn by Agg: no window, no global state."""
    figure: Figure = need("matplotlib.figure", "eval").Figure(figsize=(width, height), dpi=120, layout="constrained")
    need("matplotlib.backends.backend_agg", "eval").FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _under_header(body: Image.Image, labels: list[tuple[str, int, int]]) -> Image.Image:
    """`body` below a white line of texts, each (text, left, room) centred in its room; `body` alone if one does not fit."""
    from PIL import Image, ImageDraw

    def fits(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> bool:
        return all(font.getlength(text) <= room for text, _, room in labels)

    font = next((font for font in map(_font, range(22, 10, -1)) if fits(font)), None)
    if font is None:
        return body
    strip = round(_text_height(font) * 1.7)
    page = Image.new("RGB", (body.width, body.height + strip), "white")
    page.paste(body, (0, strip))
    draw = ImageDraw.Draw(page)
    for text, left, room in labels:
        draw.text((left + room / 2, strip / 2), text, fill=INK, font=font, anchor="mm")
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    box = font.getbbox("Ag|")
    return box[3] - box[1]


def _scale(scale: int | None, height: int, width: int) -> int:
    if scale is not None:
        return whole("scale", scale, 1)
    return max(1, min(WIDTH // width, HEIGHT // height))


def _check_images(name: str, images: Pixels, ndim: int) -> None:
    shape = {3: "[h, w, 3]", 4: "[n, h, w, 3]", 5: "[N, n, h, w, 3]"}[ndim]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != ndim or images.shape[-1] != 3:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ConfigError(f"{name} must be a uint8 array {shape}, got {got}")
    if images.size == 0:
        raise ConfigError(f"{name} is empty: {list(images.shape)}")
