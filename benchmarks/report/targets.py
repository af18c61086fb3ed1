"""What a run reaches of the targets that the project has set itself: ``python -m benchmarks.report.targets FOLDER``.

``targets.json`` holds them as data: which rows a target is about, the metric, and the values ``must``, ``ambitious`` and
``stretch``. They are stated for one NVIDIA H200, bfloat16, random normal inputs, causal attention. Memory is compared with a
copy on the card that ran (an H200 copies 4.3 TB/s, an H100 3.0). Where several rows match, the worst of them counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.worker import Message
from benchmarks.report.tables import latest

FILE = Path(__file__).parent / "targets.json"
LEVELS = ("must", "ambitious", "stretch")


def load(path: Path = FILE) -> list[dict[str, Any]]:
    """The targets, in order.

    Raises:
        ValueError: an entry without name, metric, match or a value, or with an unknown metric.
    """
    targets: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["targets"]
    for target in targets:
        name = target.get("name", "?")
        missing = [field for field in ("section", "name", "metric", "match") if field not in target]
        if missing or not any(target.get(level) is not None for level in LEVELS):
            raise ValueError(f"target {name!r} of {path} lacks {', '.join(missing) or 'a value'}")
        if target["metric"] not in METRICS:
            raise ValueError(f"target {name!r} of {path} has metric {target['metric']!r}; known: {', '.join(METRICS)}")
    return targets


def fits(row: Message, match: Mapping[str, Any]) -> bool:
    """Whether a row is what a target is about: each field equal, one of a list, or from ``min`` to ``max``.

    Besides columns there are ``rows`` (B·H·T) and ``kv_bytes`` (what decoding reads).
    """
    known = {**row, "rows": row["batch"] * row["heads"] * row["tokens"], "kv_bytes": row.get("bytes")}
    for name, wanted in match.items():
        value = known.get(name)
        if isinstance(wanted, dict):
            if value is None or not wanted.get("min", value) <= value <= wanted.get("max", value):
                return False
        elif isinstance(wanted, list):
            if value not in wanted:
                return False
        elif value != wanted:
            return False
    return True


_SHAPE = ("preset", "batch", "heads", "tokens", "head_dim", "dtype", "device", "way")


def _peer(row: Message, rows: Sequence[Message], which: Mapping[str, Any]) -> Message | None:
    """The ok row that `which` describes, of the same operation, shape and way where it does not say otherwise."""
    wanted = {name: row[name] for name in ("suite", "op", *_SHAPE)} | dict(which)
    found = [other for other in rows if other["status"] == "ok" and fits(other, wanted)]
    return found[-1] if found else None


def _time(row: Message) -> float:
    return float(row.get("graph_s") or row["median_s"])


def _ratio(row: Message, rows: Sequence[Message], target: Mapping[str, Any]) -> float | None:
    """Time of the peer over ours."""
    peer = _peer(row, rows, target["peer"])
    return None if peer is None else _time(peer) / _time(row)


def _memory_percent(row: Message, rows: Sequence[Message], target: Mapping[str, Any]) -> float | None:
    """Our peak beyond what is returned as a percentage of the peer's. Rows of before 2026-11-30 do not say what that was."""
    peer = _peer(row, rows, target["peer"])
    if peer is None or not peer.get("peak_bytes") or row.get("peak_bytes") is None:
        return None
    mine, theirs = (one["peak_bytes"] - (one.get("result_bytes") or 0) for one in (row, peer))
    return 100 * mine / theirs if theirs > 0 else None


def _touched(row: Message) -> float | None:
    """TFLOP/s counted over the pairs of touched tiles, which is what a sparse kernel computes."""
    way = "forward" if row["way"] == "forward" else "backward"
    pairs = row.get(f"touched_{way}")
    if pairs is None:
        return None
    factor = 4 if way == "forward" else 10
    return float(factor * row["batch"] * row["heads"] * pairs * row["head_dim"] / _time(row) / 1e12)


def _touched_percent(row: Message, rows: Sequence[Message], target: Mapping[str, Any]) -> float | None:
    """Rate on touched tiles as a percentage of our dense kernel's rate at the same shape."""
    peer, mine = _peer(row, rows, target["peer"]), _touched(row)
    return None if peer is None or mine is None else 100 * mine / float(peer["tflops"])


