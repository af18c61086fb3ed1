"""Numbers of README and docs from the committed rows: ``python -m benchmarks.report.pages`` writes them between markers.

A page asks for a part by ``<!-- numbers: NAME -->`` and ends it by ``<!-- end -->``; `PARTS` says what each is made of.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.measure.worker import Message
from benchmarks.registry import WAYS
from benchmarks.report import plots, tables, units
from benchmarks.report.compare import read_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-x86_64-2-cores"
GPU_RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
"""One folder a run; `newest` is the one that pages show."""
PAGES = ("README.md", "docs/performance.md", "docs/patterns.md")
MARKED = re.compile(r"(<!-- numbers: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LABELS = {
    "ext": "this library, C++",
    "torch": "this library, torch",
    "scipy": "scipy cKDTree",
    "cdist": "torch.cdist",
    "pillow": "Pillow, 256 colours",
    "transformers": "transformers `color_quantize`",
    "eager": "eager (softmax of a T × T matrix)",
    "sdpa": "torch SDPA",
    "flex": "FlexAttention, compiled",
    "flash": "`flash_attention`",
    "sparse": "`block_sparse_attention`",
}


class Results:
    """The rows of a run, to be asked for by their columns."""

    def __init__(self, lines: Sequence[Message]) -> None:
        self.rows = tables.latest(lines)
        self.facts = [line for line in lines if line.get("kind") == "environment"][-1]

    def all(self, **wanted: object) -> list[Message]:
        """The rows whose columns have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def one(self, **wanted: object) -> Message | None:
        """The first of them."""
        return next(iter(self.all(**wanted)), None)


def newest(folder: Path) -> Path:
    """Of a folder of runs the one with benchmark rows whose date is the latest."""
    runs = [path.parent for path in folder.glob("*/results.jsonl")]
    return max(runs, key=lambda run: str(Results(read_run(run)).facts["date"]))


def _time(row: Message | None) -> str:
    """A time, or what became of it."""
    if row is None:
        return "-"
    return units.seconds(row["median_s"]) if row["status"] == "ok" else _fate(row)


def _fate(row: Message) -> str:
    if row["status"] == "oom":
        needed = row.get("predicted_bytes")
        return f"out of memory ({units.size(needed)})" if needed else "out of memory"
    if row["status"] == "timeout":
        expected = row.get("predicted_s")
        return f"({units.seconds(expected)}, predicted)" if expected else "too slow"
    return str(row["status"])


def _peak(row: Message | None) -> str:
    if row is None:
        return "-"
    if row["status"] == "ok":
        return units.size(row.get("peak_bytes"))
    return f"({units.size(row['predicted_bytes'])}, predicted)" if row.get("predicted_bytes") else "-"


def conditions(results: Results) -> str:
    """Machine, versions and revision in a sentence."""
    facts = results.facts
    versions = facts["versions"]
    peers = "".join(f", {name} {versions[name]}" for name in ("transformers", "scipy", "pillow") if name in versions)
    return (
        f"Measured {facts['date'][:10]} on {facts['cores']} cores of an {facts['processor']} (no GPU), "
        f"torch {versions['torch']}{peers}; "
        f"a matrix product reached {1e3 * facts['matmul_tflops']:.0f} GFLOP/s, a copy {facts['copy_gbs']:.0f} GB/s.\n"
    )


def attention(results: Results) -> str:
    """One layer, forward and backward: a row a method, a column a size."""
    return _layers(results, "one layer, forward + backward", _time)


def memory(results: Results) -> str:
    """Peak memory of the same layers."""
    return _layers(results, "peak beyond inputs, forward + backward", _peak)


def _layers(results: Results, title: str, cell: Callable[[Message | None], str]) -> str:
    sides = (32, 64, 128, 256)
    lines = [f"| {title} | " + " | ".join(f"{side}²" for side in sides) + " |", "|---|" + "---|" * len(sides)]
    methods = [("attention", "causal", name) for name in ("eager", "sdpa", "flash")] + [("sparse", "local2d:7", "sparse")]
    for suite, op, method in methods:
        rows = [results.one(suite=suite, op=op, method=method, preset="S", resolution=side, way="both") for side in sides]
        name = LABELS[method] + (f", `{op}`" if suite == "sparse" else "")
        lines.append(f"| {name} | " + " | ".join(cell(row) for row in rows) + " |")
    return "\n".join(lines) + "\n"


