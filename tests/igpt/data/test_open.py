"""Damaged, hostile and odd files: each ends in a `DataError` that names it or in an image of the right size, and soon.

3,000 corrupted pictures of six formats, made from seeds; pixel formats; bombs; arrays and palettes that are none.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.images import FORMATS, read_picture
from igpt.data.open import open_source
from igpt.data.source import Source
from igpt.errors import CheckpointError, DataError
from igpt.palette.palette import Palette

SECONDS = 5.0  # a damaged file that takes longer hangs; all others take milliseconds
ROUNDS = 500
SAVED = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF"}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise in the main thread when the block is still running after `seconds`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def picture(height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    """Smooth shapes and some noise: compresses like a photograph."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(kind: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def corrupted(data: bytes, others: list[bytes], generator: np.random.Generator) -> bytes:
    """One of ten ways to damage a file."""
    damaged = bytearray(data)
    way = int(generator.integers(10))
    somewhere = int(generator.integers(len(data)))
    if way == 0:
        return data[:somewhere]
    if way == 1:
        for _ in range(int(generator.integers(1, 30))):
            damaged[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
    elif way == 2:  # the header
        for _ in range(int(generator.integers(1, 5))):
            damaged[int(generator.integers(min(64, len(data))))] = int(generator.integers(256))
    elif way == 3:  # numbers in the header, made large
        at = int(generator.integers(min(60, len(data) - 4)))
        damaged[at : at + 4] = generator.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"])
    elif way == 4:
        length = int(generator.integers(1, len(data)))
        damaged[somewhere : somewhere + length] = bytes(len(data[somewhere : somewhere + length]))
    elif way == 5:
        del damaged[somewhere : somewhere + int(generator.integers(1, 50))]
    elif way == 6:
        damaged[somewhere:somewhere] = generator.bytes(int(generator.integers(1, 50)))
    elif way == 7:  # the front of one format, the rest of another
        other = others[int(generator.integers(len(others)))]
        return data[:somewhere] + other[int(generator.integers(len(other))) :]
    elif way == 8:
        return generator.bytes(int(generator.integers(0, 400)))
    else:
        damaged[:] = damaged[:8] + generator.bytes(len(data) - 8)
    return bytes(damaged)


def outcome_of(source: Source, index: int, name: str) -> str:
    try:
        image = source.images([index])
    except DataError as error:
        return "refused" if name in str(error) else f"an error that does not name the file: {error}"
    return "read" if image.shape == (1, 8, 12, 3) and image.dtype == np.uint8 else f"wrong: {image.shape} {image.dtype}"


@pytest.mark.parametrize("suffix", SAVED)
def test_corrupted_pictures(suffix: str, tmp_path: Path) -> None:
    originals = {name: encoded(kind, picture()) for name, kind in SAVED.items()}
    others = list(originals.values())
    generator = np.random.default_rng(sum(suffix.encode()))
    for i in range(ROUNDS):
        (tmp_path / f"{i:04}.{suffix}").write_bytes(corrupted(originals[suffix], others, generator))
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with open_source(f"photos:{tmp_path}", height=8, width=12, split="all") as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says many things about damaged TIFF tags
        assert len(source) == ROUNDS
        for i in range(ROUNDS):
            began = time.perf_counter()
            with at_most(SECONDS):
                outcome = outcome_of(source, i, f"{i:04}.{suffix}")
            outcomes[outcome] += 1
            slowest = max(slowest, time.perf_counter() - began)
    assert slowest < SECONDS
    assert set(outcomes) == {"read", "refused"}
    # Neither everything passes nor everything fails: the damage is real, and so is the reading.
    assert outcomes["refused"] > ROUNDS * 0.3
    assert outcomes["read"] > ROUNDS * 0.02


def test_skipping_through_all_of_them(tmp_path: Path) -> None:
    originals = {name: encoded(kind, picture()) for name, kind in SAVED.items()}
    generator = np.random.default_rng(5)
    for i in range(60):
        (tmp_path / f"{i:02}.bmp").write_bytes(corrupted(originals["bmp"], list(originals.values()), generator))
    good = picture(seed=9)
    good.save(tmp_path / "99.png")
    spec = f"photos:{tmp_path}"
    sizes: dict[str, int] = {"height": 8, "width": 12}
    alone = []
    with open_source(spec, split="all", **sizes) as source:
        for i in range(60):
            try:
                alone.append(source.images([i])[0])
            except DataError:
                alone.append(None)
    bad = [i for i, image in enumerate(alone) if image is None]
    assert 15 < len(bad) < 60
    with at_most(30), open_source(spec, split="all", bad_images="skip", max_bad=len(bad), **sizes) as source:
        batch = source.read(np.arange(60))
        assert source.skipped == len(bad)
        for i, used in enumerate(batch.indices):
            wanted = next(j for j in range(i, 61) if j not in bad)
            assert used == wanted
            if wanted < 60:
                np.testing.assert_array_equal(batch.images[i], alone[wanted])
        again = source.read(np.arange(60)[::-1].copy())
        np.testing.assert_array_equal(again.images, batch.images[::-1])
        assert source.skipped == len(bad)  # each file once
    with open_source(spec, split="all", bad_images="skip", max_bad=len(bad) - 1, **sizes) as source:
        with pytest.raises(DataError) as caught:
            source.read(np.arange(60))
        assert f"{len(bad)} damaged pictures, more than max_bad={len(bad) - 1}" in str(caught.value)
        assert f"{bad[-1]:02}.bmp" in str(caught.value)
    with (
        open_source(spec, split="all", bad_images="skip", max_bad=0, **sizes) as source,
        pytest.raises(DataError, match=rf"{bad[0]:02}\.bmp"),
    ):
        source.read(np.arange(60))


def test_nothing_readable(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    for sizes in ({}, {"height": 4, "width": 4}):
        with at_most(SECONDS), pytest.raises(DataError, match=r"none of its 5 pictures can be read"):
            open_source(f"photos:{tmp_path}", split="all", bad_images="skip", **sizes).images([2])
    for sizes in ({}, {"height": 4, "width": 4}):
        with at_most(SECONDS), pytest.raises(DataError, match=r"0\.png"):
            open_source(f"photos:{tmp_path}", split="all", **sizes).images([0])


def test_skipped_label_is_that_of_the_image_used(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        picture(seed=len(name)).save(tmp_path / name)
    (tmp_path / "b" / "2.png").write_bytes(b"")
    (tmp_path / "c" / "3.png").write_bytes(b"")
    source = open_source(f"folder:{tmp_path}", height=4, width=4, split="all", bad_images="skip")
    batch = source.read([0, 1, 2])
    assert batch.labels.tolist() == [0, 0, 0]
    assert batch.indices.tolist() == [0, 0, 0]
    assert source.skipped == 2


def bomb_png() -> bytes:
    """A valid 60,000 x 60,000 PNG header and a little data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def patched(kind: str, offset: int, form: str, *values: int, **options: object) -> bytes:
    data = bytearray(encoded(kind, picture(), **options))
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": bomb_png,
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


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def bad_arrays(trap: Path) -> dict[str, bytes]:
    def saved(array: np.ndarray, allow_pickle: bool = False) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=allow_pickle)
        return buffer.getvalue()

    def headed(text: str, body: bytes = bytes(64)) -> bytes:
        head = text.encode("latin-1") + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body

    good = saved(np.zeros((4, 16), np.uint8))
    zipped = io.BytesIO()
    np.savez(zipped, np.zeros((4, 16), np.uint8))
    cases = {
        "floats": saved(np.zeros((4, 16))),
        "halves": saved(np.zeros((4, 16), np.float16)),
        "booleans": saved(np.zeros((4, 16), bool)),
        "complex": saved(np.zeros((4, 16), complex)),
        "text": saved(np.full((4, 16), "a")),
        "dates": saved(np.zeros((4, 16), "M8[s]")),
        "records": saved(np.zeros((4, 16), [("a", "u1")])),
        "one dimension": saved(np.zeros(16, np.uint8)),
        "three dimensions": saved(np.zeros((4, 4, 4), np.uint8)),
        "no dimension": saved(np.array(3, np.uint8)),
        "no rows": saved(np.zeros((0, 16), np.uint8)),
        "no columns": saved(np.zeros((4, 0), np.uint8)),
        "objects": saved(np.array([[Trap(trap)] * 16] * 4, dtype=object), True),
        "pickle": pickle.dumps(Trap(trap)),
        "archive": zipped.getvalue(),
        "longer": good + b"\0",
        "later version": good[:6] + b"\x09\x00" + good[8:],
        "header that calls": headed("{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (4, 16)}"),
        "header of another kind": headed("[1, 2]"),
        "header that is no text": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16"),
        "keys missing": headed("{'descr': '|u1', 'shape': (4, 16)}"),
        "unknown type": headed("{'descr': '|q9', 'fortran_order': False, 'shape': (4, 16)}"),
        "object type": headed("{'descr': '|O', 'fortran_order': False, 'shape': (4, 16)}"),
        "huge shape": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 16)}"),
        "overflowing shape": headed("{'descr': '<u8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}"),
        "negative shape": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -16)}"),
        "fractions": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4.0, 16)}"),
        "deep": headed("(" * 5000 + ")" * 5000),
        "long header": headed("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 16)}" + " " * 60000),
        "not an array": b"height,width\n4,16\n",
        "empty": b"",
    }
    return cases | {f"first {n} bytes": good[:n] for n in (1, 6, 8, 9, 10, 60, 127, 128, 150, len(good) - 1)}


@pytest.mark.parametrize("name", bad_arrays(Path()))
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_malformed_arrays(name: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "x.npy"
    path.write_bytes(bad_arrays(trap)[name])
    with at_most(SECONDS), pytest.raises(DataError) as tokens:
        open_source(f"tokens:{path}", height=4, width=4)
    with at_most(SECONDS), pytest.raises(CheckpointError) as palette:
        Palette.from_pretrained(path)
    for caught in (tokens, palette):
        assert str(path) in str(caught.value)
    assert not trap.exists()


def test_array_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npy")
    with at_most(SECONDS), pytest.raises(DataError, match="not a plain file"):
        open_source(f"tokens:{tmp_path / 'x.npy'}")


GOOD = [[-1.0, 0.0, 1.0], [0.5, 0.5, 0.5], [0.25, -0.25, 0.0]]
BAD_PALETTES: dict[str, bytes] = {
    "empty": b"",
    "no json": b"clusters = 3",
    "cut": json.dumps({"clusters": GOOD}).encode()[:-3],
    "two values": b'{"clusters": [[0,0,0],[1,1,1]]} {}',
    "not text": b"\xff\xfe\xff",
    "pickle": pickle.dumps({"clusters": GOOD}),
    "picture": encoded("PNG", picture(4, 4)),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long number": b'{"clusters": [[' + b"9" * 10_000 + b",0,0],[0,0,0]]}",
    "large number": b'{"clusters": [[' + b"9" * 400 + b",0,0],[0,0,0]]}",
    "nan": b'{"clusters": [[NaN,0,0],[0,0,0]]}',
    "infinity": b'{"clusters": [[Infinity,0,0],[0,0,0]]}',
    "minus infinity": b'{"clusters": [[-Infinity,0,0],[0,0,0]]}',
    "overflow": b'{"clusters": [[1e999,0,0],[0,0,0]]}',
    "huge": b'{"clusters": [[0,0,0],[1,1,1]], "x": "' + b"x" * (33 * 2**20) + b'"}',
    **{
        f"top level {value!r:.20}": json.dumps(value).encode()
        for value in (None, 3, "text", [], [GOOD], GOOD, True, {}, {"clusters": None}, {"Clusters": GOOD}, {"size": 32})
    },
    **{
        f"clusters {value!r:.40}": json.dumps({"clusters": value}).encode()
        for value in (
            3,
            "text",
            True,
            {"0": [0, 0, 0]},
            [],
            [[]],
            [[], []],
            [[0, 0, 0]],
            [0, 0, 0],
            [[0, 0], [0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0], [0, 0]],
            [[0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0], None],
            [[0, 0, 0], "abc"],
            [[0, 0, 0], {"r": 0, "g": 0, "b": 0}],
            [[0, 0, 0], ["0", "0", "0"]],
            [[0, 0, 0], [None, 0, 0]],
            [[0, 0, 0], [True, False, True]],
            [[0, 0, 0], [[0], 0, 0]],
            [[[0, 0, 0]], [[1, 1, 1]]],
            [[0, 0, 0], 5],
            [[0, 0, 0], [0, 0, 255]],
            [[0, 0, 0], [0, -1.01, 0]],
            [[128, 128, 128], [0, 0, 0]],
            [[0, 0, 0], [1e308, 0, 0]],
            [[0, 0, 0]] * 65537,
        )
    },
    "other mean": json.dumps({"clusters": GOOD, "image_mean": [0.4, 0.5, 0.5]}).encode(),
    "other deviation": json.dumps({"clusters": GOOD, "image_std": 0.25}).encode(),
}
BAD_CENTERS = {
    "two columns": np.zeros((4, 2)),
    "four columns": np.zeros((4, 4)),
    "transposed": np.zeros((3, 512)),
    "one colour": np.zeros((1, 3)),
    "no colour": np.zeros((0, 3)),
    "too many": np.zeros((65537, 3)),
    "whole numbers": np.zeros((4, 3), np.uint8),
    "nan": np.full((4, 3), np.nan),
    "one infinity": np.array([[0.0, 0, 0], [np.inf, 0, 0]]),
    "0..255": np.full((4, 3), 100.0),
    "one dimension": np.zeros(12),
}


@pytest.mark.parametrize("name", BAD_PALETTES)
def test_malformed_palettes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(BAD_PALETTES[name])
    with at_most(SECONDS), pytest.raises(CheckpointError) as caught:
        Palette.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", BAD_CENTERS)
def test_malformed_centers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kmeans_centers.npy"
    np.save(path, BAD_CENTERS[name])
    with pytest.raises(CheckpointError) as caught:
        Palette.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_palette_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no palette"):
        Palette.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"clusters": GOOD, "image_mean": [0.5] * 3, "image_std": 0.5}))
    assert Palette.from_pretrained(tmp_path).size == 3
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a plain file"):
        Palette.from_pretrained(tmp_path)
