"""Fit the constants of the cycle model on timed kernels: ``python -m tools.calibrate``, no GPU needed.

Every variant that `tools.kernel_plan` timed on the H100 is compiled again, with the Triton that was timed (3.6.0). Its hot loop
goes through `tools.cycles`. Half of the variants fit three constants: a clock for dense kernels, one for sparse ones, and the
cycles that a program costs beside its loop. The other half gives the error. The result is ``tools/calibration.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import triton

from igpt_kernels.tuning import Config
from tools import speed
from tools.audit import ROWS, compile_only, disassemble, inspect
from tools.kernel_plan import only
from tools.kernels import KERNELS
from tools.sass import hot_loop, read

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
TRITON = "3.6.0"
"""The version that was timed."""
SHARE = 0.8
"""Of the held-out rows that the stated error covers."""
Row = dict[str, Any]
Variant = tuple[str, int, Config]


FIELDS = [field.name for field in fields(Config)]
SPARSE_FILES = ("plan_round_2.jsonl", "plan_256.jsonl")


def timed_rows(paths: Sequence[Path]) -> dict[Variant, dict[str, list[tuple[float, float]]]]:
    """Variant -> layout -> (milliseconds, TFLOP/s) of every time that today's kernels have.

    The first round has rows of two orders of the dense backward kernels; today's is the one with dP first. Rows of sparse
    kernels count where they were timed inside CUDA graphs, with lists that are read a tile ahead.
    """
    found: dict[Variant, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["kind"] != "time" or "median_ms" not in row or row["kernel"] not in speed.ATTENTION or "layout" not in row:
                continue
            if row.get("dp_first", row["kernel"].startswith("flash_backward")) != row["kernel"].startswith("flash_backward"):
                continue
            if speed.family(row["kernel"]) == "sparse" and path.name not in SPARSE_FILES:
                continue
            config = Config(**{name: row[name] for name in FIELDS if name in row})
            found[row["kernel"], row["head_dim"], config][row["layout"]].append((row["median_ms"], row["tflops"]))
    return found


def held_out(variant: Variant) -> bool:
    """Whether a variant is in the half that the fit does not see: by a bit of a hash, so that new rows move no old ones."""
    kernel, head_dim, c = variant
    key = (kernel, head_dim, c.block_m, c.block_n, c.num_warps, c.num_stages, c.maxnreg)  # flags have no cycles, or share them
    return hashlib.sha256(repr(key).encode()).digest()[-1] % 2 == 1


def compiled_cost(variant: Variant) -> speed.Cost | None:
    """Compile one variant and run the model on its hot loop; None where it has no loop of warpgroup products."""
    kernel, head_dim, config = variant
    inputs = KERNELS[kernel].operation.inputs(head_dim, ROWS, torch.bfloat16, "cpu", 0)
    with compile_only("sm_90") as compiled:
        call = KERNELS[kernel].prepare(inputs)
        if KERNELS[kernel].backward:
            with only(kernel, torch.empty(inputs.tensors[0].shape[:3])):  # type: ignore[union-attr]
                call(config, None)
        else:
            call(config, None)
    result = next(result for name, result in reversed(compiled) if name == kernel)
    loop = hot_loop(read(disassemble(result.asm["cubin"])))
    return speed.cost(loop, inspect(result)[0], int(result.metadata.shared), config.num_warps) if loop else None


def rows_of(timed: Mapping[Variant, Mapping[str, Sequence[tuple[float, float]]]]) -> Iterator[Row]:
    """One row for each variant and layout, the mean of its times."""
    for (kernel, head_dim, config), layouts in sorted(timed.items(), key=lambda item: (*item[0][:2], str(item[0][2]))):
        # What descriptors copy is beyond the model, and so are warps of different tasks: rows with a time, and 0 cycles.
        beyond = config.descriptors or config.gluon
        cost = speed.Cost(0, 0.0, 0.0) if beyond else compiled_cost((kernel, head_dim, config))
        if cost is None:
            continue
        for layout, times in sorted(layouts.items()):
            yield {
                "kernel": kernel, "head_dim": head_dim, "config": config.entry, "layout": layout,
                "ms": round(statistics.mean(ms for ms, _ in times), 5),
                "tflops": round(statistics.mean(rate for _, rate in times), 1),
                "programs": cost.programs, "cycles": cost.cycles, "full": cost.full,
                "held_out": held_out((kernel, head_dim, config)),
            }  # fmt: skip


def time_of(row: Row, clock: float, start: float) -> float:
    """Milliseconds that the model gives for a row."""
    config = Config.read(row["config"])
    work = speed.work(row["kernel"], row["head_dim"], config.block_m, config.block_n, row["layout"])
    return speed.milliseconds(speed.Cost(row["programs"], row["cycles"], row["full"]), work, clock, start)


def fit(rows: Sequence[Row]) -> tuple[dict[str, float], float]:
    """The clocks, GHz, and the cycles of a start that make the mean absolute logarithm of predicted over measured least."""
    families = {name: [row for row in rows if speed.family(row["kernel"]) == name] for name in ("dense", "sparse")}

    def at(start: float) -> tuple[float, dict[str, float], float]:
        clocks, loss = {}, 0.0
        for name, chosen in families.items():
            ratios = [math.log(time_of(row, 1.0, start) / row["ms"]) for row in chosen]
            middle = statistics.median(ratios)
            clocks[name] = round(math.exp(middle), 3)
            loss += statistics.mean(abs(ratio - middle) for ratio in ratios)
        return loss, clocks, start

    _, clocks, start = min((at(float(start)) for start in range(0, 20001, 250)), key=lambda found: found[0])
    return clocks, start


def ranks(values: Sequence[float]) -> list[float]:
    """Places of the values in order, from 0; equal ones share the mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation."""
    return statistics.correlation(ranks(first), ranks(second))


def errors(rows: Sequence[Row], clocks: Mapping[str, float], start: float) -> dict[str, Any]:
    """Error of the fit on rows it has not seen; rank correlation of variants of one kernel, size and layout, over all rows."""
    found: dict[str, Any] = {"share": SHARE}
    predicted: Callable[[Row], float] = lambda row: time_of(row, clocks[speed.family(row["kernel"])], start)  # noqa: E731
    for name in ("dense", "sparse"):
        mine = [row for row in rows if speed.family(row["kernel"]) == name]
        off = sorted(abs(row["ms"] / predicted(row) - 1) for row in mine if row["held_out"])
        groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
        for row in mine:
            groups[row["kernel"], row["head_dim"], row["layout"]].append(row)
        orders = [
            spearman([predicted(row) for row in group], [row["ms"] for row in group])
            for group in groups.values()
            if len(group) >= 4
        ]
        found[name] = {
            "rows": len(mine), "held_out": len(off),
            "median": round(statistics.median(off), 3), "p80": round(off[math.ceil(SHARE * len(off)) - 1], 3),
            "largest": round(off[-1], 3), "groups": len(orders), "spearman": round(statistics.mean(orders), 2),
        }  # fmt: skip
    return found


def write(path: Path, rows: Sequence[Row], clocks: Mapping[str, float], start: float) -> None:
    """The calibration as JSON, one row a line."""
    modelled = [row for row in rows if row["cycles"]]
    head = {
        "device": "NVIDIA H100 80GB HBM3 (benchmarks/results/nvidia-h100-80gb-hbm3)", "triton": TRITON, "clock_ghz": clocks,
        "start_cycles": start, "error": errors(modelled, clocks, start),
    }  # fmt: skip
    body = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{body}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, fit and write; 2 with another version of Triton than was timed."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=speed.CALIBRATION)
    parser.add_argument("--refit", action="store_true", help="keep the cycles of --out and fit the constants anew")
    options = parser.parse_args(arguments)
    if options.refit:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            row["held_out"] = held_out((row["kernel"], row["head_dim"], Config.read(row["config"])))
    elif triton.__version__ != TRITON:
        print(f"the timed kernels were compiled by triton {TRITON}; here is {triton.__version__}", file=sys.stderr)
        return 2
    else:
        rows = list(rows_of(timed_rows(sorted(RESULTS.glob("*/plan*.jsonl")))))
    modelled = [row for row in rows if row["cycles"]]
    clocks, start = fit([row for row in modelled if not row["held_out"]])
    write(options.out, rows, clocks, start)
    print(json.dumps({"clock_ghz": clocks, "start_cycles": start, "error": errors(modelled, clocks, start)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
