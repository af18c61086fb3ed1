"""CIFAR-10 and CIFAR-100 from their binary archives. The pickled "python version" is recognised and refused.

Layout: https://www.cs.toronto.edu/~kriz/cifar.html - records of one label byte (CIFAR-100: coarse, then fine) and 3,072
pixel bytes: 1,024 red, 1,024 green, 1,024 blue, each row by row.
"""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from igpt.data.array import ArraySource
from igpt.errors import DataError
from igpt.files import describe, regular_size

if TYPE_CHECKING:
    from igpt.data.open import Request

_PIXEL_BYTES = 3 * 32 * 32
_MAX_NAMES_BYTES = 65536
# The official archives unpack to 184 MB; a stream that goes on is not one of them.
_MAX_ARCHIVE_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True)
class CifarFormat:
    """Names and sizes of one of the two data sets."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: dict[str, int]
    label_bytes: int
    classes: int
    names: str
    folder: str
    archive: str
    python_signs: tuple[str, ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record: labels and pixels."""
        return self.label_bytes + _PIXEL_BYTES


_CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR10 = CifarFormat(
    name="cifar10",
    train=_CIFAR10_FILES[:5],
    test=_CIFAR10_FILES[5:],
    records=dict.fromkeys(_CIFAR10_FILES, 10_000),
    label_bytes=1,
    classes=10,
    names="batches.meta.txt",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    python_signs=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "test_batch", "batches.meta"),
)
CIFAR100 = CifarFormat(
    name="cifar100",
    train=("train.bin",),
    test=("test.bin",),
    records={"train.bin": 50_000, "test.bin": 10_000},
    label_bytes=2,
    classes=100,
    names="fine_label_names.txt",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    python_signs=("cifar-100-python", "cifar-100-python.tar.gz", "train", "test", "meta"),
)


def open_cifar(request: Request) -> ArraySource:
    """The archive at the request's path; "val" is its test part."""
    form = CIFAR10 if request.scheme == "cifar10" else CIFAR100
    pixels, labels, classes = load_cifar(form, request.path, request.split)
    return ArraySource(request.spec, pixels, labels, classes, request.height, request.width)


def load_cifar(form: CifarFormat, path: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    """Read the "train" or "val" (the archive's test part) images, or "all".

    Args:
        form: `CIFAR10` or `CIFAR100`.
        path: the unpacked folder, the folder that holds it or the .tar.gz; or the .tar.gz itself (read member by member
            in memory; nothing is unpacked to disk).
        split: "train", "val" or "all" (train, then test).

    Returns:
        uint8 [n,32,32,3]; int64 [n] (CIFAR-100: the fine labels); class names (numbers where the archive has no list).

    Raises:
        DataError: missing or extra bytes, a label out of range, a missing file, or the python version.
    """
    wanted = {"train": form.train, "val": form.test, "all": form.train + form.test}[split]
    folder = _folder(form, path)
    files = _from_folder(form, folder, wanted) if folder is not None else _from_archive(form, _archive(form, path), wanted)
    pixels, labels = [], []
    for name in wanted:
        where, data = files[name]
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, form.record_bytes)
        label = records[:, form.label_bytes - 1].astype(np.int64)
        if label.max() >= form.classes:
            row = int(np.argmax(label >= form.classes))
            raise DataError(
                f"{where}: record {row} has label {label[row]}, expected 0..{form.classes - 1}; the file is damaged"
            )
        planes = records[:, form.label_bytes :].reshape(-1, 3, 32, 32)
        pixels.append(planes.transpose(0, 2, 3, 1))
        labels.append(label)
    return np.concatenate(pixels), np.concatenate(labels), _class_names(form, files.get(form.names))


def _folder(form: CifarFormat, path: Path) -> Path | None:
    for folder in (path, path / form.folder):
        if any((folder / name).is_file() for name in form.train + form.test):
            return folder
    return None


def _archive(form: CifarFormat, path: Path) -> Path:
    if path.is_file() and path.name not in form.python_signs:
        return path
    if (path / form.archive).is_file():
        return path / form.archive
    if not path.exists():
        raise DataError(f"{form.name}: {path} does not exist")
    if path.name in form.python_signs or any((path / sign).exists() for sign in form.python_signs):
        raise _python_version(form, path)
    raise DataError(f"{form.name}: {path} holds neither {form.train[0]} nor {form.folder}/ nor {form.archive}")


def _python_version(form: CifarFormat, path: Path) -> DataError:
    return DataError(
        f"{form.name}: {path} is the python version, which is pickled and therefore never read; "
        f"use the binary version, {form.archive}"
    )


def _check_size(form: CifarFormat, where: str, name: str, size: int, start: Callable[[], bytes]) -> None:
    records = form.records[name]
    expected = records * form.record_bytes
    if size == expected:
        return
    if start()[:1] == b"\x80":  # the first opcode of every binary pickle
        raise _python_version(form, Path(where))
    raise DataError(f"{where}: {size:,} bytes, expected {expected:,} ({records:,} records of {form.record_bytes:,})")


def _from_folder(form: CifarFormat, folder: Path, wanted: tuple[str, ...]) -> dict[str, tuple[str, bytes]]:
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        raise DataError(f"{form.name}: {folder} lacks {', '.join(missing)}")
    files = {}
    try:
        for name in wanted:
            path = folder / name
            _check_size(form, str(path), name, regular_size(path), functools.partial(_first_byte, path))
            files[name] = (str(path), path.read_bytes())
        names = folder / form.names
        if names.is_file() and names.stat().st_size <= _MAX_NAMES_BYTES:
            files[form.names] = (str(names), names.read_bytes())
    except OSError as error:
        raise DataError(f"{form.name}: {folder} cannot be read ({describe(error)})") from error
    return files


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _from_archive(form: CifarFormat, path: Path, wanted: tuple[str, ...]) -> dict[str, tuple[str, bytes]]:
    regular_size(path)
    files: dict[str, tuple[str, bytes]] = {}
    seen: list[str] = []
    try:
        # "r|gz" reads once, front to back: a hostile archive can make it neither seek nor write.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                seen.append(name)
                if member.offset_data + member.size > _MAX_ARCHIVE_BYTES or len(seen) > 1000:
                    raise DataError(f"{path}: not a {form.name} archive (too large)")
                if not member.isreg() or name in files or name not in (*wanted, form.names):
                    continue
                where = f"{path}:{member.name}"
                content = archive.extractfile(member)
                if content is None:
                    continue
                if name == form.names and member.size > _MAX_NAMES_BYTES:
                    continue
                if name in wanted:
                    _check_size(form, where, name, member.size, functools.partial(content.read, 1))
                files[name] = (where, content.read())
                if len(files[name][1]) != member.size:
                    raise DataError(f"{where}: the archive ends in the middle of it")
    except DataError:
        raise
    except Exception as error:  # tarfile lets EOFError, zlib.error, OSError, ValueError and its own errors through
        raise DataError(f"{path}: not a readable .tar.gz archive ({describe(error)})") from error
    missing = [name for name in wanted if name not in files]
    if missing and any(name in form.python_signs for name in seen):
        raise _python_version(form, path)
    if missing:
        raise DataError(f"{form.name}: {path} lacks {', '.join(missing)}")
    return files


def _class_names(form: CifarFormat, content: tuple[str, bytes] | None) -> tuple[str, ...]:
    if content is None:
        return tuple(str(i) for i in range(form.classes))
    where, data = content
    names = tuple(line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip())
    if len(names) != form.classes:
        raise DataError(f"{where}: {len(names)} class names, expected {form.classes}")
    return names
