"""What the compiler makes of every shipped kernel configuration, without a GPU: ``make audit``.

Each launcher runs with real arguments, but its kernels are only compiled, for a chip that need not be here. What is audited is
what would be launched. A row fails on a spill (local memory); on more shared memory than the chip gives a program; on sm_90
when a 16-bit product is no warpgroup MMA; or when ptxas made the products wait for each other
(its warning C7515: then there are as many waits as products). `tools.speed` says what else costs time in their loops, and
predicts a rate. Attention kernels are compiled for tensors that allow no wide load, too. Kernels that only move memory (norm,
activation) fail where their loads and stores are not 16 bytes wide; or where fewer programs fit on a multiprocessor than are
launched for it. On AMD chips a row fails on scratch memory, and where a 16-bit product has no matrix instruction
(`tools.amdgcn`).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from igpt_kernels import tuning
from tools import amdgcn, sass, speed
from tools.kernels import DTYPES, HEAD_DIMS, KERNELS, partner


class Target(NamedTuple):
    """A chip that need not be here.

    Attributes:
        table: its table of configurations.
        arch: its name for Triton's compilers: a compute capability (NVIDIA), or ``gfx...`` (AMD).
        shared: bytes of shared memory that it gives one program.
    """

    table: str
    arch: int | str
    shared: int

    @property
    def gpu(self) -> GPUTarget:
        """As Triton's drivers name it: a warp of 32 threads, on these AMD chips a wave of 64."""
        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)


# Shared memory: CUDA programming guide, "technical specifications per compute capability"; LDS of a compute unit in the
# instruction set manuals of AMD CDNA 2, 3 and 4.
TARGETS = {
    "sm_80": Target("sm_80", 80, 163 << 10),
    "sm_86": Target("default", 86, 99 << 10),
    "sm_89": Target("default", 89, 99 << 10),
    "sm_90": Target("sm_90", 90, 227 << 10),
    "sm_100": Target("sm_100", 100, 227 << 10),
    "sm_120": Target("sm_120", 120, 99 << 10),
    "gfx90a": Target("amd", "gfx90a", 64 << 10),
    "gfx942": Target("amd", "gfx942", 64 << 10),
    "gfx950": Target("amd", "gfx950", 160 << 10),
}
REGISTERS = 1 << 16
"""Of a multiprocessor, 32 bits each, on all these chips."""
WITHOUT_WGMMA = {("sparse_backward_keys", 256)}
"""Rows whose products need not be warpgroup MMAs: of 17 configurations tried every one that had them spilled."""
SPILLS_A_WORD = {("sm_100", "flash_delta", 32)}
"""ptxas 12.8 stores and loads one word there at 72 registers, with 255 to be had; the kernel is bound by memory."""
SPILLS_ONCE = 12
"""Spills allowed in a kernel of warpgroups with code of their own: ptxas keeps four words at its start for each of them."""
ALWAYS = ("shared memory", speed.OVERWRITTEN)
"""In problems that no time on a device outweighs: the kernel would not run, or would be wrong."""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Row:
    """One compiled kernel: what it uses of the chip, and what is wrong with that."""

    chip: str
    kernel: str
    bits: int
    size: int
    """Head dim, width of a row, or classes."""
    config: tuple[int, int, int, int]
    registers: int
    spills: int
    """Instructions that store to or load from local memory; on AMD chips, vector registers kept in scratch memory."""
    shared: int
    """Bytes of shared memory."""
    wgmma: int
    mma: int
    """Matrix instructions of one warp (AMD: of one wave)."""
    waits: int
    wide: int
    """Loads and stores of global memory that move 16 bytes a thread."""
    narrow: int
    """Those that move less."""
    problems: tuple[str, ...]
    accumulators: int = 0
    """AGPRs among the registers, on AMD chips."""
    notes: tuple[str, ...] = ()
    """What would be a problem, had no device timed this entry as the fastest."""
    aligned: bool = True
    """Whether the tensors allow loads of 16 bytes."""
    predicted: float = 0.0
    """TFLOP/s by the model of `tools.speed`; 0 where it has none."""
    measured: float = 0.0
    """TFLOP/s on a device; 0 where this configuration has no time."""


