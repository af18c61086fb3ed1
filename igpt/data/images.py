"""One picture: from a file that may be damaged or hostile to uint8 pixels of the wanted size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from igpt.checks import MAX_SIDE, check_int
from igpt.data.pixels import decode
from igpt.errors import ArgumentTypeError, DataError
from igpt.files import describe, regular_size
from igpt_kernels.messages import shown

# Pillow warns above this many pixels and refuses above twice as many; the second number bounds our own option.
MAX_PIXELS = 89_478_485
PILLOW_REFUSES = 2 * MAX_PIXELS
MAX_BYTES = 1024 * 1024 * 1024
LONGEST_SIDE = 1 << 18
"""Pixels along a picture. Decoders keep a pointer for each row: 80 million rows of one pixel took 1.8 GiB."""

_MOST_READS = 1_000_000
"""Reads of a file. Pillow handles each part of a header in Python: a PNG of two million small chunks took 16 s."""

_MOST_SCANNED = 50 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG. A scan of 80 million pixels takes 0.1 s and as little as 114 bytes."""

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
    CMYK and 16-bit pixels become 8-bit RGB. 16-bit values of PNG and TIFF are divided by 257 and rounded, and mode "I" is read
    as 16-bit. Values are taken as they are stored: gamma, colour profiles and a background colour in the file are not used.
    The format is found from the content, not the name.

    Args:
        path: the file.
        max_pixels: width x height above this is refused from the header, before any pixel is decoded.

    Raises:
        DataError: the file is missing, not a picture, truncated, damaged, too large; or of a pixel format without a stated
            range (32-bit float or integer beyond 16 bits). The message names the file. No other exception leaves.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentTypeError(f"path must be a path, got {shown(path)}")
    path, max_pixels = Path(path), check_int("max_pixels", max_pixels, 1)
    if regular_size(path) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES:,} bytes")
    try:
        # Any exception at all: besides OSError, Pillow's decoders let ValueError, SyntaxError, RuntimeError, struct.error,
        # IndexError, ZeroDivisionError and MemoryError through on damaged files (1 in 30 of 15,000 corrupted ones).
        with _opened(path) as picture:
            size = picture.size
            if size[0] * size[1] > max_pixels:
                raise DataError(f"{path}: {size[0]:,} x {size[1]:,} pixels, the limit is {max_pixels:,} (max_pixels)")
            if max(size) > LONGEST_SIDE:
                raise DataError(f"{path}: {size[0]:,} x {size[1]:,} pixels, the longest side may have {LONGEST_SIDE:,}")
            if "progressive" in picture.info and _scans(path) * size[0] * size[1] > _MOST_SCANNED:
                raise DataError(f"{path}: {_scans(path):,} scans of {size[0]:,} x {size[1]:,} pixels are too many")
            rgb = decode(picture, lambda: _opened(path))
            if rgb.size != size:
                raise DataError(f"{path}: decoded to {rgb.size}, but its header says {size}")
            # After loading, because Pillow turns TIFF files itself and then drops the tag. The tag alone is read:
            # exif_transpose() also writes the whole EXIF block anew, which fails on blocks that are only untidy.
            turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
            return rgb if turn is None else rgb.transpose(turn)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a readable picture ({describe(error)})") from error


class _LimitedReads(io.BufferedReader):
    """A file that can be read so often and no more: what bounds the time of headers in many small parts."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > _MOST_READS:
            raise ValueError(f"more than {_MOST_READS:,} parts")
        return super().read(size)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture, opened by its header."""
    with _LimitedReads(io.FileIO(path)) as file:
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError("none of the known formats") from None
        with picture:
            yield picture


def _scans(path: Path) -> int:
    """How many scans a JPEG has, or a few more: in its pixels the bytes of that marker never stand."""
    count, before = 0, b""
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            count += (before + part).count(b"\xff\xda")
            before = part[-1:]
    return count


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

    Raises:
        ConfigError: an argument of another kind, or sides beyond 1 to 4,096.
    """
    if not isinstance(picture, Image.Image) or picture.mode != "RGB":
        raise ArgumentTypeError(f"picture must be an RGB image of Pillow, got {shown(picture)}")
    if crop is not None and not isinstance(crop, np.random.Generator):
        raise ArgumentTypeError(f"crop must be a numpy.random.Generator or None, got {shown(crop)}")
    height, width = check_int("height", height, 1, MAX_SIDE), check_int("width", width, 1, MAX_SIDE)
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
