"""What is made of rows: ratios, the table on the terminal, Markdown, pytest-benchmark's JSON, and the sentence to quote."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.worker import Message
from benchmarks.registry import PEERS, SUITES, WAYS
from benchmarks.report.units import digits, seconds, size

SHORT = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd", "step": "step"}
_SAME = ("preset", "resolution", "batch", "heads", "tokens", "head_dim", "dtype", "device", "way")


def peers_of(row: Message, rows: Iterable[Message]) -> dict[str, Message]:
    """The rows that a row is set against, by method: same shape, dtype and way; a sparse layer against the dense one."""
    layer = row["suite"] == "sparse" and row["op"] != "build"
    suite, op = ("attention", "causal") if layer else (row["suite"], row["op"])
    found = {}
    for other in rows:
        if (
            other["suite"] == suite
            and other["op"] == op
            and other["method"] in PEERS[row["suite"]]
            and all(other[name] == row[name] for name in _SAME)
        ):
            found[other["method"]] = other
    return found


def ratios(row: Message, rows: Iterable[Message]) -> Message:
    """Columns ``ratio`` (time of the peer over one's own) and ``memory_ratio`` (peak of the peer over one's own), by peer."""
    if row["status"] != "ok":
        return {}
    peers = peers_of(row, [*rows, row])
    times = {name: peer["median_s"] / row["median_s"] for name, peer in peers.items() if peer["status"] == "ok"}
    peaks = {
        name: peer["peak_bytes"] / row["peak_bytes"]
        for name, peer in peers.items()
        if peer["status"] == "ok" and peer.get("peak_bytes") and row.get("peak_bytes")
    }
    return {
        "ratio": {name: float(f"{value:.4g}") for name, value in times.items()},
        "memory_ratio": {name: float(f"{value:.4g}") for name, value in peaks.items()},
    }


def image(row: Message) -> str:
    """The size of a case: the image's side, or a number of tokens."""
    return f"{row['resolution']}²" if row["resolution"] else f"{row['tokens']} tokens" if row["preset"] == "custom" else "-"


def achieved(row: Message) -> str:
    """Rate, and the share of the machine's matrix product or copy in the same minute."""
    if row["bound"] == "compute":
        rate = row["tflops"]
        words = f"{digits(rate)} TFLOP/s" if rate >= 1 else f"{digits(1e3 * rate)} GFLOP/s"
    elif row["per"] and row["suite"] != "sample":
        words = f"{digits(row['rate'] / 1e6)} M{row['per']}/s"
    else:
        words = f"{digits(row['gbs'])} GB/s"
    return f"{words} {100 * row['of_machine']:.0f} %" if row["of_machine"] else words


def times_of(row: Message, kind: str, peer: str) -> str:
    """``7.1×`` for a ratio that there is, else nothing."""
    value = row.get(kind, {}).get(peer)
    return f"{digits(value)}×" if value is not None else "-"


def cells(row: Message) -> list[str]:
    """The columns of an ok row: time, spread, n, the two ratios, rate, memory, its ratio, error."""
    first, second = PEERS[row["suite"]]
    spread = f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}"
    return [
        seconds(row["median_s"]),
        spread,
        str(row["n"]),
        times_of(row, "ratio", first),
        times_of(row, "ratio", second),
        achieved(row),
        size(row.get("peak_bytes")),
        times_of(row, "memory_ratio", first),
        f"{row['error_ratio']:.2f}",
    ]