def _of_reduction(row: Message, rows: Sequence[Message], target: Mapping[str, Any]) -> float | None:
    """Speed-up over our dense kernel, as a percentage of the reduction of operations."""
    peer = _peer(row, rows, target["peer"])
    return None if peer is None else 100 * (_time(peer) / _time(row)) * float(row["density"])


METRICS: dict[str, tuple[str, Callable[[Message, Sequence[Message], Mapping[str, Any]], float | None]]] = {
    "tflops": ("TF", lambda row, rows, target: row["flops"] / _time(row) / 1e12),
    "ratio": ("×", _ratio),
    "of_copy": ("% of a copy", lambda row, rows, target: 100 * row["bytes"] / _time(row) / 1e9 / row["copy_gbs"]),
    "milliseconds": ("ms", lambda row, rows, target: 1e3 * _time(row)),
    "microseconds": ("µs", lambda row, rows, target: 1e6 * _time(row)),
    "gigapixels": ("Gpix/s", lambda row, rows, target: row["count"] / _time(row) / 1e9),
    "memory_percent": ("% memory", _memory_percent),
    "touched_tflops": ("TF on tiles", lambda row, rows, target: _touched(row)),
    "touched_percent": ("% of dense", _touched_percent),
    "of_reduction": ("% of ideal", _of_reduction),
}
LESS_IS_BETTER = ("milliseconds", "microseconds", "memory_percent")


def measured(target: Mapping[str, Any], rows: Sequence[Message]) -> float | None:
    """The metric over all rows that fit, the worst of them; None where nothing was measured."""
    _, metric = METRICS[target["metric"]]
    values = [metric(row, rows, target) for row in rows if row["status"] == "ok" and fits(row, target["match"])]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return max(known) if target["metric"] in LESS_IS_BETTER else min(known)


def level(target: Mapping[str, Any], value: float) -> str:
    """The highest level that a value reaches, or ``below``."""
    sign = -1 if target["metric"] in LESS_IS_BETTER else 1
    reached = [name for name in LEVELS if target.get(name) is not None and sign * value >= sign * target[name]]
    return reached[-1] if reached else "below"


def summary(targets: Sequence[Mapping[str, Any]], rows: Sequence[Message], *, everything: bool = True) -> str:
    """A line for each target: the three levels, what was measured, the level reached; sections without a row in one line."""
    lines = [f"{'target':58} {'must':>7} {'ambit.':>7} {'stretch':>7} {'measured':>9}"]
    counts = dict.fromkeys((*LEVELS, "below", "not measured"), 0)
    for section in dict.fromkeys(target["section"] for target in targets):
        some = [(target, measured(target, rows)) for target in targets if target["section"] == section]
        lines.append(section)
        missing = 0
        for target, value in some:
            result = "not measured" if value is None else level(target, value)
            counts[result] += 1
            if value is None and not everything:
                missing += 1
                continue
            unit = METRICS[target["metric"]][0]
            values = " ".join(f"{_number(target.get(name)):>7}" for name in LEVELS)
            shown = f"{'':>9}" if value is None else f"{_number(value):>9}"
            lines.append(f"  {target['name']:56} {values} {shown} {unit}, {result}")
        if missing:
            lines.append(f"  {missing} not measured")
    lines.append(", ".join(f"{count} {name}" for name, count in counts.items()) + f" of {len(targets)} targets")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary; 2 where the folder holds no results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.targets", description="what a run reaches of the targets"
    )
    parser.add_argument("folder", type=Path, help="a folder with results.jsonl")
    parser.add_argument("--all", action="store_true", help="also list each target that was not measured")
    options = parser.parse_args(arguments)
    from benchmarks.report.compare import read_run

    try:
        lines = read_run(options.folder)
        targets = load()
    except (ValueError, OSError) as error:
        print(f"benchmarks.report.targets: {error}", file=sys.stderr)
        return 2
    facts = next((line for line in reversed(lines) if line.get("kind") == "environment"), {})
    print(f"{facts.get('gpu') or facts.get('processor')}, revision {str(facts.get('revision'))[:12]}; targets are for one H200")
    print(summary(targets, latest(lines), everything=options.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
