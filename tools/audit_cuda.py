"""What nvcc makes of csrc/palette.cu for every chip of the wheel, without a GPU: part of ``make audit``.

A row fails on a spill or a stack frame; when the 16-byte loads or stores that a kernel needs are not in its machine code; on a
fused multiply-add in float64: it would round the distances of the table otherwise than the CPU does.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from igpt_kernels._native import build
from tools.audit import _TOOLS

CHIPS = tuple(arch.removesuffix("+PTX").replace(".", "") for arch in build.ARCHITECTURES)
LAYOUTS = ("packed", "planar", "strided")
TOKENS = {"h": "uint8", "s": "int16", "t": "uint16", "i": "int32", "l": "int64", "x": "int64"}  # as C++ names are mangled


@dataclass(frozen=True)
class Row:
    """One kernel on one chip."""

    chip: str
    kernel: str
    registers: int
    stack: int
    """Bytes a thread."""
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    """Loads and stores of 16 bytes in the machine code."""
    table_reads: int
    """Reads through the read-only path."""
    problems: tuple[str, ...]


def wanted(kernel: str) -> tuple[int, int]:
    """The least number of 16-byte loads and stores: those of one whole, aligned unit of 16 pixels."""
    kind, _, rest = kernel.partition(" ")
    size = {"uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "int64": 8}.get(rest.rpartition(" ")[2], 0)
    if kind == "lookup" and not rest.startswith("strided"):
        return 3, size
    if kind == "decode":
        return size, 3
    return 0, 0


def name_of(symbol: str) -> str:
    """``lookup packed int64`` of a mangled name."""
    table = re.search(r"palette_table_kernel", symbol)
    lookup = re.search(r"palette_lookup_kernelIL\w+?LayoutE(\d)E(\w)E", symbol)
    decode = re.search(r"palette_decode_kernelI(\w)E", symbol)
    if lookup:
        return f"lookup {LAYOUTS[int(lookup.group(1))]} {TOKENS[lookup.group(2)]}"
    if decode:
        return f"decode {TOKENS[decode.group(1)]}"
    if table:
        return "table"
    raise ValueError(f"{symbol} is no kernel of palette.cu that is known here")


def compile_for(chip: str, found: build.Tool, folder: Path) -> Path:
    """The machine code of palette.cu for one chip, with the flags of the build."""
    cubin = folder / f"{chip}.cubin"
    command = [f"{found.path}/bin/nvcc", *build.NVCC_FLAGS, "-cubin", f"-arch=sm_{chip}", "-o", str(cubin)]
    done = subprocess.run([*command, str(build.sources() / "palette.cu")], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed for sm_{chip}: {done.stderr.strip()}")
    return cubin


def audit(chip: str, cubin: Path) -> list[Row]:
    """One row for each kernel of `cubin`."""
    usage, code = (
        subprocess.run([_TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    parts = re.split(r"^\s*Function : (\S+)$", code, flags=re.MULTILINE)[1:]
    machine = dict(zip(parts[::2], parts[1::2], strict=True))
    rows = []
    for symbol, words in re.findall(r"Function (\S+):\s*\n\s*(.+)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", words)}
        text, kernel = machine[symbol], name_of(symbol)
        loads, stores, spills, fused = (
            len(re.findall(pattern, text)) for pattern in (r"\bLDG\S*\.128", r"\bSTG\S*\.128", r"\b(?:STL|LDL)\b", r"\bDFMA\b")
        )
        reads = len(re.findall(r"\bLDG\S*\.CONSTANT", text))
        problems = []
        if spills or numbers["STACK"]:
            problems.append("spills")
        least_loads, least_stores = wanted(kernel)
        if loads < least_loads:
            problems.append(f"{loads} loads of 16 bytes, {least_loads} wanted")
        if stores < least_stores:
            problems.append(f"{stores} stores of 16 bytes, {least_stores} wanted")
        if kernel == "table" and fused:
            problems.append("fused multiply-add")
        rows.append(
            Row(
                f"sm_{chip}", kernel, numbers["REG"], numbers["STACK"], spills, numbers["SHARED"], loads, stores, reads,
                tuple(problems),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: row.kernel)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row has a problem. Without nvcc there is nothing to compile: say so, and 0."""
    parser = argparse.ArgumentParser(description="compile csrc/palette.cu for every chip of the wheel and show what it uses")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args(arguments)
    found = build.toolkit()
    if found.reason:
        print(f"csrc/palette.cu is not audited: {found.reason}", file=sys.stderr)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for chip in CHIPS:
            rows += audit(chip, compile_for(chip, found, Path(folder)))
    if options.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print(f"nvcc {found.version}, csrc/palette.cu; wide is 16 bytes")
        print(f"{'chip':7} {'kernel':22} regs stack spills shared wide loads wide stores table reads  verdict")
        for row in rows:
            print(
                f"{row.chip:7} {row.kernel:22} {row.registers:>4} {row.stack:>5} {row.spills:>6} {row.shared:>6} "
                f"{row.wide_loads:>10} {row.wide_stores:>11} {row.table_reads:>11}  {'; '.join(row.problems) or 'ok'}"
            )
        print(f"{sum(not row.problems for row in rows)} of {len(rows)} kernels are as they should be")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