class Printer:
    """Prints rows as they come, under a heading for each operation and size."""

    WIDTHS = (13, 9, 10, 24, 4, 9, 9, 22, 10, 8, 5)

    def __init__(self) -> None:
        self.under: tuple[object, ...] | None = None

    def line(self, values: Sequence[str]) -> str:
        """Columns side by side."""
        return " ".join(value.ljust(width) for value, width in zip(values, self.WIDTHS, strict=True)).rstrip()

    def __call__(self, row: Message) -> None:
        """Print one row."""
        group = tuple(row[name] for name in ("suite", "op", "preset", "tokens", "batch", "dtype"))
        if group != self.under:
            self.under = group
            shape = f"{row['batch']}×{row['heads']}×{row['tokens']}×{row['head_dim']} {row['dtype']}"
            print(f"\n{row['suite']} {row['op']}, {row['preset']}, {image(row)}, {shape}")
            first, second = PEERS[row["suite"]]
            heads = ("method", "way", "median", "p20 to p80", "n", f"×{first}"[:9], f"×{second}"[:9])
            print("  " + self.line([*heads, "rate, of the machine's", "peak", "×memory", "error"]))
        start = (row["method"], SHORT[row["way"]])
        if row["status"] == "ok":
            print("  " + self.line([*start, *cells(row)]), flush=True)
        else:
            print(f"  {start[0]:13} {start[1]:9} {row['status']}: {row['reason']}", flush=True)


def latest(rows: Iterable[Message]) -> list[Message]:
    """One row for each key, the last one, in the order of the keys' first appearance."""
    return list({row["key"]: row for row in rows if row.get("kind") == "row"}.values())


def largest(rows: Sequence[Message]) -> list[str]:
    """The sentences to quote: the largest image that each method reaches, by operation and way, and what stops it.

    Only where some method was stopped. One that no size has stopped reaches "at least" the largest that was tried.
    """
    sentences = []
    kinds = dict.fromkeys(
        (row["suite"], row["op"], row["preset"], row["way"], row["batch"]) for row in rows if row["resolution"]
    )
    for kind in kinds:
        suite, op, preset, way, batch = kind
        if suite not in ("attention", "sparse", "train") or way == "forward":
            continue
        parts, stopped = [], False
        for method in dict.fromkeys(row["method"] for row in rows if (row["suite"], row["op"]) == (suite, op)):
            mine = [
                row
                for row in rows
                if row["method"] == method and (row["suite"], row["op"], row["preset"], row["way"], row["batch"]) == kind
            ]
            good = [row["resolution"] for row in mine if row["status"] == "ok"]
            bad = [row for row in mine if row["status"] in ("oom", "timeout") and row["resolution"] > max(good, default=0)]
            if not good:
                continue
            if bad:
                next_one = min(bad, key=lambda row: row["resolution"])
                stopped = True
                parts.append(f"{method} {max(good)}² ({next_one['resolution']}²: {_stop(next_one)})")
            else:
                parts.append(f"{method} at least {max(good)}²")
        if parts and stopped:
            what = "one layer" if suite != "train" else "a training step"
            pattern = (
                f" of {op} attention" if suite == "sparse" else " of dense causal attention" if suite == "attention" else ""
            )
            sentences.append(
                f"Largest image, {what}{pattern}, Image GPT {preset}, {WAYS[way]}, batch {batch}: " + ", ".join(parts) + "."
            )
    return sentences


def _stop(row: Message) -> str:
    if row["status"] == "oom":
        known = row.get("predicted_bytes")
        return f"out of memory, {size(known)} needed" if known else "out of memory"
    known = row.get("predicted_s")
    return f"{known:.0f} s a call" if known else "too slow"


def markdown(rows: Sequence[Message], suites: Sequence[str] = tuple(SUITES)) -> str:
    """Tables of all rows, one for each suite, operation and preset."""
    lines: list[str] = []
    for suite in suites:
        for op, preset in dict.fromkeys((row["op"], row["preset"]) for row in rows if row["suite"] == suite):
            some = [row for row in rows if (row["suite"], row["op"], row["preset"]) == (suite, op, preset)]
            first, second = PEERS[suite]
            name = op if suite != "palette" else f"palette {op}"
            lines += [f"### {suite}, {name}" + (f", {preset}" if suite != "palette" else ""), ""]
            heads = ["image", "way", "method", "median", "p20 to p80", "n", f"{first} ÷", f"{second} ÷"]
            heads += ["rate, share of the machine's", "peak", f"{first} ÷", "error"]
            lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            for row in some:
                start = [image(row), WAYS[row["way"]], row["method"]]
                if row["status"] == "ok":
                    lines.append("| " + " | ".join([*start, *cells(row)]) + " |")
                else:
                    lines.append("| " + " | ".join([*start, row["status"], _short(row)] + [""] * (len(heads) - 5)) + " |")
            lines.append("")
    return "\n".join(lines)


