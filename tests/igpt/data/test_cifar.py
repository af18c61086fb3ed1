"""CIFAR archives, whole and damaged."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from igpt.data.open import open_source
from igpt.errors import DataError
from tests.hostile import SECONDS, Trap, at_most

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_batch(path: Path, records: int, label_bytes: int, seed: int) -> np.ndarray:
    """A file of the official size: ten random records, then zeros that the file system need not store."""
    head = np.random.default_rng(seed).integers(0, 256, (10, label_bytes + 3072), dtype=np.uint8)
    head[:, 0] = np.arange(10) if label_bytes == 1 else 7
    head[:, label_bytes - 1] = (np.arange(10) + seed) % 10
    with path.open("wb") as file:
        file.write(head.tobytes())
        file.truncate(records * (label_bytes + 3072))
    return head


@pytest.fixture
def cifar10(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    heads = {name: write_batch(folder / name, 10_000, 1, seed) for seed, name in enumerate(names)}
    (folder / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    return folder, heads


@pytest.fixture
def cifar100(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    heads = {name: write_batch(folder / name, n, 2, n % 7) for name, n in (("train.bin", 50_000), ("test.bin", 10_000))}
    return folder, heads


def to_archive(folder: Path, out: Path, skip: tuple[str, ...] = ()) -> Path:
    with tarfile.open(out, "w:gz", compresslevel=1) as archive:
        for path in sorted(folder.iterdir()):
            if path.name not in skip:
                archive.add(path, f"{folder.name}/{path.name}")
    return out


def pixels_of(record: np.ndarray, label_bytes: int) -> np.ndarray:
    """[32,32,3] written out the long way."""
    image = np.empty((32, 32, 3), np.uint8)
    for channel in range(3):
        for row in range(32):
            start = label_bytes + channel * 1024 + row * 32
            image[row, :, channel] = record[start : start + 32]
    return image


class TestCifar:
    def test_cifar10(self, cifar10: tuple[Path, dict[str, np.ndarray]]) -> None:
        folder, heads = cifar10
        train = open_source(f"cifar10:{folder}", split="train", val_fraction=0.3)
        assert (len(train), train.height, train.width, train.classes) == (50_000, 32, 32, tuple(NAMES10))
        for i in range(5):
            head = heads[f"data_batch_{i + 1}.bin"]
            batch = train.read(10_000 * i + np.arange(10))
            np.testing.assert_array_equal(batch.labels, head[:, 0])
            np.testing.assert_array_equal(batch.images[3], pixels_of(head[3], 1))
        val = open_source(f"cifar10:{folder.parent}", split="val")
        assert len(val) == 10_000
        np.testing.assert_array_equal(val.images([9])[0], pixels_of(heads["test_batch.bin"][9], 1))
        assert val.labels.dtype == np.int64
        whole = open_source(f"cifar10:{folder}", split="all")
        assert len(whole) == 60_000
        np.testing.assert_array_equal(whole.images([50_009]), val.images([9]))

    def test_cifar100_takes_fine_labels(self, cifar100: tuple[Path, dict[str, np.ndarray]]) -> None:
        folder, heads = cifar100
        for path in (folder, folder.parent):
            source = open_source(f"cifar100:{path}", split="val")
            batch = source.read(np.arange(10))
            np.testing.assert_array_equal(batch.labels, heads["test.bin"][:, 1])
            np.testing.assert_array_equal(batch.images[4], pixels_of(heads["test.bin"][4], 2))
        assert source.classes == tuple(str(i) for i in range(100))
        (folder / "fine_label_names.txt").write_text("\n".join(f"fine {i}" for i in range(100)))
        assert open_source(f"cifar100:{folder}", split="val").classes[99] == "fine 99"
        assert len(open_source(f"cifar100:{folder}", split="train")) == 50_000

    def test_archive(self, cifar10: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
        folder, _ = cifar10
        unpacked = open_source(f"cifar10:{folder}", split="val")
        (tmp_path / "packed").mkdir()
        archive = to_archive(folder, tmp_path / "packed" / "cifar-10-binary.tar.gz")
        before = sorted(tmp_path.rglob("*"))
        for path in (archive, archive.parent):
            packed = open_source(f"cifar10:{path}", split="val")
            np.testing.assert_array_equal(packed.images(np.arange(10)), unpacked.images(np.arange(10)))
            np.testing.assert_array_equal(packed.labels, unpacked.labels)
            assert packed.classes == unpacked.classes
        assert sorted(tmp_path.rglob("*")) == before
        whole = archive.read_bytes()
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 2000):
            archive.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz"):
                open_source(f"cifar10:{archive}", split="val")

    def test_resized_like_any_picture(self, cifar10: tuple[Path, dict[str, np.ndarray]]) -> None:
        folder, heads = cifar10
        source = open_source(f"cifar10:{folder}", split="val", height=16, width=16)
        means = pixels_of(heads["test_batch.bin"][2], 1).reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(source.images([2])[0] - means).max() <= 1.0

    def test_hostile_members_are_not_followed(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"\0" * 30_730_000)
        archive = tmp_path / "x.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            link = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(link)
            tar.addfile(tarfile.TarInfo("../../escaped.bin"), io.BytesIO())
        with pytest.raises(DataError, match=r"lacks test_batch\.bin"):
            open_source(f"cifar10:{archive}", split="val")
        assert not (tmp_path.parent.parent / "escaped.bin").exists()

    def test_endless_archive(self, tmp_path: Path) -> None:
        archive = tmp_path / "x.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo("big")
            member.size = 2**40
            tar.addfile(member, None)
        with pytest.raises(DataError, match="too large"):
            open_source(f"cifar10:{archive}")

    def test_malformed(self, cifar10: tuple[Path, dict[str, np.ndarray]]) -> None:
        folder, _ = cifar10
        spec, batch = f"cifar10:{folder}", folder / "test_batch.bin"
        for size in (0, 1, 3073, 30_730_000 - 1, 30_730_000 - 3073, 30_730_000 + 3073):
            with batch.open("rb+") as file:
                file.truncate(size)
            with pytest.raises(DataError, match=r"test_batch\.bin: .*expected 30,730,000"):
                open_source(spec, split="val")
        with batch.open("rb+") as file:
            file.truncate(30_730_000)
            file.seek(3073 * 7)
            file.write(b"\x0a")
        with pytest.raises(DataError, match=r"test_batch\.bin: record 7 has label 10"):
            open_source(spec, split="val")
        (folder / "data_batch_3.bin").unlink()
        with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
            open_source(spec)
        batch.unlink()
        batch.mkdir()
        with pytest.raises(DataError, match="test_batch"):
            open_source(spec, split="val")
        with pytest.raises(DataError, match="holds neither"):
            open_source(f"cifar100:{folder}")
        with pytest.raises(DataError, match="does not exist"):
            open_source(f"cifar10:{folder / 'none'}")

    def test_wrong_class_list(self, cifar10: tuple[Path, dict[str, np.ndarray]]) -> None:
        folder, _ = cifar10
        (folder / "batches.meta.txt").write_text("one\ntwo\n")
        with pytest.raises(DataError, match=r"batches\.meta\.txt: 2 class names"):
            open_source(f"cifar10:{folder}", split="val")
        (folder / "batches.meta.txt").unlink()
        assert open_source(f"cifar10:{folder}", split="val").classes == tuple("0123456789")

    def test_python_version_is_refused_and_never_unpickled(self, tmp_path: Path) -> None:
        trap = tmp_path / "sprung"
        payload = pickle.dumps(Trap(str(trap)))
        for scheme, inner, name in (
            ("cifar10", "cifar-10-batches-py", "data_batch_1"),
            ("cifar100", "cifar-100-python", "train"),
        ):
            folder = tmp_path / inner
            folder.mkdir()
            (folder / name).write_bytes(payload)
            archive = to_archive(folder, tmp_path / f"{scheme}.tar.gz")
            for path in (folder, folder / name, tmp_path, archive):
                with pytest.raises(DataError, match=r"python version.*use the binary version"):
                    open_source(f"{scheme}:{path}")
            binary = tmp_path / f"{scheme}-renamed"
            binary.mkdir()
            wanted = [f"data_batch_{i}.bin" for i in range(1, 6)] if scheme == "cifar10" else ["train.bin"]
            for file in wanted:
                (binary / file).write_bytes(payload)
            with pytest.raises(DataError, match="python version"):
                open_source(f"{scheme}:{binary}")
        assert not trap.exists()


@pytest.mark.parametrize("name", ["data_batch_1.bin", "batches.meta.txt", "cifar-10-binary.tar.gz", ""])
def test_pipes_are_not_waited_for(name: str, cifar10: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    folder = cifar10[0] if name.endswith((".bin", ".txt")) else tmp_path / "other"
    folder.mkdir(exist_ok=True)
    pipe = folder / name if name else tmp_path / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with at_most(SECONDS):
        if name == "batches.meta.txt":  # names of classes are not needed
            assert open_source(f"cifar10:{folder}").classes[0] == "0"
            return
        with pytest.raises(DataError, match=r"cifar10|not a plain file") as caught:
            open_source(f"cifar10:{folder if name else pipe}")
    assert str(caught.value).isprintable()
