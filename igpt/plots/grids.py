"""Grids of images by Pillow, crisp at any enlargement. Pillow is imported when a picture is made, not with this module.

Shape letters: n or N images, h x w pixels, V palette colours.
"""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from igpt.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from igpt.palette.palette import Palette
from igpt.checks import check_int

Pixels = npt.NDArray[np.uint8]
GAP = (205, 205, 205)  # between images: seen against white digits' black and against a white page alike
MASKED = (110, 122, 148)  # pixels that the model was not shown: bluish, so that grey images do not contain it
INK = (32, 32, 32)
WIDTH, HEIGHT = 900, 3000  # pixels that an automatic enlargement aims at, and does not exceed
LARGEST = 1 << 28
"""Pixels of a picture: 805 MB before they are compressed. Browsers and viewers end long before."""


def grid(images: Pixels, *, columns: int | None = None, scale: int | None = None, pad: int = 1) -> Image.Image:
    """Images side by side, row by row, each pixel enlarged to a square of `scale` x `scale`.

    Pixel (y, x) of image i (row r = i // columns, column c = i % columns) covers the square that starts at
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
    pad = check_int("pad", pad, 0)
    columns, height, width = _canvas(n, h, w, columns, pad)
    scale = _scale(scale, height, width)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = GAP
    for i in range(n):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        canvas[y : y + h, x : x + w] = images[i]
    return Image.fromarray(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def check_scale(scale: int | None, images: int, height: int, width: int, *, columns: int | None = None) -> None:
    """Find out before images are drawn that `grid` would refuse to show so many, or to enlarge them so much.

    Raises:
        ConfigError: `scale` is out of range, or too large for this many images.
    """
    _, canvas_height, canvas_width = _canvas(check_int("images", images, 1), height, width, columns, 1)
    _scale(scale, canvas_height, canvas_width)


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
    kept = np.where(np.broadcast_to(masks, (count, h, w))[..., None], completions[:, 0], np.array(MASKED, np.uint8))
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


def _under_header(body: Image.Image, labels: list[tuple[str, int, int]]) -> Image.Image:
    """`body` below a white line of texts, each (text, left, width) centred in its width; `body` alone if one does not fit."""
    from PIL import Image, ImageDraw

    def fits(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> bool:
        return all(font.getlength(text) <= width for text, _, width in labels)

    font = next((font for font in map(_font, range(22, 10, -1)) if fits(font)), None)
    if font is None:
        return body
    strip = round(_text_height(font) * 1.7)
    page = Image.new("RGB", (body.width, body.height + strip), "white")
    page.paste(body, (0, strip))
    draw = ImageDraw.Draw(page)
    for text, left, width in labels:
        draw.text((left + width / 2, strip / 2), text, fill=INK, font=font, anchor="mm")
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    box = font.getbbox("Ag|")
    return box[3] - box[1]


def _canvas(images: int, h: int, w: int, columns: int | None, pad: int) -> tuple[int, int, int]:
    """Columns, and height and width in pixels before enlargement, of a grid."""
    columns = min(check_int("columns", math.ceil(math.sqrt(images)) if columns is None else columns, 1), images)
    return columns, -(-images // columns) * (h + pad) + pad, columns * (w + pad) + pad


def _scale(scale: int | None, height: int, width: int) -> int:
    if height * width > LARGEST:
        raise ConfigError(f"a picture of {height:,} x {width:,} pixels is too large (at most {LARGEST:,}): show fewer images")
    if scale is None:
        return max(1, min(WIDTH // width, HEIGHT // height))
    most = math.isqrt(LARGEST // (height * width))
    if check_int("scale", scale, 1) > most:
        raise ConfigError(f"scale must be at most {most} for a picture of {height} x {width} pixels, got {scale}")
    return scale


def _check_images(name: str, images: Pixels, ndim: int) -> None:
    shape = {3: "[h, w, 3]", 4: "[n, h, w, 3]", 5: "[N, n, h, w, 3]"}[ndim]
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != ndim or images.shape[-1] != 3:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ConfigError(f"{name} must be a uint8 array {shape}, got {got}")
    if images.size == 0:
        raise ConfigError(f"{name} is empty: {list(images.shape)}")