class _Chip:
    """A driver of Triton's for a chip that is not here: enough to compile, not to launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int | str:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compile_only(
    chip: str, functions: Collection[str] | None = None
) -> Iterator[list[tuple[str, triton.compiler.CompiledKernel]]]:
    """Inside, launching a kernel compiles it for `chip` of `TARGETS` instead; the list collects (name, compiled kernel).

    Names are those of Triton functions without underscore and ``_kernel``; what `functions` does not name is not compiled.
    """
    compiled: list[tuple[str, triton.compiler.CompiledKernel]] = []
    run = JITFunction.run

    def collect(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        name = self.__name__.strip("_").removesuffix("_kernel")
        if functions is not None and name not in functions:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((name, kernel))
        return kernel

    JITFunction.run = collect
    driver.set_active(_Chip(TARGETS[chip].gpu))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():
            driver.reset_active()  # where there is no GPU there is no driver to go back to


BESIDE = {"cross_entropy_gradient": 2}
"""Narrow moves that are not the tile's: a row's target and gradient, and its loss. They are no more than the wide ones and one,
as a thread has at least 16 bytes of each row."""
ROWS = 256
"""Rows or tokens of the tensors that launchers are called with: a multiple of 16, as sizes of images are."""


def launch(
    kernel: str, size: int, dtype: torch.dtype, config: tuning.Config, other: tuning.Config, aligned: bool = True
) -> None:
    """Call the launcher of a kernel on every form of inputs that is audited."""
    operation = KERNELS[kernel].operation
    for form in operation.audited_forms:
        if operation.name == "loss" and form and size > 64:
            continue  # rows that no load of 16 bytes fits take the smallest entry, whatever the number of classes
        inputs = operation.inputs(size, ROWS, dtype, "cpu", form)
        KERNELS[kernel].prepare(inputs if aligned else speed.unaligned(inputs))(config, other)


@functools.cache
def disassemble(cubin: bytes) -> str:
    """What cuobjdump says of a kernel: its resources and its machine code. Several configurations may share one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(kernel: triton.compiler.CompiledKernel) -> tuple[int, Callable[[str], int]]:
    """Registers of a compiled kernel, and a counter of instructions in its machine code."""
    text = disassemble(kernel.asm["cubin"])
    registers = re.search(r"REG:(\d+)", text)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {text[:200]!r}")
    return int(registers.group(1)), lambda pattern: len(re.findall(pattern, text))


def mover_problems(name: str, config: tuning.Config, registers: int, wide: int, narrow: int) -> list[str]:
    """What is wrong with a kernel that only moves memory."""
    problems = []
    if narrow >= wide:
        problems.append(f"{narrow} of {narrow + wide} loads and stores are narrow")
    if name.endswith("backward") and registers * 32 * config.num_warps * config.num_stages > REGISTERS:
        problems.append(f"{config.num_stages} programs of {registers} registers do not fit on a multiprocessor")
    return problems


def timed(table: str, kernel: str, size: int) -> bool:
    """Whether the 16-bit entry that serves a size was chosen by timing right results on a device."""
    serving = [int(entry) for entry in tuning.table(table)[kernel]["16"] if int(entry) >= size]
    return bool(serving) and min(serving) in tuning.measured(table).get(kernel, ())


def audit(
    chip: str, kernel: str, bits: int, size: int, config: tuning.Config | None = None, *, aligned: bool = True
) -> list[Row]:
    """Compile one configuration (the table's, or `config`) for a chip and look at it; one row for each kernel launched.

    Without `aligned` the tensors allow no wide load. Such kernels are slow and spill; they fail only where they cannot run.
    """
    target, kind = TARGETS[chip], KERNELS[kernel].kind
    shipped = tuning.table(target.table)
    chosen = tuning.nearest(shipped, kernel, bits, size) if config is None else config
    other = tuning.nearest(shipped, partner(kernel), bits, size)
    # What else is launched makes the inputs, or is the partner of the kernel.
    with compile_only(chip, KERNELS[kernel].functions + KERNELS[kernel].compiled_only) as compiled:
        launch(kernel, size, DTYPES[bits], chosen, other, aligned)
    rows = []
    for short, result in {result.hash: (name, result) for name, result in compiled}.values():
        shared = int(result.metadata.shared)
        problems = [f"{shared} bytes of shared memory, the chip has {target.shared}"] if shared > target.shared else []
        gluon = short in KERNELS[kernel].compiled_only
        product, mover = (
            kind == "product" and (short == kernel or gluon) and bits == 16,
            kind == "rows" and short != "sum_partials",
        )
        sizes = (chosen.block_m, chosen.block_n, chosen.num_warps, chosen.num_stages)
        if isinstance(target.arch, str):
            used = amdgcn.read(result.asm["amdgcn"])
            problems += used.problems(product=product)
            if mover:
                persistent = chosen.num_stages if short.endswith("backward") else 1
                moves = replace(used, narrow=used.narrow - BESIDE.get(short, 0))
                problems += moves.mover_problems(chosen.num_warps, persistent, shared, target.shared)
            counts = (used.registers, used.spills, shared, 0, used.mfma, 0, used.wide, used.narrow)
            rows.append(Row(chip, short, bits, size, sizes, *counts, tuple(problems), used.accumulators))
            continue
        registers, count = inspect(result)
        spills, wgmma, mma, waits = (count(p) for p in (r"\b(?:STL|LDL)\b", r"\bHGMMA\.", r"\bHMMA\.", r"WARPGROUP\.DEPBAR"))
        wide = count(r"\b(?:LDG|STG)\.\S*\b128\b")
        narrow = count(r"\b(?:LDG|STG)\.") - wide
        notes, seen = [], speed.Look()
        if spills > (SPILLS_ONCE if gluon else 2 if (chip, short, bits) in SPILLS_A_WORD else 0):
            problems.append("spills")
        if product and chip == "sm_90" and (kernel, size) not in WITHOUT_WGMMA:
            if not wgmma:
                problems.append("no WGMMA")
            elif waits >= wgmma:
                problems.append("WGMMA serialised")
            if wgmma and aligned:
                code = sass.read(disassemble(result.asm["cubin"]))
                seen = speed.look(code, kernel, size, chosen, registers, shared)
                problems += seen.problems
        if mover:
            problems += mover_problems(short, chosen, registers, wide, narrow - BESIDE.get(short, 0))
        if not aligned or (bits == 16 and timed(target.table, kernel, size) and config is None):
            # A spill is a guess, a time is not.
            notes = [problem for problem in problems if not any(always in problem for always in ALWAYS)]
            problems = [problem for problem in problems if problem not in notes]
        rows.append(
            Row(
                chip, short, bits, size, sizes, registers, spills, shared, wgmma, mma, waits, wide, narrow, tuple(problems),
                0, tuple(notes), aligned, seen.predicted, seen.measured,
            )
        )  # fmt: skip
    return rows