def _short(row: Message) -> str:
    if row["status"] in ("oom", "timeout"):
        return _stop(row)
    return str(row["reason"]).replace("|", "/")[:80]


def pytest_json(rows: Sequence[Message], environments: Sequence[Message]) -> dict[str, Any]:
    """The ok rows in pytest-benchmark's schema, for its compare tool; memory and ratios are in extra_info."""
    facts = environments[-1]
    benchmarks = []
    for row in rows:
        if row["status"] != "ok":
            continue
        data = row["times_s"]
        ordered = sorted(data)
        quarter = [ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] for share in (0.25, 0.75)]
        mean = statistics.fmean(data)
        deviation = statistics.stdev(data) if len(data) > 1 else 0.0
        stats = {
            "min": ordered[0],
            "max": ordered[-1],
            "mean": mean,
            "stddev": deviation,
            "rounds": len(data),
            "median": row["median_s"],
            "iqr": quarter[1] - quarter[0],
            "q1": quarter[0],
            "q3": quarter[1],
            "iqr_outliers": 0,
            "stddev_outliers": sum(abs(value - mean) > deviation for value in data),
            "outliers": "0;0",
            "ld15iqr": ordered[0],
            "hd15iqr": ordered[-1],
            "ops": 1 / mean if mean else 0.0,
            "total": math.fsum(data),
            "data": data,
            "iterations": 1,
        }
        extra = {name: value for name, value in row.items() if name not in ("times_s", "kind")}
        benchmarks.append(
            {
                "group": group_of(row),
                "name": row["key"],
                "fullname": f"benchmarks/{row['key']}",
                "params": None,
                "param": None,
                "extra_info": extra,
                "options": {"disable_gc": True, "timer": "events" if row["device"] == "cuda" else "perf_counter"},
                "stats": stats,
            }
        )
    return {
        "machine_info": {"node": facts["machine"], "processor": facts["processor"], **facts["versions"]},
        "commit_info": {"id": facts["revision"], "dirty": facts["changed"], "time": facts["date"]},
        "benchmarks": benchmarks,
        "datetime": facts["date"],
        "version": "5.3.1",
    }


def group_of(row: Message) -> str:
    """pytest-benchmark's group: the resolution, so that all methods of a size stand together."""
    return f"{row['suite']} {row['op']} {row['preset']} {image(row)} {WAYS[row['way']]}"


def write(out: Path, lines: Sequence[Message]) -> list[str]:
    """Make ``results.json``, ``results.md`` and plots (where matplotlib is) of the lines of ``results.jsonl``; their names."""
    rows = latest(lines)
    environments = [line for line in lines if line.get("kind") == "environment"]
    (out / "results.json").write_text(json.dumps(pytest_json(rows, environments), indent=1) + "\n", encoding="utf-8")
    facts = environments[-1]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    title = f"# {facts.get('gpu') or facts['processor']}, {facts['cores']} cores\n\n"
    title += f"{versions}; revision {facts['revision'][:12]}, {facts['date'][:10]}.\n"
    sentences = "".join(f"- {sentence}\n" for sentence in largest(rows))
    (out / "results.md").write_text(f"{title}\n{sentences}\n{markdown(rows)}", encoding="utf-8")
    written = ["results.jsonl", "results.json", "results.md"]

    from benchmarks.report import plots

    return written + plots.draw(rows, out)
