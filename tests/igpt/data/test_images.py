"""One picture: cut and resized, its pixel formats, and files that are damaged, hostile or no picture."""

from __future__ import annotations

import os
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images import FORMATS, crop_and_resize, read_picture
from igpt.data.open import open_source
from igpt.errors import DataError
from tests.hostile import SECONDS, at_most
from tests.pictures import encoded, noise, picture, smooth


class TestFit:
    def test_own_size_is_left_alone(self) -> None:
        for height, width in ((1, 1), (32, 32), (7, 3), (48, 31), (300, 260)):
            pixels = noise(height, width)
            np.testing.assert_array_equal(crop_and_resize(Image.fromarray(pixels), height, width), pixels)

    def test_paper_recipe(self) -> None:
        # 448 x 672 -> 224 x 336 -> the middle 224 -> 7 x 7 blocks averaged.
        picture = Image.fromarray(smooth(448, 672))
        middle = np.asarray(picture.resize((336, 224), Image.Resampling.BICUBIC))[:, 56:280]
        means = middle.reshape(32, 7, 32, 7, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(crop_and_resize(picture, 32, 32) - means).max() <= 1.0

    def test_small_pictures_are_cut_not_enlarged_first(self) -> None:
        pixels = noise(64, 96)
        means = pixels[:, 16:80].reshape(32, 2, 32, 2, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(crop_and_resize(Image.fromarray(pixels), 32, 32) - means).max() <= 1.0

    def test_shape_of_the_cut(self) -> None:
        # Left and right quarter red, the middle blue: a tall target sees blue alone.
        pixels = np.zeros((200, 400, 3), np.uint8)
        pixels[..., 2] = 255
        pixels[:, :100] = pixels[:, 300:] = (255, 0, 0)
        tall = crop_and_resize(Image.fromarray(pixels), 32, 16)
        assert tall.shape == (32, 16, 3)
        assert (tall == (0, 0, 255)).all()
        wide = crop_and_resize(Image.fromarray(pixels), 16, 32)
        assert (wide[:, :7] == (255, 0, 0)).all()
        assert (wide[:, 9:23] == (0, 0, 255)).all()

    def test_larger_targets_than_224(self) -> None:
        assert crop_and_resize(Image.fromarray(smooth(600, 500)), 256, 256).shape == (256, 256, 3)
        assert crop_and_resize(Image.fromarray(smooth(10, 20)), 256, 300).shape == (256, 300, 3)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000), (225, 223)])
    @pytest.mark.parametrize("target", [(1, 1), (32, 32), (5, 64)])
    @pytest.mark.parametrize("crop", [False, True])
    def test_any_size(self, size: tuple[int, int], target: tuple[int, int], crop: bool) -> None:
        generator = np.random.default_rng(0) if crop else None
        assert crop_and_resize(Image.fromarray(noise(*size)), *target, generator).shape == (*target, 3)

    def test_random_crops_cover_the_recipe(self) -> None:
        # Red grows with x and green with y, so the colours of a crop tell where and how large it was.
        ramp = np.linspace(0, 255, 448).astype(np.uint8)
        pixels = np.zeros((448, 448, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = ramp[None, :], ramp[:, None]
        picture, generator = Image.fromarray(pixels), np.random.default_rng(1)
        shares, lefts, tops = [], [], []
        for _ in range(400):
            crop = crop_and_resize(picture, 16, 16, generator).astype(float)
            share = (crop[0, -1, 0] - crop[0, 0, 0]) / 255 * 16 / 15
            shares.append(share)
            free = 1 - share
            lefts.append((crop[0, 0, 0] / 255 - share / 32) / free)
            tops.append((crop[0, 0, 1] / 255 - share / 32) / free)
        assert 224 / 384 - 0.02 < min(shares) < 0.61
        assert 0.84 < max(shares) < 224 / 256 + 0.02
        for places in (lefts, tops):
            assert min(places) < 0.1
            assert max(places) > 0.9
            assert 0.42 < np.mean(places) < 0.58
        assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.15


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(count: int) -> bytes:
    """So many zeros, compressed."""
    compressor, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [compressor.compress(block[: min(1 << 20, count - done)]) for done in range(0, count, 1 << 20)]
    return b"".join([*parts, compressor.flush()])


def png(width: int, height: int, *, chunks: bytes = b"", data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def patched(kind: str, offset: int, form: str, *values: int, **options: object) -> bytes:
    data = bytearray(encoded(kind, picture(), **options))
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(60_000, 60_000, data=zlib.compress(bytes(1000))),
    "gif": lambda: patched("GIF", 6, "<HH", 65535, 65535),
    "bmp": lambda: patched("BMP", 18, "<ii", 50_000, 50_000),
    "jpg": lambda: encoded("JPEG", picture()).replace(struct.pack(">HH", 37, 53), struct.pack(">HH", 65000, 65000)),
    # Lossless: after "VP8L", its length and 0x2f, 14 bits each of width - 1 and height - 1.
    "webp": lambda: patched("WEBP", 21, "<I", 16383 | 16383 << 14, lossless=True),
}


@pytest.mark.parametrize("suffix", BOMBS)
def test_bombs_are_refused_by_their_header(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(BOMBS[suffix]())
    with at_most(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"bomb\."):
            read_picture(path)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "tall.png": (lambda: png(1, 80_000_000), "1 x 80,000,000 pixels, the longest side"),
    "wide.png": (lambda: png(80_000_000, 1), "80,000,000 x 1 pixels, the longest side"),
    "text.png": (lambda: png(4, 4, chunks=chunk(b"zTXt", b"a\0\0" + zeros(100 << 20))), "not a readable picture"),
    "words.png": (lambda: png(4, 4, chunks=chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(100 << 20))), "not a readable picture"),
    "profile.png": (lambda: png(4, 4, chunks=chunk(b"iCCP", b"a\0\0" + zeros(100 << 20))), "not a readable picture"),
    "chunks.png": (lambda: png(4, 4, chunks=chunk(b"tEXt", b"a\0b") * 400_000), "more than 1,000,000 parts"),
    "blocks.gif": (lambda: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 2_000_000, "not a readable picture"),
    **{
        f"nothing.{suffix}": (make, "not a readable picture")
        for suffix, make in {
            "png": lambda: png(0, 5),
            "bmp": lambda: patched("BMP", 18, "<ii", 0, 5),
            "jpg": lambda: encoded("JPEG", picture()).replace(struct.pack(">HH", 37, 53), bytes(4)),
            "ppm": lambda: b"P6 0 5 255\n",
            "tif": lambda: encoded("TIFF", picture()).replace(struct.pack("<HHI", 256, 4, 1) + b"\x35", bytes(9)),
        }.items()
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_most(4 * SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=rf"{name}.*: .*{words}") as caught:
            read_picture(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_scans_of_a_jpeg_are_counted(tmp_path: Path) -> None:
    data = encoded("JPEG", Image.new("L", (4000, 4000)), progressive=True)
    first, last = data.rsplit(b"\xff\xda", 1)
    (tmp_path / "x.jpg").write_bytes(first + (b"\xff\xda" + last[:-2]) * 2000 + b"\xff\xd9")
    with at_most(SECONDS), pytest.raises(DataError, match=r"x\.jpg: 2,005 scans of 4,000 x 4,000 pixels are too many"):
        read_picture(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(data)
    assert read_picture(tmp_path / "x.jpg").size == (4000, 4000)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_thousands_of_frames_cost_nothing(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), i % 256) for i in range(300 if kind == "TIFF" else 1500)]
    (tmp_path / "x").write_bytes(encoded(kind, frames[7], save_all=True, append_images=frames))
    with at_most(1.0):
        assert read_picture(tmp_path / "x").size == (4, 4)


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(40, 50).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", max_pixels=2000).size == (50, 40)

    def load(_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(DataError, match=r"x\.png: 50 x 40 pixels, the limit is 1,999"):
        read_picture(tmp_path / "x.png", max_pixels=1999)
    with pytest.raises(DataError, match="limit is 1,999"):
        open_source(f"photos:{tmp_path}", height=4, width=4, max_pixels=1999).images([0])


def test_size_is_checked_against_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.PngImagePlugin import PngImageFile

    picture(40, 50).save(tmp_path / "x.png")
    load = PngImageFile.load

    def shrinking(self: PngImageFile) -> object:
        result = load(self)
        self.im = self.im.resize((7, 7), 0)
        self._size = (7, 7)
        return result

    monkeypatch.setattr(PngImageFile, "load", shrinking)
    with pytest.raises(DataError, match=r"x\.png: decoded to \(7, 7\), but its header says \(50, 40\)"):
        read_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    "error",
    [ValueError, SyntaxError, RuntimeError, struct.error, IndexError, ZeroDivisionError, MemoryError, KeyError, OSError],
)
def test_whatever_the_decoder_raises(error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "x.png")

    def load(_: object) -> None:
        raise error("odd")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(DataError, match=r"x\.png: not a readable picture \("):
        read_picture(tmp_path / "x.png")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # must not start an interpreter
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("empty", "folder", "script", "broken", "pipe", "missing"):
        with at_most(SECONDS), pytest.raises(DataError, match=rf"{name}\.png"):
            read_picture(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match=r"\\x00|null|cannot be opened"):
        read_picture(tmp_path / "a\0b.png")
    assert "EPS" not in FORMATS


def test_wrong_suffix_is_read_by_content(tmp_path: Path) -> None:
    wanted = np.asarray(picture())
    for suffix in ("jpg", "gif", "bmp", "webp", "tif"):
        (tmp_path / f"x.{suffix}").write_bytes(encoded("PNG", picture()))
        np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / f"x.{suffix}")), wanted)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    upright = picture(32, 48)
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x"
    path.write_bytes(encoded(kind, stored, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    found = read_picture(path)
    assert found.size == (48, 32)
    delta = np.abs(np.asarray(found).astype(int) - np.asarray(upright))
    assert delta.mean() < (8 if kind == "JPEG" else 0.001)


class TestPixelFormats:
    def read(self, tmp_path: Path, image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
        path = tmp_path / "x"
        path.write_bytes(encoded(kind, image, **options))
        found = read_picture(path)
        assert found.mode == "RGB"
        return np.asarray(found)

    def test_transparency_is_laid_over_white(self, tmp_path: Path) -> None:
        pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
        found = self.read(tmp_path, Image.fromarray(pixels, "RGBA"))
        assert found.tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]
        grey = self.read(tmp_path, Image.merge("LA", (Image.new("L", (2, 1), 50), Image.new("L", (2, 1), 0))))
        assert (grey == 255).all()

    def test_transparent_colour_and_palette(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([200, 0, 0, 0, 100, 0])
        image.putpixel((1, 0), 1)
        assert self.read(tmp_path, image).tolist() == [[[200, 0, 0], [0, 100, 0]]]
        assert self.read(tmp_path, image, transparency=1).tolist() == [[[200, 0, 0], [255, 255, 255]]]
        assert self.read(tmp_path, image, "GIF", transparency=0).tolist() == [[[255, 255, 255], [0, 100, 0]]]
        keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
        assert self.read(tmp_path, keyed, transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]

    def test_grey_and_two_tone(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, Image.new("L", (2, 3), 77)).tolist() == [[[77] * 3] * 2] * 3
        assert self.read(tmp_path, Image.new("1", (1, 1), 1)).tolist() == [[[255] * 3]]

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits(self, tmp_path: Path, kind: str) -> None:
        values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
        assert self.read(tmp_path, Image.fromarray(values), kind)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]

    def test_integers_and_floats(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF")[0, :, 0].tolist() == [0, 255]
        for values in (np.array([[0, 65536]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)):
            with pytest.raises(DataError, match="pixels"):
                self.read(tmp_path, Image.fromarray(values), "TIFF")

    def test_cmyk(self, tmp_path: Path) -> None:
        for kind in ("JPEG", "TIFF"):
            found = self.read(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
            assert np.abs(found.astype(int) - (255, 0, 0)).max() < 4

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame(self, tmp_path: Path, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
        options = {"lossless": True} if kind == "WEBP" else {}
        found = self.read(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (found == (255, 0, 0)).all()
