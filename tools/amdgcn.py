"""What a kernel compiled for an AMD chip uses, read from its assembly text: no device and no ROCm needed.

The end of the text holds the metadata of the code object (LLVM, "User Guide for AMDGPU Backend", code object V5). A compute
unit has four SIMDs. Each has 512 vector registers of 64 lanes for its waves, accumulation registers included (CDNA 2 to 4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SIMDS = 4
"""In a compute unit."""
REGISTERS = 512
"""Vector registers of a SIMD, given to waves in blocks of eight; one wave takes 512 at most."""
MOST_WAVES = 8
"""On a SIMD at once."""


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel.

    Attributes:
        registers: vector registers a thread takes, accumulation registers included.
        accumulators: accumulation registers (AGPRs) among them.
        spills: vector registers that are kept in memory for a time.
        scalar_spills: scalar registers that are kept elsewhere. Lanes of vector registers take them, or memory: then `scratch`.
        scratch: bytes of memory a thread has for spills and arrays.
        mfma: matrix instructions.
        wide: loads and stores of global memory that move 16 bytes a thread.
        narrow: those that move less.
    """

    registers: int
    accumulators: int
    spills: int
    scalar_spills: int
    scratch: int
    mfma: int
    wide: int
    narrow: int

    def programs(self, warps: int) -> int:
        """Programs of `warps` waves that the registers of a compute unit hold at once."""
        waves = min(MOST_WAVES, REGISTERS // max(8, -(-self.registers // 8) * 8))
        return waves * SIMDS // warps

    def problems(self, *, product: bool) -> list[str]:
        """What is wrong with a kernel; with `product` its 16-bit products must be matrix instructions."""
        problems = []
        if self.spills or self.scratch:
            problems.append(f"{self.spills} registers spill, {self.scratch} bytes of scratch memory")
        if product and not self.mfma:
            problems.append("no MFMA")
        return problems

    def mover_problems(self, warps: int, programs: int, shared: int, limit: int) -> list[str]:
        """What is wrong with a kernel that only moves memory, of which a compute unit is to hold `programs` at once."""
        problems = []
        if self.narrow >= self.wide:
            problems.append(f"{self.narrow} of {self.narrow + self.wide} loads and stores are narrow")
        if self.programs(warps) < programs or shared * programs > limit:
            problems.append(
                f"{programs} programs of {self.registers} registers and {shared} bytes do not fit on a compute unit"
            )
        return problems


def _field(text: str, name: str) -> int:
    found = re.search(rf"^\s*-?\s*\.{name}:\s+(\d+)", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly has no .{name}; it ends with {text[-200:]!r}")
    return int(found.group(1))


def read(text: str) -> Usage:
    """The resources of the one kernel in `text`, assembly as ``CompiledKernel.asm["amdgcn"]`` gives it.

    Raises:
        ValueError: the metadata lacks a field.
    """
    moves = re.findall(r"^\s*(?:global|buffer|flat)_(?:load|store)_(\w+)", text, flags=re.MULTILINE)
    wide = sum(kind.startswith(("dwordx4", "b128")) for kind in moves)
    return Usage(
        registers=_field(text, "vgpr_count"),
        accumulators=_field(text, "agpr_count"),
        spills=_field(text, "vgpr_spill_count"),
        scalar_spills=_field(text, "sgpr_spill_count"),
        scratch=_field(text, "private_segment_fixed_size"),
        mfma=len(re.findall(r"^\s*v_mfma_", text, flags=re.MULTILINE)),
        wide=wide,
        narrow=len(moves) - wide,
    )