def palette(results: Results) -> str:
    """Pixels to tokens, the fastest first."""
    lines = ["| 512 colours, int64 tokens | time | million pixels/s | transformers' time ÷ |", "|---|---|---|---|"]
    rows = results.all(suite="palette", op="lookup", resolution=256)
    for row in sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_s"]):
        ratio = row["ratio"].get("transformers")
        shown = "-" if ratio is None else f"{units.digits(ratio)}×"
        rate = units.digits(row["rate"] / 1e6)
        lines.append(f"| {LABELS[row['method']]} | {units.seconds(row['median_s'])} | {rate} | {shown} |")
    made = results.one(suite="palette", op="table", method="ext")
    text = "\n".join(lines) + "\n"
    if made is not None and made["status"] == "ok":
        text += f"\nThe table of all 16,777,216 answers is made once for a palette, in {units.seconds(made['median_s'])}.\n"
    return text


def sparse(results: Results) -> str:
    """Patterns beside FlexAttention with the same mask and torch's dense kernel."""
    lines = ["| pattern, image | ours, forward | SDPA, dense | FlexAttention | ours, with backward | SDPA, dense |"]
    lines.append("|---|---|---|---|---|---|")
    sizes = [(row["op"], row["resolution"]) for row in results.all(suite="sparse", method="sparse", preset="S", way="forward")]
    for op, side in dict.fromkeys(sizes):
        cells = []
        for way, peers in (("forward", ("sdpa", "flex")), ("both", ("sdpa",))):
            mine = results.one(suite="sparse", op=op, method="sparse", preset="S", resolution=side, way=way)
            cells.append(_time(mine))
            for peer in peers:
                suite = ("sparse", op) if peer == "flex" else ("attention", "causal")
                theirs = results.one(suite=suite[0], op=suite[1], method=peer, preset="S", resolution=side, way=way)
                cells.append(_against(theirs, mine))
        lines.append(f"| `{op}`, {side}² | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _against(theirs: Message | None, mine: Message | None) -> str:
    if theirs is None or mine is None or theirs["status"] != "ok" or mine["status"] != "ok":
        return _time(theirs)
    return f"{_time(theirs)} ({theirs['median_s'] / mine['median_s']:.2g}×)"


def models(results: Results) -> str:
    """Training steps and sampling of whole models."""
    lines = ["| model, image | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for suite, way, words in (("train", "step", "training step"), ("sample", "forward", "one more pixel")):
        sizes = dict.fromkeys((row["preset"], row["resolution"]) for row in results.all(suite=suite))
        for preset, side in sizes:
            rows = [results.one(suite=suite, method=method, preset=preset, resolution=side, way=way) for method in MODELS]
            cells = [_time(row) + _kept(row, suite) for row in rows]
            lines.append(f"| {words}, {preset}, {side}² | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _kept(row: Message | None, suite: str) -> str:
    """The peak memory of a training step, behind its time."""
    return f", {_peak(row)}" if row is not None and row["status"] == "ok" and suite == "train" else ""


MODELS = ("hf-eager", "hf-compile", "hf-kernels", "plain", "kernels", "sparse")


def slower(results: Results) -> str:
    """Every case in which one of ours takes longer than a peer."""
    lines = ["| case | ours | peer | ours ÷ peer |", "|---|---|---|---|"]
    ours = {"flash": ("eager", "sdpa", "flex"), "sparse": ("flex", "eager", "sdpa"), "decode": ("eager", "sdpa")}
    ours |= {"ours": ("eager", "torch", "compile"), "kernels": ("plain", "hf-eager"), "ext": ("scipy", "pillow", "cdist")}
    for row in results.rows:
        if row["status"] != "ok" or row["method"] not in ours:
            continue
        same = [
            other for other in results.rows if other["key"] != row["key"] and _alike(row, other) and other["status"] == "ok"
        ]
        for other in same:
            if other["method"] in ours[row["method"]] and other["p80_s"] < row["p20_s"]:
                name = f"{row['suite']} {row['op']}, {row['preset']}, {tables.image(row)}, {WAYS[row['way']]}"
                share = row["median_s"] / other["median_s"]
                lines.append(f"| {name} | {row['method']} {_time(row)} | {other['method']} {_time(other)} | {share:.2f}× |")
    return ("\n".join(lines) if len(lines) > 2 else "None beyond the spread of both.") + "\n"


def _alike(row: Message, other: Message) -> bool:
    same = all(row[name] == other[name] for name in ("preset", "resolution", "batch", "tokens", "dtype", "way"))
    dense = row["suite"] == "sparse" and other["suite"] == "attention" and row["op"] != "build"
    return same and (dense or (row["suite"], row["op"]) == (other["suite"], other["op"]))


def reach(results: Results) -> str:
    """The sentences about the largest image."""
    return "".join(f"- {sentence}\n" for sentence in tables.largest(results.rows))


def everything(results: Results) -> str:
    """All tables."""
    return tables.markdown(results.rows)


GPU_COLUMNS = {
    "plain or eager": ("plain", "eager"),
    "torch's choice": ("sdpa",),
    "torch, FlashAttention-2": ("sdpa-flash",),
    "torch, cuDNN": ("sdpa-cudnn",),
    "FlexAttention": ("flex",),
}


def gpu(results: Results) -> str:
    """What a GPU run timed: ours, and every peer with the same case; of dense attention beside sparse patterns too."""
    facts, versions = results.facts, results.facts["versions"]
    text = (
        f"Measured {facts['date'][:10]} on an {facts['gpu']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"bfloat16; a matrix product reached {facts['matmul_tflops']:.0f} TFLOP/s, a copy {facts['copy_gbs']:.0f} GB/s.\n\n"
        f"| case | ours | {' | '.join(GPU_COLUMNS)} |\n|---|---|{'---|' * len(GPU_COLUMNS)}\n"
    )
    for row in results.rows:
        # Forward and backward in one; of what has no backward, its one time.
        way = {"decode": "forward", "sample": "forward", "train": "step"}.get(row["suite"], "both")
        if row["method"] not in ("flash", "sparse", "decode", "ours", "kernels") or row["way"] != way:
            continue
        cells = []
        for methods in GPU_COLUMNS.values():
            found = [other for other in results.rows if other["method"] in methods and _alike(row, other)]
            cells.append(_against(found[0], row) if found else "-")
        what = f"{row['suite']} {row['op']}" + (f" ({row['method']})" if row["suite"] == "train" else "")
        name = f"{what}, {row['preset']}, {tables.image(row)}, batch {row['batch']}, {WAYS[row['way']]}"
        text += f"| {name} | {_time(row)} | {' | '.join(cells)} |\n"
    return text


PARTS: dict[str, Callable[[Results], str]] = {
    "conditions": conditions,
    "attention": attention,
    "memory": memory,
    "palette": palette,
    "sparse": sparse,
    "models": models,
    "slower": slower,
    "reach": reach,
    "everything": everything,
}


def filled(text: str, results: Results, on_gpu: Results | None = None) -> str:
    """A page with what stands between its markers made anew, `gpu` from the rows of `on_gpu`.

    Raises:
        ValueError: a page asks for a part that there is not, or for `gpu` without rows.
    """
    parts: dict[str, Callable[[], str]] = {name: partial(part, results) for name, part in PARTS.items()}
    if on_gpu is not None:
        parts["gpu"] = partial(gpu, on_gpu)

    def replace(found: re.Match[str]) -> str:
        name = found.group(2)
        if name not in parts:
            raise ValueError(f"there is no part {name!r}; there are {', '.join(parts)}")
        return f"{found.group(1)}{parts[name]()}{found.group(4)}"

    return MARKED.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, and the pictures of both runs if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.pages", description="pages from committed rows")
    parser.add_argument("--pictures", action="store_true", help="draw the plots beside the rows anew")
    pictures = parser.parse_args(arguments).pictures
    folders = RESULTS, newest(GPU_RESULTS)
    results, on_gpu = (Results(read_run(folder)) for folder in folders)
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(before, results, on_gpu)
        if after != before:
            path.write_text(after, encoding="utf-8")
        print(f"{page}: {'rewritten' if after != before else 'is up to date'}")
    for folder, run in zip(folders, (results, on_gpu), strict=True) if pictures else ():
        for name in plots.draw(run.rows, folder):
            print(f"{(folder / name).relative_to(ROOT)}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
