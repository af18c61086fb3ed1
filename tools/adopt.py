"""A table of configurations from timed variants: ``python -m tools.adopt PLAN... [--out FILE]``.

Reads what `tools.kernel_plan` wrote on a device. For every attention kernel and head dim the fastest right variant wins: of
sparse kernels the one whose times over all windows have the least product. It replaces what ships where it is 2 % faster.
The rest of the device's nearest table is copied. The entries that were timed are listed under ``measured``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from igpt_kernels import tuning
from igpt_kernels.tuning import Config

GAIN = 0.98
"""A variant wins below this share of the shipped time; two runs of one variant differ by up to 2 %."""
Times = Mapping[tuple[str, int], Mapping[Config, float]]


def timed(paths: Sequence[Path]) -> Times:
    """(kernel, head dim) -> configuration -> product of its median times over layouts, milliseconds.

    A configuration that failed, or lacks a time that another has, is left out.
    """
    found: dict[tuple[str, int], dict[Config, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    names = [field.name for field in fields(Config)]
    for path in paths:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row["kind"] == "time" and "layout" in row and "median_ms" in row:
                config = Config(**{name: row[name] for name in names if name in row})
                times = found[row["kernel"], row["head_dim"]][config]
                times.setdefault(row["layout"], []).append(row["median_ms"])
    chosen: dict[tuple[str, int], dict[Config, float]] = {}
    for key, configs in found.items():
        layouts = max((set(times) for times in configs.values()), key=len)
        chosen[key] = {
            config: math.prod(min(each) for each in times.values())
            for config, times in configs.items()
            if set(times) == layouts
        }
    return chosen


def winner(times: Mapping[Config, float], shipped: Config) -> Config:
    """The fastest configuration; what ships unless another is faster by more than the spread."""
    best = min(times, key=lambda config: times[config])
    return best if shipped not in times or times[best] < GAIN * times[shipped] else shipped


def table(name: str, times: Times, device: str) -> dict[str, Any]:
    """The table `name` with the winners, as JSON; `device` says where they were timed."""
    kernels: dict[str, dict[str, dict[str, list[int | str]]]] = {
        kernel: {bits: {dim: config.entry for dim, config in dims.items()} for bits, dims in by_bits.items()}
        for kernel, by_bits in tuning.table(name).items()
    }
    measured: dict[str, set[int]] = {kernel: set(sizes) for kernel, sizes in tuning.measured(name).items()}
    for (kernel, size), configs in times.items():
        shipped = tuning.nearest(tuning.table(name), kernel, 16, size)
        kernels[kernel]["16"][str(size)] = winner(configs, shipped).entry
        measured.setdefault(kernel, set()).add(size)
        kernels[kernel]["16"] = dict(sorted(kernels[kernel]["16"].items(), key=lambda item: int(item[0])))
    return {
        "measured": {"device": device, "kernels": {kernel: sorted(sizes) for kernel, sizes in measured.items()}},
        "kernels": kernels,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table and print what changed; 2 where nothing was timed."""
    parser = argparse.ArgumentParser(prog="python -m tools.adopt", description="a table of configurations from timed variants")
    parser.add_argument("plans", nargs="+", type=Path, help="files of tools.kernel_plan; several rounds of one device")
    parser.add_argument("--table", help="the table that they started from; that of the GPU's family when left out")
    parser.add_argument("--device", default="", help="what to write as the device; the GPU's name when left out")
    parser.add_argument("--out", type=Path, help="the file; configs/<device>.json when left out")
    options = parser.parse_args(arguments)
    try:
        times = timed(options.plans)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"plans must be files that tools.kernel_plan wrote: {type(error).__name__}: {error}")
    if not times:
        print(f"no time of an attention kernel is in {', '.join(map(str, options.plans))}", file=sys.stderr)
        return 2
    device, name = options.device, options.table
    if not (device and name):
        import torch

        if not torch.cuda.is_available():
            parser.error("--device and --table must be given where no GPU is visible")
        device = device or torch.cuda.get_device_name()
        name = name or tuning.FAMILIES.get(torch.cuda.get_device_capability(), "default")
    if not (tuning.FOLDER / f"{name}.json").exists():
        tables = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))
        parser.error(f"--table must be one of {', '.join(tables)}; got {name}")
    path = options.out or tuning.FOLDER / f"{tuning.slug(device)}.json"
    made = json.dumps(table(name, times, device), indent=1) + "\n"
    path.write_text(made, encoding="utf-8")
    for (kernel, size), configs in sorted(times.items()):
        shipped = tuning.nearest(tuning.table(name), kernel, 16, size)
        best = winner(configs, shipped)
        if shipped not in configs:
            said = f"was not timed -> {best}"
        else:
            said = "stays" if best == shipped else f"-> {best}, {configs[best] / configs[shipped]:.2f} of its time"
        print(f"{kernel:24} {size:>4}  {shipped} {said}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
