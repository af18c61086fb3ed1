"""Two runs or two revisions beside each other: old, new, ratio, and whether the change is beyond chance."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import rounds
from benchmarks.measure.rounds import Pair, Side
from benchmarks.measure.worker import Limits, Message
from benchmarks.registry import OURS, Case
from benchmarks.report import tables, units

ROOT = Path(__file__).resolve().parents[2]


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
    def medians(self) -> tuple[float, float]:
        """Old time and new time."""
        return float(self.old["median_s"]), float(self.new["median_s"])

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
    """Our changes for the worse by more than `percent`, beyond the spread of both; what ran then and fails now is one.

    Peers are not judged: a change of theirs is the machine's, or that of another version.
    """
    return [
        change
        for change in found
        if change.new["method"] in OURS
        and (
            (change.both_ok and change.verdict == "slower" and change.ratio > 1 + percent / 100)
            or (change.old["status"] == "ok" and change.new["status"] in ("error", "oom", "timeout"))
        )
    ]


def table(found: Sequence[Change] | Sequence[Pair]) -> str:
    """Old, new, ratio and verdict of each change."""
    width = max((len(change.key) for change in found), default=4)
    lines = [f"{'case':{width}}  {'old':>10} {'new':>10} {'new/old':>8}"]
    for change in found:
        if change.both_ok:
            old, new = (units.seconds(value) for value in change.medians)
            mark = "" if change.verdict == "same" else f"  {change.verdict}"
            lines.append(f"{change.key:{width}}  {old:>10} {new:>10} {change.ratio:>8.2f}{mark}")
        elif change.verdict != "same":
            last = change.new[-1] if isinstance(change, Pair) else change.new
            lines.append(f"{change.key:{width}}  {change.verdict}: {last.get('reason', '')}")
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


def command(against: str, lines: Sequence[Message], fail_if: str | None, seconds: float, budget: float) -> int:
    """Print the comparison of `lines` with a run or a revision; 1 if `fail_if` (``slower:10%``) holds.

    With the folder of a run, its rows are set beside those of `lines`. A revision is measured now: our cases of `lines`, in
    rounds, this revision and that one in turn; a case may take `seconds`, `budget` of them timing each way.

    Raises:
        ValueError: neither a run nor a revision, or nothing in common.
    """
    percent = 10.0 if fail_if is None else float(fail_if.partition(":")[2].rstrip("%"))
    if Path(against).exists():
        old = read_run(Path(against))
        for difference in differences(old, lines):
            print(f"warning: {difference}")
        found = changes(old, lines)
        if not found:
            raise ValueError(f"{against} and this run have no case in common")
        print("\n" + table(found))
        marked = sum(change.verdict in ("slower", "faster") for change in found)
        print(f"{len(found)} cases in both, {marked} changed beyond the spread of both")
        bad = [change.key for change in slower(found, percent)]
    else:
        environment: Message = next((line for line in reversed(lines) if line.get("kind") == "environment"), {})
        memory = environment.get("limits", {}).get("memory", 1 << 50)
        pairs = measure_revision(against, lines, Limits(seconds, memory, budget), percent)
        print("\n" + table(pairs))
        marked = sum(pair.verdict in ("slower", "faster") for pair in pairs)
        print(f"{len(pairs)} cases of ours in turn with {against}, {marked} changed beyond chance")
        bad = [pair.key for pair in pairs if pair.is_slower(percent)]
    if fail_if is None:
        return 0
    for key in bad:
        print(f"{fail_if}: {key}")
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


def _sources(checkout: Path) -> dict[Path, bytes]:
    """The C++ sources of a checkout, in whatever folder below csrc."""
    folder = checkout / "csrc"
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _extension(path: Path) -> None:
    """The compiled extension of a checkout: today's where its sources are the same, else built."""
    built = list((ROOT / "igpt_kernels").glob("*.so"))
    if built and _sources(path) == _sources(ROOT):
        for file in built:
            shutil.copy2(file, path / "igpt_kernels" / file.name)
    elif built:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=path, check=False, capture_output=True)


def pairs_of(lines: Sequence[Message]) -> list[Pair]:
    """What is measured on both sides: our cases that were started, whatever became of them."""
    rows = [row for row in tables.latest(lines) if row["method"] in OURS and row["status"] != "skipped"]
    return [Pair(row["key"], Case.of(row), row["way"]) for row in rows if "predicted" not in row.get("reason", "")]


def measure_revision(revision: str, lines: Sequence[Message], limits: Limits, percent: float) -> Sequence[Pair]:
    """Measure our cases of `lines` on this checkout and on another revision, with today's benchmarks, in turn.

    Raises:
        ValueError: no such revision, or nothing to measure.
    """
    pairs = pairs_of(lines)
    if not pairs:
        raise ValueError(f"--compare {revision}: this run has no case of ours")
    with worktree(revision) as path, Side(path) as old, Side(ROOT) as new:
        print(f"\nmeasuring {revision} and this checkout in turn", flush=True)
        return rounds.run(old, new, pairs, limits, percent, lambda text: print(text, flush=True))
