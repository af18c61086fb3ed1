"""What a GPU has to prove: ``make gpu`` (under six minutes) and ``make gpu PARTS="build bench summary"`` (under five).

Parts, each with a limit on its time: `build` (the extension in place; beside it every variant of `tools.kernel_plan` compiled
and checked); `plan` (those variants timed); `adopt` (the fastest as the device's own table, which the next parts run with);
`tests` (marked gpu); `sanitizer` (compute-sanitizer on small calls of every kernel); `bench` (the quick benchmarks); `summary`
(targets beside what was measured). A part that fails or runs out of time costs that part. Everything goes to
``benchmarks/results/<device>/<date>-<revision>/``: environment.json, report.json, a log for each part, plan.jsonl,
results.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from igpt_kernels._native import build as native_build

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""compute-sanitizer's tools, what matters most first; each runs over all of `tools.sanitize`."""


@dataclass(frozen=True)
class Part:
    """One step: its commands, run one after another, and the share of the time that it may take."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    share: float
    together: bool = False
    """Run the commands side by side, each with the whole time of the part."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    status: str
    """``ok``, ``failed``, or ``timeout``."""
    seconds: float
    reason: str
    log: str


def parts(folder: Path) -> list[Part]:
    """All parts, in order; `folder` takes their results."""
    python = sys.executable
    tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))]
    sanitizer = shutil.which("compute-sanitizer") or str(
        Path(native_build.toolkit().path or "/usr/local/cuda") / "bin/compute-sanitizer"
    )
    parallel = (
        ("-n", "12", "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    )  # most of a test's time is the compiler's
    calls = (python, "-m", "tools.sanitize")
    sanitizers = [(sanitizer, "--tool", tool, "--error-exitcode", "9", *calls) for tool in TOOLS]
    plan = (python, "-m", "tools.kernel_plan")
    out = ("--out", str(folder / "plan.jsonl"))
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    return [
        Part("build", (build, (*plan, "check", *out, "--seconds", "95")), 0.30, together=True),
        Part("plan", ((*plan, "time", *out),), 0.26),
        Part("adopt", ((python, "-m", "tools.adopt", str(folder / "plan.jsonl")),), 0.02),
        Part(
            "tests",
            (
                (
                    python,
                    "-m",
                    "pytest",
                    "-q",
                    "--tb=short",
                    "--durations=15",
                    *parallel,
                    "-m",
                    "gpu",
                    f"--junitxml={folder / 'tests.xml'}",
                    *tests,
                ),
            ),
            0.26,
        ),
        Part("sanitizer", tuple(sanitizers), 0.16, together=True),
        Part("bench", ((python, "-m", "benchmarks", "--device", "cuda", "--quick", "--out", str(folder)),), 0.90),
        Part("summary", ((python, "-m", "benchmarks.report.targets", str(folder)),), 0.04),
    ]


def stop(child: subprocess.Popen[bytes], grace: float = 8.0) -> None:
    """End a command and its children: an interrupt first, after which pytest still reports the failures that it has seen."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def run(part: Part, folder: Path, seconds: float) -> Outcome:
    """Run the commands of a part into its log, each for an equal share of the time left."""
    log = folder / f"{part.name}.log"
    start, failures, late = time.monotonic(), [], False
    environment = dict(os.environ)
    if part.name == "sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else memcheck takes the whole cache for one allocation
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    groups = [part.commands] if part.together else [(command,) for command in part.commands]
    with log.open("w", encoding="utf-8") as file:
        for place, group in enumerate(groups):
            limit = (seconds - (time.monotonic() - start)) / (len(groups) - place)
            deadline = time.monotonic() + limit
            children = []
            for command in group:
                file.write(f"$ {' '.join(command)}\n")
                file.flush()
                try:
                    child = subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
                    children.append((command, child))
                except OSError as error:
                    failures.append(f"{command[0]} does not start: {error}")
            for command, child in children:
                try:
                    if code := child.wait(max(0.1, deadline - time.monotonic())):
                        failures.append(f"exit code {code} of {' '.join(command[:5])}")
                except subprocess.TimeoutExpired:
                    stop(child)
                    failures.append(f"not done after {limit:.0f} s: {' '.join(command[:5])}")
                    late = True
    status = "timeout" if late else "failed" if failures else "ok"
    return Outcome(part.name, status, time.monotonic() - start, "; ".join(failures), log.name)


def environment(arguments: Sequence[str]) -> dict[str, object]:
    """Versions, device, clocks and revision of this run."""
    from benchmarks.measure import machine

    return machine.environment("cuda", ["python", "-m", "tools.gpu", *arguments])


def run_all(chosen: Sequence[Part], folder: Path, minutes: float) -> list[Outcome]:
    """Run the parts, each for its share of the time and what earlier ones left of theirs; the report is kept as it grows."""
    outcomes: list[Outcome] = []
    spare = 0.0
    for part in chosen:
        limit = 60 * minutes * part.share / max(1.0, sum(one.share for one in chosen)) + spare
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        outcome = run(part, folder, limit)
        spare = max(0.0, limit - outcome.seconds)
        outcomes.append(outcome)
        report = json.dumps([asdict(one) for one in outcomes], indent=1)
        (folder / "report.json").write_text(report + "\n", encoding="utf-8")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print one screen; 1 if a part failed, 2 without a GPU."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = [part.name for part in parts(Path())]
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description="all checks and benchmarks of a GPU")
    default = [name for name in names if name not in ("bench", "summary")]
    parser.add_argument("--parts", nargs="+", choices=names, default=default, help="all but bench and summary by default")
    parser.add_argument("--minutes", type=float, default=5.5, help="for everything together")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of benchmarks/results/<device>/<run>")
    options = parser.parse_args(given)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    import torch

    if not torch.cuda.is_available():
        print("tools.gpu needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    facts = environment(given)
    stamp = f"{str(facts['date'])[:10]}-{str(facts['revision'])[:7]}"
    folder = options.out or ROOT / "benchmarks" / "results" / str(facts["machine"]) / stamp
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    outcomes = run_all([part for part in parts(folder) if part.name in options.parts], folder, options.minutes)
    for outcome in outcomes:
        tail = (folder / outcome.log).read_text(encoding="utf-8", errors="replace").splitlines()
        lines = tail if outcome.name == "summary" else tail[-3:]
        print(f"\n{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s. {outcome.reason}", *lines, sep="\n  ")
    print(f"\n{sum(one.status == 'ok' for one in outcomes)} of {len(outcomes)} parts are well; everything is in {folder}")
    return 0 if all(one.status == "ok" for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
