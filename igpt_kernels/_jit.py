"""Builds the compiled extension after the install, where a compiler has appeared since: `build()`.

Nothing is compiled by surprise: `igpt info --build` and ``backend="ext"`` ask for it, an import and ``backend="auto"`` do not;
IGPT_JIT=0 forbids it. The libraries go to a folder of the user's cache, named by what they were made from, and
appear there in one step, so no process ever loads half a file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from igpt_kernels import _build

LIMIT = 600.0
"""Seconds that one build may take, and that another process waits for it; it takes 10 to 30."""


def folder() -> Path:
    """Where the libraries of these sources, for this kind of machine, are or would be."""
    digest = hashlib.sha256(Path(_build.__file__).read_bytes())
    for path in sorted(_build.sources().glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    name = f"{digest.hexdigest()[:16]}-torch{_build.ABI[1][:6]}-{sys.platform}-{platform.machine()}"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "igpt-kernels" / name


def build(wanted: Sequence[str]) -> str:
    """Build into `folder()` unless the files `wanted` are there; "" when they are there afterwards, else why they are not.

    Takes 10 to 30 seconds, or as long as another process takes that is at it. Never raises.
    """
    if os.environ.get("IGPT_JIT") == "0":
        return "IGPT_JIT=0 forbids it"
    if _build.compiler().reason:
        return _build.compiler().reason
    if not _build.sources().is_dir():
        return f"its sources are not in {_build.sources()}"
    target = folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            return "" if _complete(target, wanted) else _build_into(target, wanted)
    except OSError as error:
        return f"{target.parent}: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return f"the build took more than {LIMIT:.0f} seconds"


def _complete(target: Path, wanted: Sequence[str]) -> bool:
    return all((target / name).is_file() for name in wanted)


def _build_into(target: Path, wanted: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.partial-") as work:
        log = target.with_suffix(".log")
        environment = {name: value for name, value in os.environ.items() if name != "IGPT_REQUIRE_EXT"}
        packages = [str(Path(_build.__file__).resolve().parents[1]), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
        command = [sys.executable, "-m", _build.__name__, work]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        made = Path(work) / "igpt_kernels"
        if done.returncode != 0 or not _complete(made, wanted):
            return f"the build failed; its output is in {log}"
        if target.exists():  # without a file that is wanted now: moved away whole, for a process may be loading from it
            os.replace(target, Path(work) / "before")
        os.replace(made, target)
    return ""


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` while building; one process of a machine builds, the others wait for what it makes.

    The file names its owner, and a lock whose owner is dead, on this host, or that is older than LIMIT is taken over. Two
    processes can take it over at once: then both build, and the last to finish is seen, so nothing worse than work is lost.
    """
    until = time.monotonic() + LIMIT
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}")
            break
        except FileExistsError:
            if _abandoned(path) or time.monotonic() > until:
                path.unlink(missing_ok=True)
            else:
                time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        host, _, pid = path.read_text(encoding="utf-8").partition(" ")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True
    if not pid.isdigit():
        return age > 5  # its owner had no time to write, or died at once
    return age > LIMIT or (host == socket.gethostname() and not _alive(int(pid)))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
