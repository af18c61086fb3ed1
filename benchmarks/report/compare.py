"""Two runs beside each other: old, new, ratio, and whether the change is beyond the spread of both."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure.worker import Message
from benchmarks.report import tables, units

ROOT = Path(__file__).resolve().parents[2]
_VALUE_OPTIONS = {"--out": 1, "--compare": 1, "--fail-if": 1, "--minutes": 1}
_FLAGS = {"--resume", "--report"}


@dataclass(frozen=True)
class Change:
    """One measurement in both runs; ``same`` while the middle 60 % of both overlap, else ``slower`` or ``faster``."""

    key: str
    old: Message
    new: Message

    @property
    def both_ok(self) -> bool:
        """Whether there are two times."""
        return bool(self.old["status"] == "ok" and self.new["status"] == "ok")

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return float(self.new["median_s"] / self.old["median_s"])

    @property
    def verdict(self) -> str:
        """See the class; a status that changed is its own verdict."""
        if not self.both_ok:
            return "same" if self.old["status"] == self.new["status"] else f"{self.old['status']} -> {self.new['status']}"
        if self.new["p20_s"] > self.old["p80_s"]:
            return "slower"
        return "faster" if self.new["p80_s"] < self.old["p20_s"] else "same"


def changes(old: Sequence[Message], new: Sequence[Message]) -> list[Change]:
    """What both runs have, in the order of the new one."""
    before = {row["key"]: row for row in tables.latest(old)}
    return [Change(row["key"], before[row["key"]], row) for row in tables.latest(new) if row["key"] in before]


def differences(old: Sequence[Message], new: Sequence[Message]) -> list[str]:
    """What else changed between two runs: machine, versions, speed of the machine; each is a warning."""
    first, second = (next((line for line in reversed(lines) if line.get("kind") == "environment"), {}) for lines in (old, new))
    found = [
        f"{name} differs: {first.get(name)} and {second.get(name)}"
        for name in ("machine", "processor", "gpu", "cores", "threads", "driver", "table")
        if first.get(name) != second.get(name)
    ]
    versions = first.get("versions", {}), second.get("versions", {})
    for name in sorted({*versions[0], *versions[1]}):
        if versions[0].get(name) != versions[1].get(name):
            found.append(f"{name} differs: {versions[0].get(name)} and {versions[1].get(name)}")
    then, now = (float(line.get("matmul_tflops", 0)) for line in (first, second))
    if then and now and not 0.9 < now / then < 1.1:
        found.append(f"the machine's matrix product reached {then:.3g} TFLOP/s then and {now:.3g} now")
    return found


def slower(found: Sequence[Change], percent: float) -> list[Change]:
    """The changes for the worse by more than `percent`, beyond the spread of both; what ran then and fails now is one."""
    return [
        change
        for change in found
        if (change.both_ok and change.verdict == "slower" and change.ratio > 1 + percent / 100)
        or (change.old["status"] == "ok" and change.new["status"] in ("error", "oom", "timeout"))
    ]


def table(found: Sequence[Change]) -> str:
    """Old, new, ratio and verdict of each change."""
    width = max((len(change.key) for change in found), default=4)
    lines = [f"{'case':{width}}  {'old':>10} {'new':>10} {'new/old':>8}"]
    for change in found:
        if change.both_ok:
            old, new = units.seconds(change.old["median_s"]), units.seconds(change.new["median_s"])
            mark = "" if change.verdict == "same" else f"  {change.verdict}"
            lines.append(f"{change.key:{width}}  {old:>10} {new:>10} {change.ratio:>8.2f}{mark}")
        elif change.verdict != "same":
            lines.append(f"{change.key:{width}}  {change.verdict}: {change.new.get('reason', '')}")
    return "\n".join(lines)


def check(against: str) -> None:
    """Find out before the run that there is nothing to compare with.

    Raises:
        ValueError: neither a run nor a revision.
    """
    if Path(against).exists():
        read_run(Path(against))
        return
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{against}^{{commit}}"]
    if subprocess.run(git, capture_output=True, check=False).returncode:
        raise ValueError(f"--compare: {against} is neither a folder of results nor a git revision")


def command(against: str, lines: Sequence[Message], fail_if: str | None, arguments: Sequence[str]) -> int:
    """Print the comparison of `lines` with a run or a revision; 1 if `fail_if` (``slower:10%``) holds.

    Raises:
        ValueError: neither a run nor a revision, or nothing in common.
    """
    old = read_run(Path(against)) if Path(against).exists() else measure_revision(against, arguments)
    for difference in differences(old, lines):
        print(f"warning: {difference}")
    found = changes(old, lines)
    if not found:
        raise ValueError(f"{against} and this run have no case in common")
    print("\n" + table(found))
    marked = [change for change in found if change.verdict in ("slower", "faster")]
    print(f"{len(found)} cases in both, {len(marked)} changed beyond the spread of both")
    if fail_if is None:
        return 0
    bad = slower(found, float(fail_if.partition(":")[2].rstrip("%")))
    for change in bad:
        print(f"{fail_if}: {change.key}")
    return 1 if bad else 0


def read_run(path: Path) -> list[Message]:
    """The lines of a run: its folder, or its ``results.jsonl``.

    Raises:
        ValueError: no results there.
    """
    from benchmarks.measure.run import read

    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} holds no results.jsonl")
    return read(file)


def selected(arguments: Sequence[str]) -> list[str]:
    """The options that choose what is measured: those of the comparison and of the output left out."""
    kept, skip = [], 0
    for word in arguments:
        if skip:
            skip -= 1
        elif word.partition("=")[0] in _VALUE_OPTIONS:
            skip = 0 if "=" in word else _VALUE_OPTIONS[word]
        elif word not in _FLAGS:
            kept.append(word)
    return kept


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A throw-away checkout of a revision with today's benchmarks in it, built as it must be.

    Raises:
        ValueError: no such revision.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        done = subprocess.run(
            [*git, "worktree", "add", "--detach", str(path), revision], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(f"{revision} is neither a folder of results nor a git revision: {done.stderr.strip()}")
        try:
            shutil.rmtree(path / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
            _extension(path)
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(path)], capture_output=True, check=False)


def _extension(path: Path) -> None:
    """The compiled extension of a checkout: today's where its sources are the same, else built."""
    built = list((ROOT / "igpt_kernels").glob("*.so"))
    same = all(
        (path / "csrc" / file.name).exists() and (path / "csrc" / file.name).read_bytes() == file.read_bytes()
        for file in (ROOT / "csrc").iterdir()
    )
    if built and same:
        for file in built:
            shutil.copy2(file, path / "igpt_kernels" / file.name)
    elif built:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=path, check=False, capture_output=True)


def measure_revision(revision: str, arguments: Sequence[str]) -> list[Message]:
    """Measure the same selection at another revision of the kernels, with today's benchmarks, on this machine, now.

    Raises:
        ValueError: no such revision, or nothing was measured.
    """
    with worktree(revision) as path, tempfile.TemporaryDirectory() as folder:
        print(f"\nmeasuring {revision} the same way", flush=True)
        # The folder of the module comes first on the path, so that the checkout's packages win over the installed ones.
        subprocess.run(
            [sys.executable, "-m", "benchmarks", *selected(arguments), "--out", folder],
            cwd=path,
            check=False,
            env={**os.environ, "PYTHONPATH": str(path)},
            stdout=subprocess.DEVNULL,
        )
        if not (Path(folder) / "results.jsonl").exists():
            raise ValueError(f"nothing could be measured at {revision}")
        return read_run(Path(folder))
