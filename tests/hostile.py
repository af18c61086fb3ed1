"""What tests of damaged and hostile files share: a limit of time, what may stand in place of a file, a trap for pickles."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0  # a damaged file that takes longer hangs; all others take milliseconds


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


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


SPOILED: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "folder": lambda path: path.mkdir(),
    "nested": lambda path: path.write_text("[" * 100_000),
    "nested TOML": lambda path: path.write_text("a = " + "[" * 100_000),
    "a gigabyte": _sparse,
    "empty": lambda path: path.touch(),
    "huge number": lambda path: path.write_text("1" * 5000),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\x80"),
}
"""What may stand where a file is wanted; each makes it at a path where nothing is."""


def spoil(path: Path, kind: str) -> None:
    """Put one of `SPOILED` in the place of a file."""
    path.unlink(missing_ok=True)
    SPOILED[kind](path)


@contextmanager
def deep_folder(parent: Path, levels: int) -> Iterator[str]:
    """The name of a folder below `parent` with so many levels, not made; what is there in the end is removed.

    pytest's own removal recurses, and fails at a thousand levels.
    """
    try:
        yield "/".join(["d"] * levels)
    finally:
        subprocess.run(["rm", "-rf", str(parent / "d")], check=True)
