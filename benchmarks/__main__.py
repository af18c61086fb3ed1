"""``python -m benchmarks``: measure, report, compare. ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plans
from benchmarks.measure import worker
from benchmarks.plans import Selection
from benchmarks.registry import OURS, PRESETS, RESOLUTIONS, SUITES

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {("cpu", "quick"): 30.0, ("cpu", "default"): 45.0}
LIMIT = 70.0
BUDGET = {"quick": 0.2, "default": 0.4, "full": 1.0}


def parser() -> argparse.ArgumentParser:
    """The options."""
    suites = "; ".join(f"{name}: {text}" for name, text in SUITES.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time, memory and error of this library beside its peers. Every case runs in a process of its own, and is "
        "timed only after its output and gradients agree with the oracle.",
        epilog=f"Suites: {suites}. Examples: python -m benchmarks --quick; python -m benchmarks --suite attention sparse "
        "--shape 2 12 4096 64; python -m benchmarks --compare HEAD~1 --fail-if slower:10%",
    )
    add = made.add_argument
    add("--suite", nargs="+", choices=list(SUITES), default=[], metavar="SUITE", help="all when left out")
    add("--ops", nargs="+", default=[], metavar="OP", help="operations of a suite, for example local2d:7 or rms_norm")
    add("--methods", nargs="+", default=[], metavar="METHOD", help="for example eager sdpa flex flash sparse")
    add("--resolutions", nargs="+", type=int, default=[], metavar="R", help=f"image sides, for example {RESOLUTIONS}")
    add("--presets", nargs="+", choices=list(PRESETS), default=[], metavar="P", help=f"of {', '.join(PRESETS)}")
    add("--shape", nargs=4, type=int, metavar=("B", "H", "T", "D"), help="your own shape instead of presets and resolutions")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="", help="float32 on a CPU, bfloat16 on a GPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a selection: under a minute on two cores, four on a GPU")
    mode.add_argument("--full", action="store_true", help="every case there is; use --minutes and --resume")
    add("--minutes", type=float, help="start no case after so long; --resume goes on later")
    add("--resume", action="store_true", help="keep the rows that --out holds, and measure what is missing")
    add("--limit", type=float, help="wall seconds a case may take (70; on a CPU 45, quick 30)")
    add("--memory", type=float, metavar="GIB", help="memory a case may take (80 %% of what is free)")
    add("--out", type=Path, help="folder for results.jsonl, results.json, results.md and plots (runs/bench/...)")
    add("--report", action="store_true", help="measure nothing: write the report of --out again, and compare it")
    add("--compare", metavar="RUN|REVISION", help="a folder of results, or a git revision: both are measured in turn")
    add("--fail-if", metavar="slower:10%", help="with --compare: exit code 1 if a case of ours is slower by more")
    add("--list", action="store_true", help="print the cases and stop")
    return made


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _out(options: argparse.Namespace, device: str) -> Path:
    if options.out is not None:
        return options.out  # type: ignore[no-any-return]
    from benchmarks.measure import machine

    revision = machine.output("git", "rev-parse", "--short", "HEAD") or "unknown"
    name = machine.slug("cpu") if device == "cpu" else "cuda"
    return ROOT / "runs" / "bench" / name / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{revision}"


def selection(options: argparse.Namespace, device: str) -> Selection:
    """What the options ask for."""
    mode = "quick" if options.quick else "full" if options.full else "default"
    return Selection(
        device,
        mode,
        suites=tuple(options.suite),
        resolutions=tuple(options.resolutions),
        presets=tuple(options.presets),
        methods=tuple(options.methods),
        ops=tuple(options.ops),
        dtype=options.dtype,
        shape=tuple(options.shape) if options.shape else None,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0, 1 when a case of ours failed or `--fail-if` holds, 2 after one line about a user's mistake."""
    # As `igpt` does: GNU OpenMP's threads otherwise spin while they wait, which beside another busy process takes ten times as
    # long. Children inherit it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    made = parser()
    options = made.parse_args(arguments)
    if options.fail_if is not None and not re.fullmatch(r"slower:\d+(\.\d+)?%", options.fail_if):
        made.error(f"--fail-if must be slower:PERCENT, for example slower:10%, got {options.fail_if!r}")
    if options.fail_if is not None and options.compare is None:
        made.error("--fail-if needs --compare: slower than what?")
    if options.report and options.out is None:
        made.error("--report needs --out: the folder to report on")
    device = _device(options.device)
    if device == "cuda" and options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("benchmarks: --device cuda needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
            return 2
    try:
        return _run(options, device, list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the rows so far are kept, --resume goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) went away
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, device: str, arguments: list[str]) -> int:
    from benchmarks.measure.run import Runner, Settings, probe_machine, read
    from benchmarks.report import compare, tables

    wanted = selection(options, device)
    cases = list(plans.plan(wanted))
    if options.list:
        print("\n".join(case.key for case in cases))
        return 0
    if not cases and not options.report:
        raise ValueError("no case fits these options; --list shows what a selection holds")
    if options.compare is not None:
        compare.check(options.compare)
    out = _out(options, device)
    file = out / "results.jsonl"
    memory = None if options.memory is None else int(options.memory * 2**30)
    limit = options.limit or SECONDS.get((device, wanted.mode), LIMIT)
    if options.report:
        lines, code = read(file), 0
    else:
        if file.exists() and not options.resume:
            raise ValueError(f"{file} is there already: --resume goes on with it, another --out leaves it alone")
        settings = Settings(out, limit, BUDGET[wanted.mode], memory, options.minutes, options.resume)
        began = time.monotonic()
        worker.preload(module for case in cases for module in plans.find(case)[1].loads)
        facts = probe_machine(device)
        facts["environment"]["command"] = _recorded(arguments)
        runner = Runner(settings, facts, tables.Printer())
        _greet(facts, len(cases))
        runner.run(cases)
        lines = runner.file.rows
        code = _verdict(tables.latest(lines), runner.left, time.monotonic() - began)
    rows = tables.latest(lines)
    print()
    for sentence in tables.largest(rows):
        print(sentence)
    print(f"{', '.join(tables.write(out, lines))} in {out}")
    if options.compare is not None:
        code = max(code, compare.command(options.compare, lines, options.fail_if, limit, BUDGET[wanted.mode]))
    return code


def _recorded(arguments: list[str]) -> str:
    """The command as results keep it: without the folder they go to, which differs by machine."""
    words = ["python -m benchmarks"]
    skip = False
    for word in arguments:
        if not skip and word != "--out" and not word.startswith("--out="):
            words.append(word)
        skip = word == "--out"
    return " ".join(words)


def _greet(facts: dict[str, Any], count: int) -> None:
    environment, rates = facts["environment"], facts["rates"]
    versions = environment["versions"]
    name = environment.get("gpu") or environment["processor"]
    print(f"{name}, {environment['cores']} cores, torch {versions['torch']}, triton {versions.get('triton', '-')}")
    print(f"matrix product {rates['matmul_tflops']:.3g} TFLOP/s, copy {rates['copy_gbs']:.3g} GB/s; {count} cases", flush=True)


def _verdict(rows: list[dict[str, object]], left: int, took: float) -> int:
    """1 if a method of ours failed; a peer may fail in its compiler."""
    counts: dict[object, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + f"; this took {took / 60:.1f} minutes")
    if left:
        print(f"time is up: {left} cases left; the same command with --resume goes on")
    failed = [row for row in rows if row["status"] == "error"]
    for row in failed:
        print(f"failed: {row['key']}: {row['reason']}")
    return 1 if any(row["method"] in OURS for row in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
