"""CIFAR archives and token files, whole and damaged."""

from __future__ import annotations

import io
import json
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.commands.tokenize import TokenizeOptions, run_tokenize
from igpt.data.batches import TokenBatches
from igpt.data.open import open_source
from igpt.data.orders import order
from igpt.data.tokens import TokenSource
from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette

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


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


class TestTokenFiles:
    def rows(self, n: int = 20, length: int = 16, top: int = 32) -> np.ndarray:
        return np.random.default_rng(0).integers(0, top, (n, length))

    @pytest.mark.parametrize("dtype", ["u1", "i2", "<u2", ">u2", "i4", "i8", "u8"])
    @pytest.mark.parametrize("fortran", [False, True])
    def test_reads_any_integers(self, tmp_path: Path, dtype: str, fortran: bool) -> None:
        rows = self.rows()
        np.save(tmp_path / "x.npy", np.array(rows, dtype=dtype, order="F" if fortran else "C"))
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        assert (source.kind, source.height, source.width, len(source), source.labels) == ("tokens", 4, 4, 20, None)
        assert source.vocab_size == rows.max() + 1
        found = source.tokens([3, 0, 3])
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, rows[[3, 0, 3]])
        assert isinstance(source, TokenSource)
        assert source.palette is None
        with pytest.raises(ConfigError, match="holds tokens"):
            source.images([0])

    def test_split_and_batches(self, tmp_path: Path) -> None:
        rows = np.arange(20 * 16).reshape(20, 16)
        np.save(tmp_path / "x.npy", rows)
        spec = f"tokens:{tmp_path / 'x.npy'}"
        train, val = open_source(spec, split="train", val_fraction=0.25), open_source(spec, split="val", val_fraction=0.25)
        assert (len(train), len(val)) == (15, 5)
        found = np.concatenate([train.tokens(np.arange(15)), val.tokens(np.arange(5))])
        np.testing.assert_array_equal(np.sort(found[:, 0]), rows[:, 0])
        batches = TokenBatches(train, None, 4, seed=3)
        assert torch.equal(batches.batch(9), torch.from_numpy(train.tokens(order(15, 3, 36, 4))))
        assert torch.equal(batches.at([1]), torch.from_numpy(train.tokens([1])))

    def test_is_memory_mapped(self, tmp_path: Path) -> None:
        with (tmp_path / "x.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**13)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2**33)  # 8 GiB that take no space on the disk
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="train", height=64, width=128)
        assert source.tokens([len(source) - 1]).shape == (1, 2**13)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB

    def test_size(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", self.rows(length=12))
        spec = f"tokens:{tmp_path / 'x.npy'}"
        with pytest.raises(ConfigError, match="12 tokens a row"):
            open_source(spec)
        with pytest.raises(ConfigError, match="not 4 x 4"):
            open_source(spec, height=4, width=4)
        source = open_source(spec, height=2, width=6)
        assert (source.height, source.width) == (2, 6)

    def test_tokens_beyond_the_palette(self, tmp_path: Path) -> None:
        rows = self.rows(top=16)
        rows[17, 5] = 40
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        batches = TokenBatches(source, Palette.uniform(27), 20)
        with pytest.raises(DataError, match=r"row 17 holds token 40, expected 0\.\.26"):
            batches.batch(0)
        assert batches.at([16]).shape == (1, 16)
        rows[17, 5] = -1
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        for read in (lambda: source.tokens([17]), lambda: source.vocab_size):
            with pytest.raises(DataError, match="row 17 holds token -1"):
                read()

    def test_row_numbers_are_those_of_the_file(self, tmp_path: Path) -> None:
        rows = np.zeros((20, 16), np.int64)
        rows[:, 0] = np.arange(20) + 100
        np.save(tmp_path / "x.npy", rows)
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="val", val_fraction=0.2)
        (tmp_path / "x.json").write_text(json.dumps({"height": 4, "width": 4, "vocab": 30}))
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="val", val_fraction=0.2)
        with pytest.raises(DataError) as caught:
            source.tokens([0])
        row = int(str(caught.value).partition("row ")[2].partition(" ")[0])
        assert f"holds token {row + 100}," in str(caught.value)

    @pytest.mark.parametrize(
        ("sidecar", "text"),
        [
            ("[]", "expected an object"),
            ("{", "not readable as JSON"),
            ('{"height": 4, "width": 4}', "vocab must be"),
            ('{"height": 4.0, "width": 4, "vocab": 9}', "height must be"),
            ('{"height": true, "width": 16, "vocab": 9}', "height must be"),
            ('{"height": 5, "width": 4, "vocab": 32}', "does not fit"),
            ('{"height": 4, "width": 4, "vocab": 99999}', "vocab must be"),
            ('{"height": 4, "width": 4, "vocab": 32, "classes": 3}', "classes must be"),
            ("\xff", "not readable as JSON"),
        ],
    )
    def test_malformed_sidecar(self, tmp_path: Path, sidecar: str, text: str) -> None:
        np.save(tmp_path / "x.npy", self.rows())
        (tmp_path / "x.json").write_bytes(sidecar.encode("latin-1"))
        with pytest.raises(DataError, match=text) as caught:
            open_source(f"tokens:{tmp_path / 'x.npy'}")
        assert str(tmp_path / "x.json") in str(caught.value)

    @pytest.mark.parametrize(
        "labels", [np.zeros(19, int), np.zeros((20, 1), int), np.full(20, -1), np.zeros(20), np.full(20, 2)]
    )
    def test_malformed_labels(self, tmp_path: Path, labels: np.ndarray) -> None:
        np.save(tmp_path / "x.npy", self.rows())
        (tmp_path / "x.json").write_text(json.dumps({"height": 4, "width": 4, "vocab": 32, "classes": ["a", "b"]}))
        np.save(tmp_path / "x.labels.npy", labels)
        with pytest.raises(DataError, match=r"x\.labels\.npy"):
            open_source(f"tokens:{tmp_path / 'x.npy'}")


