"""Builds the compiled extension after the install, where a compiler has appeared since: `build()`.

Nothing is compiled by surprise: `igpt info --build` and ``backend="ext"`` ask for it, an import and ``backend="auto"`` do not;
IGPT_JIT=0 forbids it. The libraries go to a folder of the user's cache, named by what they were made from. They appear there
in one step, so no process loads half a file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from igpt_kernels._native import build

LIMIT = 600.0
"""Seconds that one build may take, and that another process waits for it; it takes 10 to 30."""


def folder() -> Path:
    """Where the libraries of these sources, for this kind of machine, are or would be."""
    digest = hashlib.sha256(Path(build.__file__).read_bytes())
    for path in sorted(path for path in build.sources().rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    name = f"{digest.hexdigest()[:16]}-torch{build.ABI[1][:6]}-{sys.platform}-{platform.machine()}"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "igpt-kernels" / name


def build_libraries(wanted: Sequence[str]) -> str:
    """Build into `folder()` unless the files `wanted` are there; "" when they are there afterwards, else why they are not.

    Takes 10 to 30 seconds, or as long as another process takes that is at it. Never raises.
    """
    if os.environ.get("IGPT_JIT") == "0":
        return "IGPT_JIT=0 forbids it"
    if build.compiler().reason:
        return build.compiler().reason
    if not build.sources().is_dir():
        return f"its sources are not in {build.sources()}"
    from filelock import FileLock, Timeout

    target = folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One process of a machine builds, the others wait for what it makes; the system drops the lock of a dead process.
        with FileLock(target.with_suffix(".lock"), timeout=LIMIT):
            return "" if _complete(target, wanted) else _build_into(target, wanted)
    except Timeout:  # before OSError, of which it is a kind
        return f"another process has been building for {LIMIT:.0f} seconds"
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
        packages = [str(Path(build.__file__).resolve().parents[2]), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
        command = [sys.executable, "-m", build.__name__, work]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        made = Path(work) / "igpt_kernels"
        if done.returncode != 0 or not _complete(made, wanted):
            return f"the build failed; its output is in {log}"
        if target.exists():  # without a file that is wanted now: moved away whole, for a process may be loading from it
            os.replace(target, Path(work) / "before")
        os.replace(made, target)
    return ""