def shipped_cases(
    chips: Sequence[str], all_bits: Sequence[int] = (16, 32), *, models: bool = False
) -> Iterator[tuple[str, str, int, int]]:
    """Every entry of the chips' tables at the size it is listed for, and the sizes of Image GPT; with `models` these alone."""
    for chip in chips:
        for kernel, by_bits in tuning.table(TARGETS[chip].table).items():
            for bits, dims in ((int(bits), dims) for bits, dims in by_bits.items() if int(bits) in all_bits):
                listed = set() if models else {int(dim) for dim in dims}
                for size in sorted(listed | set(KERNELS[kernel].operation.sizes)):
                    yield chip, kernel, bits, size


def ptxas_version() -> str:
    """The assembler inside the Triton wheel."""
    text = subprocess.run([_TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row has a problem."""
    parser = argparse.ArgumentParser(description="compile every shipped kernel configuration and show what it uses")
    parser.add_argument("chips", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all when none is named")
    parser.add_argument("--bits", nargs="+", type=int, choices=[16, 32], default=[16, 32], help="of the values; both")
    parser.add_argument("--models", action="store_true", help="only at the sizes of Image GPT")
    parser.add_argument("--aligned", action="store_true", help="leave out tensors that allow no wide load")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args(arguments)
    for chip in options.chips:
        if chip not in TARGETS:
            parser.error(f"chips must be of {', '.join(TARGETS)}; got {chip}")
    if not options.json:
        print(f"triton {triton.__version__}, ptxas {ptxas_version()}; config is block_m, block_n, num_warps, num_stages")
        print(
            f"{'chip':8} {'kernel':24} bits size {'config':>15} regs AGPR spills shared WGMMA   MMA waits wide narrow  verdict"
        )
    failed = total = 0
    rows = []
    cases = [(case, True) for case in shipped_cases(options.chips, options.bits, models=options.models)]
    if "sm_90" in options.chips and 16 in options.bits and not options.aligned:
        cases += [(("sm_90", kernel, 16, HEAD_DIMS[0]), False) for kernel in speed.ATTENTION]
    for case, aligned in cases:
        for row in audit(*case, aligned=aligned):
            rows.append(row)
            total += 1
            failed += bool(row.problems)
            if options.json:
                print(json.dumps(asdict(row)), flush=True)
                continue
            config = ",".join(map(str, row.config))
            print(
                f"{row.chip:8} {row.kernel:24} {row.bits:>4} {row.size:>4} {config:>15} "
                f"{row.registers:>4} {row.accumulators:>4} {row.spills:>6} {row.shared:>6} "
                f"{row.wgmma:>5} {row.mma:>5} {row.waits:>5} {row.wide:>4} {row.narrow:>6}  "
                f"{'; '.join(row.problems) or 'ok'}{'' if aligned else ', unaligned'}"
                f"{' (timed, yet: ' * bool(row.notes and aligned)}{' (' * bool(row.notes and not aligned)}"
                f"{'; '.join(row.notes)}{')' * bool(row.notes)}",
                flush=True,
            )
    if not options.json:
        print("\n".join(speed.lines([row for row in rows if row.chip == "sm_90" and row.bits == 16])))
        print(f"{total - failed} of {total} kernels are as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
