"""Time candidate configurations of every kernel on this GPU and write the device's own table: ``make tune``.

A candidate is timed only if its result is within the error budget; what does not compile, does not fit or computes wrong is
left out. The table goes to ``igpt_kernels/configs/<device>.json``, which `igpt_kernels.tuning` prefers to the family's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure.timing import milliseconds
from igpt_kernels import testing, tuning
from tools.kernels import DTYPES, KERNELS, Call, partner

CHECKED_ROWS = 500
"""Rows or tokens on which a candidate is compared with the oracle."""


def prepared(kernel: str, bits: int, size: int, device: str) -> tuple[Call, Call, list[Tensor], list[Tensor]]:
    """A small call to check a candidate with, a large one to time it; what the small one should give: exact, eager."""
    entry = KERNELS[kernel]
    few, many = (
        entry.operation.inputs(size, rows, DTYPES[bits], device, 0) for rows in (CHECKED_ROWS, entry.operation.timed_rows)
    )
    return entry.prepare(few), entry.prepare(many), entry.truth(few.to(torch.float64)), entry.truth(few)


def best(
    kernel: str, bits: int, size: int, shipped: tuning.Config, other: tuning.Config, device: str = "cuda"
) -> tuning.Config:
    """The fastest verified candidate; the shipped configuration where none is faster by 2 %."""
    check, run, exact, eager = prepared(kernel, bits, size, device)
    found: list[tuple[float, tuning.Config]] = []
    for config in dict.fromkeys([shipped, *KERNELS[kernel].candidates(bits, size)]):
        try:
            for mine, true, low in zip(check(config, other), exact, eager, strict=True):
                testing.error_ratio(mine, true, low, factor=3, floor=8.0)
            found.append((milliseconds(partial(run, config, other), 10)[0], config))
        except Exception as error:
            # Any failure of a candidate, of the compiler's too, only means that it is not chosen; the shipped one must run.
            if config == shipped:
                raise
            print(f"  {config}: {type(error).__name__}", flush=True)
    fastest, config = min(found, key=lambda pair: pair[0])
    print(f"{kernel} {bits} bits, size {size}: {config} {fastest:.3f} ms, shipped {found[0][0]:.3f} ms", flush=True)
    return config if fastest < 0.98 * found[0][0] else shipped


def main() -> int:
    """Tune all that the nearest table lists, and write the device's own; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("tools.tune needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    shipped: Mapping[str, Mapping[str, Mapping[str, tuning.Config]]] = tuning.table(tuning.table_for(torch.device("cuda", 0)))
    kernels: dict[str, dict[str, dict[str, list[int | str]]]] = {}
    for kernel, by_bits in shipped.items():
        for bits, sizes in by_bits.items():
            for size, config in sizes.items():
                other = tuning.nearest(shipped, partner(kernel), int(bits), int(size))
                chosen = best(kernel, int(bits), int(size), config, other)
                kernels.setdefault(kernel, {}).setdefault(bits, {})[size] = chosen.entry
    path = tuning.FOLDER / f"{tuning.slug(torch.cuda.get_device_name())}.json"
    path.write_text(json.dumps({"kernels": kernels}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}; tools.audit and the tests read it from now on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
