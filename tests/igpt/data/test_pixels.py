"""Pixel formats against a definition written out here: every kind of PNG, byte by byte, and 16-bit TIFF."""

from __future__ import annotations

import contextlib
import itertools
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images import read_picture
from igpt.errors import DataError
from tests.pictures import encoded, picture

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), COLOUR: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), COLOUR_ALPHA: (8, 16)}
KINDS = [(kind, depth) for kind, depths in DEPTHS.items() for depth in depths]
HEIGHT, WIDTH = 11, 13
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def packed(row: np.ndarray, depth: int) -> bytes:
    """Samples of a row as bytes: big-endian, the first sample in the highest bits."""
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(-1).astype(np.uint8)).tobytes()


def filtered(rows: list[bytes], step: int) -> bytes:
    """The rows of one pass, each by another of the five filters (PNG specification, section 9)."""
    out = bytearray()
    above = bytes(len(rows[0]))
    for number, row in enumerate(rows):
        kind = number % 5
        out.append(kind)
        for i, value in enumerate(row):
            a = row[i - step] if i >= step else 0
            b = above[i]
            c = above[i - step] if i >= step else 0
            p = a + b - c
            guess = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            out.append((value - (0, a, b, (a + b) // 2, guess)[kind]) % 256)
        above = row
    return bytes(out)


def png(samples: np.ndarray, kind: int, depth: int, *, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    """A PNG of samples [h,w,channels]."""
    height, width, channels = samples.shape
    step = max(1, channels * depth // 8)
    data = b""
    for top, left, down, across in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::across]
        if part.size:
            data += filtered([packed(row.reshape(-1), depth) for row in part], step)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def eight_bits(colour: int, alpha: int, most: int) -> int:
    """A sample over white, in 0..255, rounded once."""
    share = Fraction(alpha, most)
    return round((Fraction(colour, most) * share + 1 - share) * 255)


def wanted(
    samples: np.ndarray, kind: int, depth: int, key: tuple[int, ...] | None, palette: np.ndarray, alphas: list[int]
) -> np.ndarray:
    """What the specification says the pixels are, over white."""
    most = 2**depth - 1
    out = np.empty((*samples.shape[:2], 3), np.uint8)
    for y, x in itertools.product(range(samples.shape[0]), range(samples.shape[1])):
        pixel = [int(value) for value in samples[y, x]]
        if kind == PALETTE:
            alpha = alphas[pixel[0]] if pixel[0] < len(alphas) else 255
            out[y, x] = [eight_bits(int(value), alpha, 255) for value in palette[pixel[0]]]
            continue
        has_alpha = kind in (GREY_ALPHA, COLOUR_ALPHA)
        colour = pixel[:-1] if has_alpha else pixel
        alpha = pixel[-1] if has_alpha else 0 if key == tuple(pixel) else most
        colour = colour * 3 if len(colour) == 1 else colour
        out[y, x] = [eight_bits(value, alpha, most) for value in colour]
    return out


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize(("kind", "depth"), KINDS)
def test_every_png(kind: int, depth: int, transparent: bool, interlaced: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(kind * 100 + depth)
    samples = generator.integers(0, 2**depth, (HEIGHT, WIDTH, CHANNELS[kind]))
    if depth == 16:
        samples[0, :4] = [[0], [128], [129], [65535]]
        samples[1, :2] = [[0x1234], [0x1235]]  # the same high byte
    palette = generator.integers(0, 256, (2**depth if depth < 16 else 1, 3))
    alphas = generator.integers(0, 256, len(palette) // 2 + 1).tolist() if transparent else []
    key: tuple[int, ...] | None = None
    chunks = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) if kind == PALETTE else b""
    if transparent and kind == PALETTE:
        chunks += chunk(b"tRNS", bytes(alphas))
    elif transparent and kind in (GREY, COLOUR):
        key = tuple(int(value) for value in samples[1, 0])
        chunks += chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    # What stands beside the pixels does not change them: gamma, chromaticities, a background, significant bits.
    chunks = chunk(b"gAMA", struct.pack(">I", 100_000)) + chunks
    path = tmp_path / "x.png"
    path.write_bytes(png(samples, kind, depth, interlaced=interlaced, chunks=chunks))
    np.testing.assert_array_equal(np.asarray(read_picture(path)), wanted(samples, kind, depth, key, palette, alphas))


def test_background_and_gamma_are_not_used(tmp_path: Path) -> None:
    samples = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]])
    chunks = chunk(b"gAMA", struct.pack(">I", 45_455)) + chunk(b"bKGD", struct.pack(">3H", 255, 0, 0))
    (tmp_path / "x.png").write_bytes(png(samples, COLOUR_ALPHA, 8, chunks=chunks))
    assert np.asarray(read_picture(tmp_path / "x.png")).tolist() == [[[255] * 3, [10, 20, 30]]]


def test_strips_of_a_large_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igpt.data.pixels._STRIP", 30)
    for kind in (GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA):
        samples = np.random.default_rng(kind).integers(0, 65536, (HEIGHT, WIDTH, CHANNELS[kind]))
        (tmp_path / "x.png").write_bytes(png(samples, kind, 16))
        found = np.asarray(read_picture(tmp_path / "x.png"))
        np.testing.assert_array_equal(found, wanted(samples, kind, 16, None, np.empty(0), []))


def tiff(
    samples: np.ndarray,
    order: str,
    photometric: int,
    *,
    extra: int | None = None,
    planar: int = 1,
    orientation: int = 1,
    compressed: bool = False,
    bits: int = 16,
) -> bytes:
    """A TIFF of 16-bit samples [h,w,channels] in one strip."""
    height, width, channels = samples.shape
    form = "<" if order == "II" else ">"
    stored = samples.transpose(2, 0, 1) if planar == 2 else samples
    data = stored.astype(f"{form}u2").tobytes()
    planes = channels if planar == 2 else 1
    if compressed:
        data = zlib.compress(data)
    tags: list[tuple[int, list[int]]] = [
        *((256, [width]), (257, [height]), (258, [bits] * channels), (259, [8 if compressed else 1]), (262, [photometric])),
        *((273, [8 + i * len(data) // planes for i in range(planes)]), (274, [orientation]), (277, [channels])),
        *((278, [height]), (279, [len(data) // planes] * planes), (284, [planar])),
    ]
    if extra is not None:
        tags.append((338, [extra]))
    ifd, more = 8 + len(data), b""
    after = ifd + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, values in tags:
        body = struct.pack(f"{form}{len(values)}I", *values)
        if len(body) > 4:
            place, more = after + len(more), more + body
            body = struct.pack(f"{form}I", place)
        entries += struct.pack(f"{form}HHI", tag, 4, len(values)) + body
    head = order.encode() + struct.pack(f"{form}HI", 42, ifd)
    return head + data + struct.pack(f"{form}H", len(tags)) + entries + bytes(4) + more


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize(("channels", "photometric", "extra"), [(1, 1, None), (3, 2, None), (4, 2, 0), (4, 2, 1), (4, 2, 2)])
def test_tiff_of_16_bits(
    channels: int, photometric: int, extra: int | None, order: str, compressed: bool, tmp_path: Path
) -> None:
    samples = np.random.default_rng(channels).integers(0, 65536, (HEIGHT, WIDTH, channels))
    if extra == 1:  # the colours were multiplied by alpha
        samples[..., :3] = samples[..., :3] * samples[..., 3:] // 65535
    (tmp_path / "x.tif").write_bytes(tiff(samples, order, photometric, extra=extra, compressed=compressed))
    found = np.asarray(read_picture(tmp_path / "x.tif"))
    if channels == 1:
        expected = np.round(samples / 257).repeat(3, 2)
    elif channels == 3 or extra == 0:
        expected = np.round(samples[..., :3] / 257)
    elif extra == 1:
        expected = np.round((samples[..., :3] + 65535 - samples[..., 3:]) / 257)
    else:
        expected = wanted(samples, COLOUR_ALPHA, 16, None, np.empty(0), [])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", ["II", "MM"])
def test_tiff_of_16_bits_in_ink(order: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 4))
    (tmp_path / "x.tif").write_bytes(tiff(samples, order, 5))
    inks = Image.fromarray(np.round(samples / 257).astype(np.uint8), "CMYK")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x.tif")), np.asarray(inks.convert("RGB")))


def test_tiff_where_white_is_zero(tmp_path: Path) -> None:
    samples = np.array([[[0], [129], [65535], [40_000]]])
    (tmp_path / "x.tif").write_bytes(tiff(samples, "II", 0))
    assert np.asarray(read_picture(tmp_path / "x.tif"))[0, :, 0].tolist() == [255, 254, 0, round(25_535 / 257)]


def test_tiff_in_planes(tmp_path: Path) -> None:
    """Pillow reads them as 8-bit samples: other pixels without a word."""
    samples = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 3))
    for compressed in (False, True):
        (tmp_path / "x.tif").write_bytes(tiff(samples, "II", 2, planar=2, compressed=compressed))
        with pytest.raises(DataError, match=r"x\.tif: .*plane by plane"):
            read_picture(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiff_of_16_bits(orientation: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 3))
    (tmp_path / "x.tif").write_bytes(tiff(samples, "MM", 2, orientation=orientation))
    seen = np.round(samples / 257).astype(np.uint8)
    turned = {2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.transpose(1, 0, 2)}.get(orientation, seen)
    if orientation > 5:
        turned = {6: np.rot90(seen, -1), 7: seen.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(seen)}[orientation]
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x.tif")), turned)


def test_ppm_of_16_bits(tmp_path: Path) -> None:
    samples = np.random.default_rng(5).integers(0, 65536, (HEIGHT, WIDTH, 3))
    for kind, part in ((b"P6", samples), (b"P5", samples[..., :1])):
        head = kind + f"\n{WIDTH} {HEIGHT}\n65535\n".encode()
        (tmp_path / "x.ppm").write_bytes(head + part.astype(">u2").tobytes())
        found = np.asarray(read_picture(tmp_path / "x.ppm"))
        np.testing.assert_array_equal(found, np.broadcast_to(np.round(part / 257), found.shape))


def test_damaged_files_of_16_bits(tmp_path: Path) -> None:
    """Each cut and each changed byte reads as some picture or is refused."""
    samples = np.random.default_rng(5).integers(0, 65536, (6, 5, 4))
    generator = np.random.default_rng(1)
    for data in (png(samples, COLOUR_ALPHA, 16), tiff(samples, "MM", 2, extra=2), tiff(samples[..., :3], "II", 2)):
        for _ in range(150):
            damaged = bytearray(data)
            if generator.integers(2):
                del damaged[int(generator.integers(len(data))) :]
            else:
                damaged[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
            (tmp_path / "x").write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(DataError):
                    assert read_picture(tmp_path / "x").mode == "RGB"


def test_profiles_are_not_applied(tmp_path: Path) -> None:
    plain = np.asarray(picture())
    for kind in ("PNG", "TIFF"):
        (tmp_path / "x").write_bytes(encoded(kind, picture(), icc_profile=bytes(5000)))
        np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "x")), plain)
