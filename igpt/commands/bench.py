"""The command `igpt bench`: the benchmarks of the source tree, which are no part of the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from igpt.checks import Options
from igpt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class BenchOptions(Options):
    """Options of `igpt bench`: those of `python -m benchmarks`, handed on as they are."""

    arguments: tuple[str, ...] = ()
    """For example --quick, or --suite attention --shape 2 12 4096 64."""


def run_bench(options: BenchOptions) -> int:
    """Run ``python -m benchmarks`` in the source tree that this package lies in; its exit code.

    Raises:
        ConfigError: the package was installed without its source tree.
    """
    if not (ROOT / "benchmarks" / "__main__.py").exists():
        raise ConfigError(f"bench needs the source tree: {ROOT} has no benchmarks/; in a clone run python -m benchmarks")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *options.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
