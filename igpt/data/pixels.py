"""From the pixel formats of picture files to 8-bit RGB: samples of 16 bits, transparency, grey, palettes, CMYK.

Pillow keeps the high byte alone of 16-bit samples in colour. It can be told which byte to keep, so such a file is decoded
twice: once for the high bytes, once for the low ones.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_STRIP = 1 << 16  # pixels converted at a time
_COLOUR_16 = re.compile(r"(RGB|RGBA|RGBa|RGBX|CMYK);16([BLN])")
_GREY_ALPHA_16 = "LA;16B"
_NATIVE = "L" if sys.byteorder == "little" else "B"
_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284  # tags of TIFF
_WHITE_IS_ZERO = 0

Open = Callable[[], AbstractContextManager[Image.Image]]


def decode(picture: Image.Image, again: Open) -> Image.Image:
    """The pixels of an opened picture as 8-bit RGB; transparency is laid over white.

    Values are taken as they are stored: neither gamma nor a colour profile is applied, and no background colour of the file.
    16-bit samples become round(v / 257), once, after transparency.

    Args:
        picture: opened, not loaded.
        again: opens it once more.

    Raises:
        ValueError: pixels without a stated range, or samples that Pillow would misread. Decoders raise what they like.
    """
    raw = _raw_mode(picture)
    if raw == _GREY_ALPHA_16:
        return _grey_alpha(picture)
    colour = _COLOUR_16.fullmatch(raw)
    if colour is not None:
        return _deep_colour(picture, again, *colour.groups())
    picture.load()
    mode = picture.mode
    if mode == "F":
        raise ValueError("32-bit float pixels have no stated range")
    if mode == "I" or mode.startswith("I;"):
        return _grey(picture, 4095 if raw == "I;12" else 65535)
    if picture.format == "PNG" and raw in ("L;2", "L;4") and "transparency" in picture.info:
        # Pillow spreads the pixels over 0..255, but not the value that is transparent.
        picture.info["transparency"] *= 255 // (2 ** int(raw[2:]) - 1)
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGB", clear.size, "white")
        white.paste(clear.convert("RGB"), mask=clear.getchannel("A"))
        return white
    # A copy, because what is closed with its file keeps no pixels.
    return picture.convert("RGB") if mode != "RGB" else picture.copy()


def _raw_mode(picture: Image.Image) -> str:
    """How samples lie in the file, by Pillow's name for it; empty where the format has none."""
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    args = tiles[0].args if tiles else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    tags = _tags(picture)
    if tags.get(_PLANES, 1) == 2 and max(tags.get(_BITS, (8,))) == 16 and picture.mode in ("RGB", "RGBA", "CMYK"):
        # Pillow takes uncompressed ones for 8-bit samples: other pixels without a word.
        raise ValueError("16-bit samples that lie plane by plane cannot be read")
    return raw if isinstance(raw, str) else ""


def _tags(picture: Image.Image) -> Any:
    """The tags of a TIFF; none elsewhere."""
    return getattr(picture, "tag_v2", {})


def _reread(picture: Image.Image, mode: str, raw: str) -> Image.Image:
    """Load an opened picture as another mode, its bytes taken as `raw`."""
    file: Any = picture
    file._mode = mode
    file.tile = [tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in file.tile]
    picture.load()
    return picture


def _strips(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    width, height = picture.size
    rows = max(1, _STRIP // max(width, 1))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _joined(picture: Image.Image, pixels: Callable[[tuple[int, int, int, int]], NDArray[Any]], mode: str) -> Image.Image:
    """An 8-bit picture of strips."""
    made = Image.new(mode, picture.size)
    for box in _strips(picture):
        made.paste(Image.fromarray(pixels(box)), box[:2])
    return made


def _wide(picture: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint32]:
    return np.asarray(picture.crop(box)).astype(np.uint32)


@functools.cache
def _rounded() -> NDArray[np.uint8]:
    """round(v / 257) of every v of 16 bits."""
    return ((np.arange(65536) + 128) // 257).astype(np.uint8)


def _over_white(values: NDArray[np.uint32], alpha: NDArray[np.uint32], *, premultiplied: bool = False) -> NDArray[np.uint8]:
    """16-bit values [...,3] with alpha [...,1] over white, rounded once."""
    seen = (values * np.uint32(65535) if premultiplied else values * alpha).astype(np.float64)
    seen += np.uint32(65535) * (np.uint32(65535) - alpha)
    seen *= 255 / 65535**2
    return np.rint(np.minimum(seen, 255, out=seen)).astype(np.uint8)


def _grey(picture: Image.Image, most: int) -> Image.Image:
    key: Any = picture.info.get("transparency")
    inverted = picture.mode.startswith("I;") and _tags(picture).get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def strip(box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        values = np.asarray(picture.crop(box)).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > most:
            raise ValueError(f"integer pixels outside 0..{most}")
        found = ((np.where(inverted, most - values, values) * 255 + most // 2) // most).astype(np.uint8)
        if key is not None:
            found[values == key] = 255
        return found

    return _joined(picture, strip, "L").convert("RGB")


def _grey_alpha(picture: Image.Image) -> Image.Image:
    bytes_of = _reread(picture, "RGBA", "RGBA")  # the two bytes of grey, the two of alpha

    def strip(box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        found = _wide(bytes_of, box)
        grey, alpha = (256 * found[..., i] + found[..., i + 1] for i in (0, 2))
        return _over_white(grey, alpha)

    return _joined(picture, strip, "L").convert("RGB")


def _deep_colour(picture: Image.Image, again: Open, kind: str, order: str) -> Image.Image:
    mode = picture.mode
    order = _NATIVE if order == "N" else order
    raw = "RGBA" if kind == "RGBa" else kind
    key: Any = picture.info.get("transparency")
    with again() as other:
        if (other.size, other.mode) != (picture.size, mode):
            raise ValueError("the file was changed while it was read")
        high = _reread(picture, mode, f"{raw};16{order}")
        low = _reread(other, mode, f"{raw};16{'B' if order == 'L' else 'L'}")

        def strip(box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
            values = 256 * _wide(high, box) + _wide(low, box)
            if mode == "RGBA":
                return _over_white(values[..., :3], values[..., 3:], premultiplied=kind == "RGBa")
            found = _rounded()[values]
            if mode == "RGB" and isinstance(key, tuple):
                found[(values == key).all(-1)] = 255
            return found

        if mode != "CMYK":
            return _joined(picture, strip, "RGB")
        inks = Image.new("CMYK", picture.size)
        for box in _strips(picture):
            inks.paste(Image.fromarray(strip(box), "CMYK"), box[:2])
        return inks.convert("RGB")
