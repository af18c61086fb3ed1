"""The folder of a training run: who may write there, its settings and its metrics.

config.toml      the resolved settings (TOML; what is left out is None)
metrics.jsonl    one JSON object a line
samples/         PNG grids
checkpoints/     see `igpt.training.checkpoint`
lock             which process writes here now (.lock is what the system locks); both gone when none does
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from igpt.checks import from_mapping
from igpt.errors import CheckpointError, ConfigError, DataError
from igpt.files import (
    TEMPORARY,
    atomic_path,
    describe,
    json_lines,
    make_folder,
    read_bytes,
    read_json,
    reason,
    write_durably,
)
from igpt.training.options import PretrainOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]


CONFIG, METRICS, LOCK, SYSTEM_LOCK = "config.toml", "metrics.jsonl", "lock", ".lock"
SAMPLES, CHECKPOINTS = "samples", "checkpoints"
_MAX_LOCK_BYTES, _MAX_CONFIG_BYTES = 1 << 16, 1 << 20  # ours take 100 and 1,000

# Fields of metrics.jsonl that differ between two runs of the same settings; all others are equal.
TIME_FIELDS = ("pixels_per_second", "seconds")

# What --resume may change: how long, how often and where, never what is computed. (Other devices, kernels or parts round
# differently; the run goes on, but no longer bit for bit.)
CHANGEABLE = (
    "out",
    "steps",
    "accumulate",
    "val_every",
    "sample_every",
    "samples",
    "checkpoint_every",
    "keep",
    "log_every",
    "device",
    "kernels",
    "deterministic",
    "bad_images",
    "resume",
)


class Place:
    """A run's folder, known by more than its name: it can be moved or removed while the run writes into it.

    Args:
        run: a folder that exists.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._handle: int | None = None
        if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and lets none be moved that holds an open file
            self._handle = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
        self._status = os.stat(run)

    def find(self) -> Path | None:
        """Where the folder is now; None when it is gone, or where the system does not tell."""
        known = [self.run]
        if self._handle is not None:
            with contextlib.suppress(OSError):
                known.append(Path(os.readlink(f"/proc/self/fd/{self._handle}")))
        for path in known:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), self._status):
                    return path
        return None

    def close(self) -> None:
        """Let go of the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class RunLock:
    """Context manager: this process alone writes into the folder (made if absent; removed again if left empty).

    The lock is that of filelock, which the system drops when its process dies: a dead owner's lock is free. The file `lock`
    names pid, host and start of the process that holds it. A lock of another host stays valid: it may be a network folder
    on which locks do not work.

    Raises:
        ConfigError: the folder is a file; or something in it stands where the run writes: a link would lead outside.
        CheckpointError: another process holds it (named), or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock: Any = None
        self._place: Place | None = None
        self._made = False

    def __enter__(self) -> RunLock:
        from filelock import FileLock, Timeout

        name = str(self.run)
        if "\0" in name or name.encode("utf-8", "replace") != os.fsencode(name):
            raise ConfigError(f"out: {name} is no name in UTF-8, which checkpoints need")
        try:
            self._made = not os.path.lexists(self.run)
            if not self._made and not self.run.is_dir():
                what = "a link that leads to no folder" if self.run.is_symlink() else "a file"
                raise ConfigError(f"out: {self.run} is {what}, a folder is wanted")
            make_folder(self.run)
            _check_names(self.run)
            self._place = Place(self.run)
            lock = FileLock(self.run / SYSTEM_LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise self._held(self._owner()) from None
            self._lock = lock
            owner = self._owner()
            if owner.get("host", socket.gethostname()) != socket.gethostname():
                raise self._held(owner, f"; if it is gone for good, delete {self.run / LOCK}")
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            write_durably(self.run / LOCK, json.dumps(mine).encode())
        except OSError as error:
            self.__exit__(None, None, None)
            raise CheckpointError(f"out: cannot write into {self.run}: {reason(error)}") from error
        except BaseException:
            self._leave(self.run)
            raise
        return self

    @property
    def place(self) -> Place:
        """The folder, while it is locked."""
        assert self._place is not None
        return self._place

    def _owner(self) -> dict[str, Any]:
        """What the file `lock` says; empty where it says nothing."""
        try:
            owner = read_json(self.run / LOCK, limit=_MAX_LOCK_BYTES)
        except DataError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _held(self, owner: dict[str, Any], hint: str = "") -> CheckpointError:
        return CheckpointError(
            f"out: another run is writing into {self.run}: process {owner.get('pid', 'unknown')} on "
            f"{owner.get('host', 'this host')}, since {owner.get('since', 'just now')}{hint}"
        )

    def _leave(self, run: Path | None) -> None:
        """Let go of the lock; `run` is where the folder is now."""
        if self._place is not None:
            self._place.close()
            self._place = None
        if self._lock is None:
            return
        if run is not None:
            # Removed while it is held: filelock looks whether the file that it locked is still there (since 3.24).
            with contextlib.suppress(OSError):  # Windows removes no open file
                (run / SYSTEM_LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        run = None if self._place is None else self._place.find()
        if self._lock is not None and run is not None:
            with contextlib.suppress(OSError):  # the lock itself must go
                (run / LOCK).unlink(missing_ok=True)
        self._leave(run)
        if self._made and run is not None:
            with contextlib.suppress(OSError):  # not empty; a run that failed before it began leaves nothing
                run.rmdir()


def _check_names(run: Path) -> None:
    """Raise `ConfigError` where something in the folder is not what the run would write there: a link leads outside."""
    for name in (SYSTEM_LOCK, LOCK, CONFIG, METRICS):
        try:
            status = os.lstat(run / name)
        except FileNotFoundError:
            continue
        # filelock before 4 empties the file that it locks, and with it a second name of that file.
        if not stat.S_ISREG(status.st_mode) or (name == SYSTEM_LOCK and status.st_nlink > 1):
            what = "no plain file" if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)) else "a link"
            raise ConfigError(f"out: {run / name} is {what}; a run writes a file of its own there: move it away")
    for name in (SAMPLES, CHECKPOINTS):  # links to folders are welcome: to one on a larger disk, for example
        if os.path.lexists(run / name) and not (run / name).is_dir():
            raise ConfigError(f"out: {run / name} is no folder; a run writes a folder of its own there: move it away")


