"""One picture: from a file that may be damaged or hostile to uint8 pixels of the wanted size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from igpt.errors import DataError
from igpt.files import describe, regular_size

# Pillow warns above this many pixels and refuses above twice as many; the second number bounds our own option.
MAX_PIXELS = 89_478_485
PILLOW_REFUSES = 2 * MAX_PIXELS
MAX_BYTES = 1024 * 1024 * 1024

# Formats decoded inside the process and known by a signature. Left out on purpose: EPS and PDF (start other programs), ICO
# and ICNS (hold pictures of another size than their header says), TGA and PCX (nearly any bytes pass for one, so that a
# damaged PNG would come out as noise). JPEG includes MPO. AVIF last: an older Pillow may not know it.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "QOI", "JPEG2000", "AVIF")
SUFFIXES = frozenset(
    {
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".gif",
        ".bmp",
        ".dib",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".qoi",
        ".jp2",
        ".j2k",
        ".jpx",
        ".avif",
    }
)

# EXIF tag 0x0112: what to do to see the picture upright. https://exiftool.org/TagNames/EXIF.html
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture file to RGB, upright.

    EXIF orientation is applied; the first frame of an animation is taken; transparency is laid over white; grey, palette,
    CMYK and 16-bit pixels become 8-bit RGB (16-bit values are divided by 257 and rounded; mode "I" is read as 16-bit).
    The format is found from the content, not the name.

    Args:
        path: the file.
        max_pixels: width x height above this is refused from the header, before any pixel is decoded.

    Raises:
        DataError: the file is missing, not a picture, truncated, damaged, too large; or of a pixel format without a stated
            range (32-bit float or integer beyond 16 bits). The message names the file. No other exception leaves.
    """
    if regular_size(path) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES:,} bytes")
    try:
        # Any exception at all: besides OSError, Pillow's decoders let ValueError, SyntaxError, RuntimeError, struct.error,
        # IndexError, ZeroDivisionError and MemoryError through on damaged files (1 in 30 of 15,000 corrupted ones).
        with Image.open(path, formats=FORMATS) as picture:
            size = picture.size
            if size[0] * size[1] > max_pixels:
                raise DataError(f"{path}: {size[0]:,} x {size[1]:,} pixels, the limit is {max_pixels:,} (max_pixels)")
            picture.load()
            if picture.size != size:
                raise DataError(f"{path}: decoded to {picture.size}, but its header says {size}")
            # After load(), because Pillow turns TIFF files itself and then drops the tag. The tag alone is read:
            # exif_transpose() also writes the whole EXIF block anew, which fails on blocks that are only untidy.
            turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
            upright = picture if turn is None else picture.transpose(turn)
            rgb = _to_rgb(upright)
            return rgb.copy() if rgb is picture else rgb
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable picture ({describe(error)})") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture
    if mode == "F":
        raise ValueError("32-bit float pixels have no stated range")
    if mode == "I" or mode.startswith("I;"):
        values = np.asarray(picture).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("integer pixels outside 0..65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB")


def crop_and_resize(
    picture: Image.Image, height: int, width: int, crop: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """Crop and reduce an RGB picture to uint8 [height, width, 3].

    For a square target this is the paper's recipe (Chen et al. 2020, section 3.2): the shorter side is reduced to 224,
    the middle 224 x 224 cut out and reduced to the target. With `crop`, training's: the shorter side is reduced to a
    random whole number in 256..384; the 224 x 224 are cut at a random place. Generalised so:

    * 224 becomes the target's shorter side where that is larger (with 256..384 in proportion).
    * A target that is not square gets the largest cut of its shape; "shorter side" is then that of the cut.
    * A picture smaller than 224 is not enlarged first: the same share of it is cut at its own resolution. So a picture
      that has the target's size already comes back unchanged when there is no `crop`.

    The paper does not state its filters. Here: bicubic with anti-aliasing (Pillow) down to the cut, and then the box filter to
    the target. A token then is the plain mean of the area it stands for, without ringing; that would put
    colours into the palette that no picture has. Where the last step must enlarge, bicubic.

    Args:
        picture: RGB.
        height: rows.
        width: columns.
        crop: three draws are taken from it.
    """
    short = min(height, width)
    base = max(224, short)
    rows, columns = height / short, width / short
    cover = min(picture.height / rows, picture.width / columns)
    reduced = float(base) if crop is None else base * int(crop.integers(256, 385)) / 224
    scale = min(1.0, reduced / cover)
    if scale < 1.0:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    cut = min(cover, reduced) * base / reduced
    cut_height = min(picture.height, max(1, round(cut * rows)))
    cut_width = min(picture.width, max(1, round(cut * columns)))
    top, left = (picture.height - cut_height) // 2, (picture.width - cut_width) // 2
    if crop is not None:
        top = int(crop.integers(0, picture.height - cut_height + 1))
        left = int(crop.integers(0, picture.width - cut_width + 1))
    shrinks = cut_height >= height and cut_width >= width
    kind = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    box = (left, top, left + cut_width, top + cut_height)
    return np.array(picture.resize((width, height), kind, box=box), dtype=np.uint8)
