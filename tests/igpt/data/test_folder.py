"""Folders of pictures: order, classes, sizes, random crops, and what becomes of damaged files."""

from __future__ import annotations

import functools
import os
import subprocess
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.folder import FolderSource
from igpt.data.images import crop_and_resize, read_picture
from igpt.data.open import open_source
from igpt.data.source import Source
from igpt.errors import ConfigError, DataError
from tests.hostile import SECONDS, at_most
from tests.pictures import encoded, noise, picture


def names(source: object) -> list[str]:
    assert isinstance(source, FolderSource)
    return [source.path(i).name for i in range(len(source))]


class TestFolders:
    def test_stable_order_of_real_pictures(self, photos: Path) -> None:
        source = open_source(f"photos:{photos}", height=8, width=8, split="all")
        assert names(source) == ["a.PNG", "b.png", "c.png", "d.png", "z.png", "e.png"]
        assert source.labels is None
        images = source.images(np.arange(6))
        assert images.shape == (6, 8, 8, 3)
        for i in range(6):
            np.testing.assert_array_equal(images[i], crop_and_resize(read_picture(source.path(i)), 8, 8))

    def test_classes(self, tmp_path: Path) -> None:
        for i, name in enumerate(["cat/1.png", "cat/deep/2.png", "ant/3.png", "bee/4.png"]):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(8, 8, i)).save(tmp_path / name)
        (tmp_path / "empty").mkdir()
        source = open_source(f"folder:{tmp_path}", split="all")
        assert source.classes == ("ant", "bee", "cat")
        assert source.labels.tolist() == [0, 1, 2, 2]
        assert source.labels.dtype == np.int64
        assert names(source) == ["3.png", "4.png", "1.png", "2.png"]
        assert open_source(f"photos:{tmp_path}", split="all").labels is None
        part = open_source(f"folder:{tmp_path}", split="train", val_fraction=0.5)
        assert [{"1": 2, "2": 2, "3": 0, "4": 1}[name[0]] for name in names(part)] == part.read([0, 1]).labels.tolist()

    def test_picture_beside_classes(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        for name in ("cat/a.png", "b.png"):
            Image.fromarray(noise(8, 8)).save(tmp_path / name)
        with pytest.raises(DataError, match=r"b\.png"):
            open_source(f"folder:{tmp_path}")
        (tmp_path / "cat" / "a.png").unlink()
        assert open_source(f"folder:{tmp_path}").labels is None

    def test_one_picture(self, photos: Path) -> None:
        for spec in (f"photos:{photos / 'b.png'}", str(photos / "b.png")):
            source = open_source(spec, height=4, width=6)
            assert len(source) == 1
            assert source.images([0, 0]).shape == (2, 4, 6, 3)

    def test_own_size(self, tmp_path: Path) -> None:
        pictures = [noise(5, 7, i) for i in range(3)]
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        source = open_source(f"photos:{tmp_path}", split="all")
        np.testing.assert_array_equal(source.images([2, 0, 1]), np.stack(pictures)[[2, 0, 1]])
        Image.fromarray(noise(7, 5)).save(tmp_path / "3.png")
        with pytest.raises(DataError, match=r"3\.png: 7 x 5 pixels, but .*0\.png has 5 x 7"):
            open_source(f"photos:{tmp_path}", split="all").images([3])
        skipping = open_source(f"photos:{tmp_path}", split="all", bad_images="skip")
        assert skipping.read([3]).indices.tolist() == [0]
        for seed in range(20):  # some of them hold out the odd picture alone
            assert open_source(f"photos:{tmp_path}", split="val", val_fraction=0.25, seed=seed).height == 5
        Image.fromarray(noise(7, 300)).save(tmp_path / "0.png")
        with pytest.raises(ConfigError, match="height and width"):
            open_source(f"photos:{tmp_path}", split="all")

    def test_links_in_a_ring(self, photos: Path) -> None:
        (photos / "sub" / "up").symlink_to(photos, target_is_directory=True)
        (photos / "link.png").symlink_to(photos / "b.png")
        source = open_source(f"photos:{photos}", height=4, width=4, split="all")
        assert Counter(names(source)) == Counter(["a.PNG", "b.png", "c.png", "d.png", "z.png", "e.png", "link.png"])

    def test_deep_folders(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """1,100 levels, below and beyond the longest path of the system."""
        for name, fits in (("d", True), ("dddddddddd", False)):
            root = tmp_path / name
            root.mkdir()
            handle = os.open(root, os.O_RDONLY)
            for _ in range(1100):
                os.mkdir(name, dir_fd=handle)
                below = os.open(name, os.O_RDONLY, dir_fd=handle)
                os.close(handle)
                handle = below
            file = os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=handle)
            os.write(file, encoded("PNG", picture(4, 4)))
            os.close(file)
            os.close(handle)
            request.addfinalizer(functools.partial(subprocess.run, ["rm", "-rf", str(root)], check=True))  # shutil recurses
            if fits:
                with open_source(f"folder:{root}") as source:
                    assert source.images([0]).shape == (1, 4, 4, 3)
                    assert source.classes == ("d",)
            else:
                with pytest.raises(DataError, match=r"\.\.\./dd.*cannot be read \(OSError: File name too long\)") as caught:
                    open_source(f"folder:{root}")
                assert len(str(caught.value)) < 500

    def test_links_to_themselves_and_to_nothing(self, photos: Path) -> None:
        (photos / "self").symlink_to("self")
        (photos / "self.png").symlink_to("self.png")
        (photos / "gone").symlink_to("nowhere", target_is_directory=True)
        (photos / "up").symlink_to("..", target_is_directory=True)
        with open_source(f"photos:{photos}", height=4, width=4, split="all", bad_images="skip") as source:
            assert names(source).count("b.png") == 1
            source.images(np.arange(len(source)))
            assert source.skipped == 1

    def test_pipes_are_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.png")
        os.mkfifo(tmp_path / "pipe")
        with at_most(SECONDS):
            with pytest.raises(DataError, match=r"x\.png: not a plain file"):
                open_source(f"photos:{tmp_path}")
            for spec in (f"photos:{tmp_path / 'x.png'}", f"folder:{tmp_path / 'pipe'}", str(tmp_path / "x.png")):
                with pytest.raises((DataError, ConfigError), match=r"x\.png|pipe"):
                    open_source(spec)

    def test_names_of_other_encodings_and_with_control_characters(self, tmp_path: Path) -> None:
        """They are read; in messages they are spelled out."""
        for number, name in enumerate((b"pic\xe9.png", b"\x1b[2Jx.png", b"line\nbreak.png", "\u202egnp.png".encode())):
            (tmp_path / os.fsdecode(name)).write_bytes(encoded("PNG", picture(4, 4, number)))
        with open_source(f"photos:{tmp_path}", split="all") as source:
            assert source.images(np.arange(4)).shape == (4, 4, 4, 3)
            for place, shown in enumerate((r"\x1b[2Jx.png", r"pic\udce9.png", r"line\nbreak.png", r"\u202egnp.png")):
                assert isinstance(source, FolderSource)
                path = next(p for p in map(source.path, range(4)) if shown in str(DataError(p)))
                path.write_bytes(b"")
                with pytest.raises(DataError) as caught:
                    source.images([[source.path(i) for i in range(4)].index(path)])
                assert shown in str(caught.value), place
                assert str(caught.value).isprintable()

    def test_close_stops_threads_and_can_go_on(self, photos: Path) -> None:
        present = set(threading.enumerate())
        with open_source(f"photos:{photos}", height=4, width=4, split="all") as source:
            before = source.images(np.arange(6))
            assert set(threading.enumerate()) - present
        assert not set(threading.enumerate()) - present
        np.testing.assert_array_equal(source.images(np.arange(6)), before)
        source.close()


class TestAugment:
    def test_pure_function_of_seed_and_position(self, photos: Path) -> None:
        source = open_source(f"photos:{photos}", height=16, width=16, split="all", augment=True)
        a = source.images([0, 2, 0, 5], seed=3, first=10)
        np.testing.assert_array_equal(a, source.images([0, 2, 0, 5], seed=3, first=10))
        np.testing.assert_array_equal(a[2:], source.images([0, 5], seed=3, first=12))
        assert (a[0] != a[2]).any()
        assert (a != source.images([0, 2, 0, 5], seed=4, first=10)).any()
        plain = open_source(f"photos:{photos}", height=16, width=16, split="all")
        np.testing.assert_array_equal(source.images([0, 2]), plain.images([0, 2]))
        np.testing.assert_array_equal(plain.images([0, 2], seed=3), plain.images([0, 2]))
        source.close()
        plain.close()


ROUNDS = 500


SAVED = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF"}


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