def holds_run(out: Path, resume: bool) -> bool:
    """Whether `out` holds a run to continue; False means that it is free for a new one.

    Raises:
        ConfigError: `out` is not empty and `resume` was not asked for, or not empty and no run.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    names = [name for name in names if name not in (LOCK, SYSTEM_LOCK) and not name.startswith(TEMPORARY)]
    if not names:
        return False
    if CONFIG not in names:
        lost = f"; if it was one, put its {CONFIG} back" if CHECKPOINTS in names else ""
        raise ConfigError(
            f"out: {out} is not empty ({', '.join(names[:3])}) and holds no {CONFIG}: it is no run; name another folder{lost}"
        )
    if not resume:
        raise ConfigError(f"out: {out} already holds a run: pass --resume to continue it, or name another folder")
    return True


def write_config(run: Path, options: PretrainOptions) -> None:
    """Write the settings as ``config.toml``, durably; None and `resume` are left out.

    Raises:
        CheckpointError: the file cannot be written.
    """
    import tomli_w

    values = {name: value for name, value in _plain(options).items() if value is not None and name != "resume"}
    try:
        # Paths are bytes on most systems: one that is no UTF-8 comes back as it was.
        write_durably(run / CONFIG, tomli_w.dumps(values).encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise CheckpointError(f"cannot write {run / CONFIG}: {reason(error)}") from error


def read_config(run: Path) -> PretrainOptions:
    """The settings of a run.

    Raises:
        ConfigError: the file is missing or malformed, or holds a setting that does not exist or cannot be.
    """
    path = run / CONFIG
    if not path.exists():
        raise ConfigError(f"{run} is no run folder: it holds no {CONFIG}")
    try:
        values = tomllib.loads(read_bytes(path, _MAX_CONFIG_BYTES).decode("utf-8", "surrogateescape"))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {describe(error)}") from error
    try:
        options: PretrainOptions = from_mapping(PretrainOptions, values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return options


def continued(options: PretrainOptions, saved: PretrainOptions) -> tuple[PretrainOptions, list[str]]:
    """The settings to go on with: those asked for now, where None means "as before", checked against those of the run.

    Returns:
        the settings, and a note for each that changed.

    Raises:
        ConfigError: a setting differs that would change what is computed; each is named with old and new value.
    """
    before = _plain(saved)
    given = {name: value for name, value in _plain(options).items() if value is not None}
    if saved.warmup is not None and options.warmup is None and options.steps < saved.warmup:
        raise ConfigError(f"steps: the run warms up for {saved.warmup} steps and cannot end at {options.steps}")
    new = dataclasses.replace(options, **{name: getattr(saved, name) for name in before if name not in given})
    differ = [name for name, value in _plain(new).items() if value != before[name] and name not in ("out", "resume")]
    said = {name: f"{name}: the run has {before[name]!r}, this command says {given.get(name)!r}" for name in differ}
    refused = [said[name] for name in differ if name not in CHANGEABLE]
    if refused:
        may = ", ".join(name for name in CHANGEABLE if name not in ("out", "resume"))
        raise ConfigError(f"--resume cannot change {'; '.join(refused)} (it may change {may})")
    return new, [f"{name}: {before[name]!r} -> {given[name]!r}" for name in differ]


class Metrics:
    """``metrics.jsonl``: one JSON object a line, handed to the system at once, so that a killed process loses no line.

    Args:
        run: run folder.
        step: keep what is there up to this step, cut off the rest, also a line that a crash cut short; None starts
            an empty file.
        without: keys; a line of exactly `step` that has one of them is cut off too, because it will be written again.

    Attributes:
        last: the step of the last line that was kept; None without any.

    Raises:
        CheckpointError: the file cannot be written, or a line before the last is not JSON.
    """

    def __init__(self, run: Path, step: int | None, without: tuple[str, ...] = ()) -> None:
        self.path = run / METRICS
        self.last: int | None = None
        try:
            with atomic_path(self.path, durable=True) as part, part.open("wb") as file:
                for line, at in () if step is None else _lines_until(self.path, step, without):
                    file.write(line)
                    self.last = at
            self._file: IO[str] = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._failed(error) from error

    def write(self, **values: float | int | str | None) -> None:
        """Add a line; floats are written so that they read back bit for bit."""
        try:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def flush_to_disk(self) -> None:
        """fsync; before a checkpoint, so that no checkpoint is newer than the lines it counts on."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file; a line that a full disk refused before is not tried again."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write {self.path}: {reason(error)}")


def _lines_until(path: Path, step: int, without: tuple[str, ...]) -> Iterator[tuple[bytes, int]]:
    """The lines to keep, each with its step."""
    if not path.exists():
        return
    try:
        for line, row in json_lines(path, number="step"):
            at = row["step"]
            if line.endswith(b"\n") and (at < step or (at == step and not any(key in row for key in without))):
                yield line, at
    except DataError as error:
        raise CheckpointError(f"{error}; to go on without the lines so far, move {path} away") from error


def _plain(options: PretrainOptions) -> dict[str, Any]:
    """Settings as TOML knows them: paths as strings, tuples as lists."""
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in values.items()}
