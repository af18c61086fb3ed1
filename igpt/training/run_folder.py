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
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from igpt.checks import from_mapping
from igpt.errors import CheckpointError, ConfigError, DataError
from igpt.files import TEMPORARY, json_lines, write_durably
from igpt.training.options import PretrainOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]


CONFIG, METRICS, LOCK, SYSTEM_LOCK = "config.toml", "metrics.jsonl", "lock", ".lock"

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


class RunLock:
    """Context manager: this process alone writes into the folder (made if absent; removed again if left empty).

    The lock is that of filelock, which the system drops when its process dies: a dead owner's lock is free. The file `lock`
    names pid, host and start of the process that holds it. A lock of another host stays valid: it may be a network folder
    on which locks do not work.

    Raises:
        CheckpointError: another process holds it (named), or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock: Any = None
        self._made = False

    def __enter__(self) -> RunLock:
        from filelock import FileLock, Timeout

        try:
            self._made = not self.run.exists()
            self.run.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.run / SYSTEM_LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise self._held(self._owner()) from None
            self._lock = lock
            owner = self._owner()
            if owner.get("host", socket.gethostname()) != socket.gethostname():
                self._release()
                raise self._held(owner, f"; if it is gone for good, delete {self.run / LOCK}")
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            (self.run / LOCK).write_text(json.dumps(mine), encoding="utf-8")
        except OSError as error:
            self.__exit__(None, None, None)
            raise CheckpointError(f"out: cannot write into {self.run}: {error.strerror}") from error
        return self

    def _owner(self) -> dict[str, Any]:
        """What the file `lock` says; empty where it says nothing."""
        try:
            owner = json.loads((self.run / LOCK).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _held(self, owner: dict[str, Any], hint: str = "") -> CheckpointError:
        return CheckpointError(
            f"out: another run is writing into {self.run}: process {owner.get('pid', 'unknown')} on "
            f"{owner.get('host', 'this host')}, since {owner.get('since', 'just now')}{hint}"
        )

    def _release(self) -> None:
        # Removed while it is held: filelock looks whether the file that it locked is still there (since 3.24).
        (self.run / SYSTEM_LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is None:
            return
        with contextlib.suppress(OSError):  # a folder of that name; the lock itself must go
            (self.run / LOCK).unlink(missing_ok=True)
        self._release()
        if self._made:
            with contextlib.suppress(OSError):  # not empty; a run that failed before it began leaves nothing
                self.run.rmdir()


def holds_run(out: Path, resume: bool) -> bool:
    """Whether `out` holds a run to continue; False means that it is free for a new one.

    Raises:
        ConfigError: `out` is a file, or not empty and `resume` was not asked for, or not empty and no run.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file, a folder is wanted")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    names = [name for name in names if name not in (LOCK, SYSTEM_LOCK) and not name.startswith(TEMPORARY)]
    if not names:
        return False
    if CONFIG not in names:
        raise ConfigError(
            f"out: {out} is not empty ({', '.join(names[:3])}) and holds no {CONFIG}: it is no run; name another folder"
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
        write_durably(run / CONFIG, tomli_w.dumps(values).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {run / CONFIG}: {error.strerror}") from error


def read_config(run: Path) -> PretrainOptions:
    """The settings of a run.

    Raises:
        ConfigError: the file is missing or malformed, or holds a setting that does not exist or cannot be.
    """
    path = run / CONFIG
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{run} is no run folder: it holds no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from error
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

    Raises:
        CheckpointError: the file cannot be written, or a line before the last is not JSON.
    """

    def __init__(self, run: Path, step: int | None, without: tuple[str, ...] = ()) -> None:
        self.path = run / METRICS
        try:
            kept = b"" if step is None else _lines_until(self.path, step, without)
            write_durably(self.path, kept)
            self._file: IO[str] = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error

    def write(self, **values: float | int | str | None) -> None:
        """Add a line; floats are written so that they read back bit for bit."""
        try:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error

    def flush_to_disk(self) -> None:
        """fsync; before a checkpoint, so that no checkpoint is newer than the lines it counts on."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, step: int, without: tuple[str, ...]) -> bytes:
    if not path.exists():
        return b""
    try:
        lines = json_lines(path, number="step")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    kept = []
    for line, row in lines:
        at = row["step"]
        if line.endswith(b"\n") and (at < step or (at == step and not any(key in row for key in without))):
            kept.append(line)
    return b"".join(kept)


def _plain(options: PretrainOptions) -> dict[str, Any]:
    """Settings as TOML knows them: paths as strings, tuples as lists."""
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in values.items()}
