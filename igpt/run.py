"""What surrounds a training run: its folder, who may write there, its settings and metrics, and the signals that end it.

config.toml      the resolved settings (TOML; what is left out is None)
metrics.jsonl    one JSON object a line
samples/         PNG grids
checkpoints/     see `igpt.checkpoint`
lock             who writes here now; gone when nobody does
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from igpt.checkpoint import write_durably
from igpt.config import PretrainOptions, from_mapping
from igpt.errors import CheckpointError, ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

CONFIG, METRICS, LOCK = "config.toml", "metrics.jsonl", "lock"
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

    The file `lock` names pid, host and start of the process that holds it, and is held with flock, which the system drops
    when the process dies: the lock of a dead process on this host is taken over. On systems without flock (Windows) only
    the pid is compared.

    Raises:
        CheckpointError: another process holds it (named), or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._handle: int | None = None
        self._made = False

    def __enter__(self) -> RunLock:
        path = self.run / LOCK
        try:
            self._made = not self.run.exists()
            self.run.mkdir(parents=True, exist_ok=True)
            self._handle = self._open(path)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "process_start": _start_of(os.getpid()), "since": _now()}
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(owner).encode(), 0)
        except OSError as error:
            self.__exit__(None, None, None)
            raise CheckpointError(f"out: cannot write into {self.run}: {error.strerror}") from error
        return self

    def _open(self, path: Path) -> int:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            free = _flock(handle)
            try:
                owner = json.loads(os.pread(handle, 4096, 0) or b"{}")
                pid, host = int(owner.get("pid", 0)), str(owner.get("host", ""))
            except (ValueError, AttributeError, TypeError):
                owner, pid, host = {}, 0, ""
            elsewhere = host not in ("", socket.gethostname())
            if not free or elsewhere or (pid != os.getpid() and _runs(pid, owner.get("process_start"))):
                os.close(handle)
                hint = f"; if it is gone for good, delete {path}" if elsewhere else ""
                raise CheckpointError(
                    f"out: another run is writing into {self.run}: process {pid or 'unknown'} on {host or 'this host'}, "
                    f"since {owner.get('since', 'just now')}{hint}"
                )
            try:
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    return handle
            except FileNotFoundError:
                pass  # the owner before us removed the file between our open and our flock
            os.close(handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is None:
            return
        (self.run / LOCK).unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None
        if self._made:
            with contextlib.suppress(OSError):
                self.run.rmdir()  # succeeds only while it is empty: a run that failed before it began leaves nothing


def holds_run(out: Path, resume: bool) -> bool:
    """Whether `out` holds a run to continue; False means that it is free for a new one.

    Raises:
        ConfigError: `out` is a file, or not empty and `resume` was not asked for, or not empty and no run.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file, a folder is wanted")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    names = [name for name in names if name != LOCK and not name.startswith(".tmp-")]
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
        step: keep what is there up to this step and cut off the rest (also a line that a crash cut short); None starts
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


class Stopped(BaseException):
    """A signal asked the run to end, inside `Signals.may_raise`. No `Exception`: decoders catch those of damaged images."""


class Signals:
    """Context manager: the first SIGINT or SIGTERM sets `received` instead of killing; a second one does what it did before.

    Handlers are installed in the main thread only (Python allows no other), leave an ignored signal ignored, and are put
    back on exit.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def may_raise(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` at once: for work that can take minutes and changes nothing, such as sampling."""
        if self.received is not None:
            raise Stopped
        self._raise = True
        try:
            yield
        finally:
            self._raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if self._raise:
            raise Stopped


class Voice:
    """What a run says, on stderr: lines anywhere, bars on a terminal only; nothing at all when not wanted."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __call__(self, text: str) -> None:
        if self.wanted:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    @property
    def live(self) -> bool:
        """Whether somebody watches: progress is wanted and stderr is a terminal."""
        return self.wanted and sys.stderr.isatty()

    def bar(self, total: int, initial: int, what: str, unit: str) -> Any:
        """A tqdm bar."""
        from tqdm import tqdm

        shown = None if self.wanted else True  # None: tqdm looks whether stderr is a terminal
        return tqdm(
            total=total, initial=initial, desc=what, unit=unit, file=sys.stderr, disable=shown, leave=False, dynamic_ncols=True
        )


def _lines_until(path: Path, step: int, without: tuple[str, ...]) -> bytes:
    if not path.exists():
        return b""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            at = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{path} line {number} is not a JSON object with a step: {line[:80]!r}") from error
        if line.endswith(b"\n") and (at < step or (at == step and not any(key in row for key in without))):
            kept.append(line)
    return b"".join(kept)


def _plain(options: PretrainOptions) -> dict[str, Any]:
    """Settings as TOML knows them: paths as strings, tuples as lists."""
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _flock(handle: int) -> bool:
    """Take the lock without waiting; False when another process has it. Where flock does not work, True."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of /proc/PID/stat); None where there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _runs(pid: int, start: object) -> bool:
    """Whether the process that wrote the lock is alive: the same pid and, where it is known, the same start."""
    if pid <= 0 or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    found = _start_of(pid)
    return found is None or start is None or found == start
