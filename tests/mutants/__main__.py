"""Break the kernels one line at a time, in a copy, and show which test catches each break: ``make mutants``.

A suite that stays green with a broken kernel is no suite. Each row names the one test that must fail; a break that gets
through, or a line that is no longer there, makes the command fail. ``python -m tests.mutants norm`` takes one suite.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("attention", "sparse", "norm", "activation", "rows", "loss", "launch", "csrc", "cpu")


def caught(mutant: Mutant, tests: str, copy: Path) -> str:
    """The first test of the file `tests` that fails with this break, or nothing. The copy is whole again afterwards."""
    path = copy / "igpt_kernels" / "_triton" / mutant.file
    source = path.read_text(encoding="utf-8")
    if mutant.old not in source:
        raise SystemExit(f"{mutant.file} has no {mutant.old!r} to break ({mutant.what})")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, tests, "-k", mutant.test],
            cwd=copy, capture_output=True, text=True, check=False,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise SystemExit(f"{mutant.what}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line.split(" - ")[0].rpartition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0] if failed else "the process died" if done.returncode < 0 else ""


def main() -> int:
    """Print the table; 1 if a break got through."""
    parser = argparse.ArgumentParser(description="break the kernels one line at a time and show which test notices")
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all when none is named")
    suites = parser.parse_args().suites or SUITES
    total = survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("igpt_kernels", "tests", "igpt", "csrc", "benchmarks", "tools"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "Makefile"):
            shutil.copy(ROOT / name, copy)
        for suite in suites:
            if suite not in SUITES:
                parser.error(f"suites must be of {', '.join(SUITES)}; got {suite}")
            breaks = importlib.import_module(f"tests.mutants.{suite}")
            for mutant in breaks.MUTANTS:
                test = caught(mutant, breaks.TESTS, copy)
                total += 1
                survived += not test
                print(f"{Path(mutant.file).name:24} {mutant.what:42} {'caught by ' + test if test else 'SURVIVED'}", flush=True)
    print(f"{total - survived} of {total} breaks caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