class TestTokenize:
    def test_round_trip(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "digits.npy"
        assert run_tokenize(TokenizeOptions("digits", "fit:17", out)) == out
        assert "1,797 images of 8 x 8 in 17 colours, 0.1 MB; mean error 0.00 of 255, PSNR inf dB" in capsys.readouterr().out
        assert sorted(path.name for path in out.parent.iterdir()) == ["digits.json", "digits.labels.npy", "digits.npy"]
        stored, pixels = open_source(f"tokens:{out}", split="all"), open_source("digits", split="all")
        assert isinstance(stored, TokenSource)
        assert np.load(out).dtype == np.uint8
        assert (stored.height, stored.width, stored.vocab_size, stored.classes) == (8, 8, 17, pixels.classes)
        np.testing.assert_array_equal(stored.labels, pixels.labels)
        palette = stored.palette
        assert palette is not None
        everything = np.arange(1797)
        np.testing.assert_array_equal(palette.decode(stored.tokens(everything)), pixels.images(everything))
        np.testing.assert_array_equal(Palette.from_pretrained(tmp_path / "new" / "digits.json").colors, palette.colors)
        part = open_source(f"tokens:{out}", split="val", seed=4)
        np.testing.assert_array_equal(part.labels, open_source("digits", split="val", seed=4).labels)

    def test_damaged_images_have_no_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = tmp_path / "in"
        for i in range(12):
            (root / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 20 * i, np.uint8)).save(root / f"{i % 2}" / f"{i:02}.png")
        (root / "0" / "04.png").write_bytes(b"damaged")
        (root / "1" / "11.png").write_bytes(b"damaged")
        Palette.uniform(512).save(tmp_path / "palette")
        options = TokenizeOptions(f"folder:{root}", str(tmp_path / "palette"), tmp_path / "x.npy", height=4, width=4)
        np.save(tmp_path / "x.npy", np.zeros((1, 1), int))
        with pytest.raises(DataError, match=r"04\.png"):
            run_tokenize(options)
        assert np.load(tmp_path / "x.npy").shape == (1, 1)
        assert not list(tmp_path.glob(".*"))
        run_tokenize(TokenizeOptions(**{**vars(options), "bad_images": "skip"}))
        assert "2 damaged skipped" in capsys.readouterr().out
        stored = np.load(tmp_path / "x.npy")
        assert stored.shape == (10, 16)
        assert stored.dtype == np.uint16
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        assert source.labels.tolist() == [0] * 5 + [1] * 5
        greys = np.array([20 * i for i in (0, 2, 6, 8, 10, 1, 3, 5, 7, 9)])
        np.testing.assert_array_equal(stored[:, 0], np.rint(greys * 7 / 255) * 73)

    def test_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="out must end"):
            run_tokenize(TokenizeOptions("digits", "uniform:8", tmp_path / "x.bin"))
        np.save(tmp_path / "x.npy", np.zeros((3, 4), int))
        with pytest.raises(ConfigError, match="tokens already"):
            run_tokenize(TokenizeOptions(f"tokens:{tmp_path / 'x.npy'}", "uniform:8", tmp_path / "y.npy"))
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="cannot be written"):
            run_tokenize(TokenizeOptions("digits", "uniform:8", tmp_path / "file" / "x.npy"))
