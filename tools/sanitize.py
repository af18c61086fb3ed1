"""Small calls of every kernel: ``compute-sanitizer --tool memcheck python -m tools.sanitize``.

Each shipped configuration of this GPU's table is launched once at odd sizes: the ends of tiles, rows and images are in play.
Exit code 0 says that the calls ran and gave finite numbers; what they touched is for the sanitizer to judge.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels.palette import PaletteTable, palette_lookup
from tools.kernels import DTYPES, OPERATIONS, listed_sizes

GROUPS = (*dict.fromkeys(operation.name for operation in OPERATIONS.values()), "palette")
LARGEST_ODD_VOCAB = 1024
"""Classes beyond which the loss is not called with one class less: that takes a second each under a sanitizer."""


def calls_of(group: str, bits: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every operation of a group at the sizes that the table of this GPU lists; rows also one value short, in every form."""
    table = tuning.table_for(torch.device("cuda", 0))
    for name, operation in OPERATIONS.items():
        if operation.name != group:
            continue
        sizes = listed_sizes(table, operation, bits)
        if tuning.WIDEST in sizes or group == "loss":  # rows and classes, where the last tile may be cut
            sizes = sorted({*sizes, *(size - 1 for size in sizes if group != "loss" or size <= LARGEST_ODD_VOCAB)})
        for size in sizes:
            for form in range(operation.forms):
                inputs = operation.inputs(size, operation.odd_rows, DTYPES[bits], "cuda", form)
                yield f"{name} size {size} form {form}", functools.partial(operation.public, inputs)


def palette_calls() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Table on the GPU, lookups in every output dtype, aligned and not."""
    table = PaletteTable(torch.rand(200, 3, dtype=torch.float64) * 255)
    pixels = torch.randint(0, 256, (1001, 3), dtype=torch.uint8, device="cuda")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        for view in (pixels, pixels[1:], pixels[::2]):

            def lookup(view: Tensor = view, dtype: torch.dtype = dtype) -> list[Tensor]:
                return [palette_lookup(view, table, dtype=dtype)]

            yield f"palette {dtype}", lookup


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls; 1 if one gave a number that is not finite, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="small calls of every kernel, to run under compute-sanitizer")
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all when none is named")
    parser.add_argument("--bits", nargs="+", type=int, choices=list(DTYPES), default=list(DTYPES), help="of the values; both")
    parser.add_argument(
        "--at-once", action="store_true", help="a process for each group and width: fills Triton's cache quickly"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"groups must be of {', '.join(GROUPS)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("tools.sanitize needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    chosen = [(group, bits) for group in options.groups or GROUPS for bits in options.bits if group != "palette" or bits == 16]
    if options.at_once:
        command = [sys.executable, "-m", "tools.sanitize"]
        children = [subprocess.Popen([*command, group, "--bits", str(bits)]) for group, bits in chosen]
        return max(child.wait() != 0 for child in children)
    torch.manual_seed(0)
    wrong = calls = 0
    for group, bits in chosen:
        for name, call in palette_calls() if group == "palette" else calls_of(group, bits):
            calls += 1
            if not all(bool(torch.isfinite(x.double()).all()) for x in call()):
                wrong += 1
                print(f"{name}, {bits} bits: not finite", flush=True)
    print(f"{calls} calls, {wrong} with numbers that are not finite")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
