"""Machine code of compute capability 9.0 as data: what ``cuobjdump -sass`` prints, with the control bits of every instruction.

An instruction has 128 bits, printed as two words of hexadecimal digits. The upper word ends in control bits that the assembler
sets and the hardware obeys. Their places are those that Jia et al. 2018 (arXiv:1804.06826, section 2.1) found for Volta.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

_FIRST = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
PIPES = {
    "tensor": r"HGMMA|HMMA|IGMMA|QGMMA",
    "mufu": r"MUFU|F2F|F2I|I2F|FRND|I2FP",
    "fp32": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "copy": r"LDGSTS|UTMALDG|UBLKCP",
    "global": r"LDG|STG|LD|ST|RED|ATOMG",
    "shared": r"LDL|STL|LDS|LDSM|STS|STSM|SHFL|SYNCS|ATOMS|UTMASTG|UTMAREDG",
    "control": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|NOP|YIELD|BREAK|WARPSYNC|BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPGROUPSET|MEMBAR|"
    r"FENCE|ERRBAR|NANOSLEEP|USETMAXREG|ELECT|CCTL|UTMACMDFLUSH|ACQBULK|JMP|BMOV|VOTE|VOTEU",
    "constant": r"LDC|ULDC|S2R|S2UR|CS2R",
    "uniform": r"R2UR|U[A-Z0-9]+",
    "integer": r"IMAD|IADD3|IADD|VIADD|LEA|LOP3|LOP|SHF|SHL|SHR|ISETP|IABS|IMNMX|VIMNMX|VIADDMNMX|PRMT|BREV|FLO|POPC|"
    r"SGXT|BMSK|LEPC",
    "alu": r"FMNMX|FSEL|FSETP|FSET|F2FP|SEL|MOV|PLOP3|P2R|R2P|REDUX|FCHK|FSWZADD",
}
"""Pipe -> opcodes without what follows the first point; the first that matches."""
_PIPE = [(name, re.compile(pattern)) for name, pattern in PIPES.items()]


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: in bytes from the start of the kernel.
        predicate: ``"@P0"``, ``"@!P0"``, or empty.
        opcode: with what follows its points, ``HGMMA.64x64x16.F32.BF16``.
        operands: as printed.
        stall: cycles before the warp may issue its next instruction.
        hint: a bit that tells the scheduler whether to stay with this warp.
        writes: scoreboard (0 to 5) that is free once the result is there; None without one.
        reads: scoreboard that is free once the operands are read; None without one.
        waits: scoreboards that must be free before this instruction issues.
        pipe: a key of `PIPES`, or ``"other"``.
    """

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    stall: int
    hint: bool
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]
    pipe: str = field(default="other")

    @property
    def target(self) -> int | None:
        """Address that a branch goes to; None for other instructions."""
        if not self.opcode.startswith("BRA") or not self.operands:
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands[-1])
        return int(found.group(1), 16) if found else None

    @property
    def number(self) -> int:
        """The last operand as a number: how many groups a ``DEPBAR`` leaves in flight."""
        found = [operand for operand in self.operands if operand.startswith("0x")]
        return int(found[-1], 16) if found else 0

    @property
    def columns(self) -> int:
        """N of a warpgroup product m64nNk16; 0 for other instructions."""
        found = re.match(r"[A-Z]*GMMA\.64x(\d+)x", self.opcode)
        return int(found.group(1)) if found else 0

    @property
    def accumulator(self) -> str:
        """First register of a warpgroup product's result."""
        return self.operands[0]

    @property
    def starts(self) -> bool:
        """Whether a warpgroup product begins from zeros instead of adding to its result."""
        return "RZ" in self.operands

    @property
    def left_in_shared(self) -> bool:
        """Whether the left operand of a warpgroup product comes from shared memory."""
        return self.operands[1].startswith("gdesc")

    @property
    def left(self) -> range:
        """Registers that hold the left operand of a warpgroup product; empty where it lies in shared memory."""
        found = re.match(r"R(\d+)", self.operands[1]) if self.columns else None
        return range(int(found[1]), int(found[1]) + 4) if found else range(0)

    @property
    def written(self) -> range:
        """Registers that an instruction writes, results of products left out; empty for one that writes none or predicates."""
        if self.pipe in ("control", "tensor") or self.opcode.startswith(("ST", "RED", "UTMA", "SYNCS", "LDGSTS")):
            return range(0)
        place = 1 if self.opcode.startswith("SHFL") else 0
        found = re.match(r"R(\d+)", self.operands[place]) if len(self.operands) > place else None
        if found is None:
            return range(0)
        many = re.search(r"\.M88\.([24])", self.opcode)
        count = int(many[1]) if many else 2 if "WIDE" in self.opcode else self.bits // 32
        return range(int(found[1]), int(found[1]) + count)

    @property
    def bits(self) -> int:
        """Width of a load or store of one thread, bits."""
        found = re.search(r"\.(64|128)\b", self.opcode)
        return int(found.group(1)) if found else 32


def classify(opcode: str) -> str:
    """The pipe of an opcode."""
    base = opcode.partition(".")[0]
    return next((name for name, pattern in _PIPE if pattern.fullmatch(base)), "other")


def decode(address: int, text: str, upper: int) -> Instruction:
    """One instruction from its text and the upper word of its encoding."""
    predicate, body = text.split(None, 1) if text.startswith("@") else ("", text)
    opcode, _, rest = body.partition(" ")
    control = upper >> 41
    writes, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        address,
        predicate,
        opcode,
        tuple(part.strip() for part in rest.split(",")) if rest.strip() else (),
        stall=control & 15,
        hint=bool(control >> 4 & 1),
        writes=writes if writes < 6 else None,
        reads=reads if reads < 6 else None,
        waits=tuple(number for number in range(6) if control >> 11 >> number & 1),
        pipe=classify(opcode),
    )


def read(text: str) -> list[Instruction]:
    """The instructions of what ``cuobjdump -sass`` printed, one kernel.

    Raises:
        ValueError: an instruction without its second word, or none at all.
    """
    lines, found = text.splitlines(), []
    for first, second in zip(lines, [*lines[1:], ""], strict=True):
        match = _FIRST.match(first)
        if match is None:
            continue
        upper = _SECOND.match(second)
        if upper is None:
            raise ValueError(f"an instruction must have two words of encoding, got {first!r} and then {second!r}")
        found.append(decode(int(match.group(1), 16), match.group(2), int(upper.group(1), 16)))
    if not found:
        raise ValueError(f"text must be what cuobjdump -sass prints, got {text[:80]!r}")
    return found


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Innermost loops with warpgroup products, as positions (first, last): from a backward branch's target to the branch."""
    place = {one.address: i for i, one in enumerate(instructions)}
    ends: dict[int, int] = {}
    for i, one in enumerate(instructions):
        if one.target is not None and one.predicate and one.target < one.address and one.target in place:
            ends[place[one.target]] = i
    found = [(first, last) for first, last in ends.items() if any(one.columns for one in instructions[first : last + 1])]
    return sorted(a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found))


def hot_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The loop with most warpgroup products; of equals the shortest, which masks no tile. Empty where there is none."""
    bodies = [list(instructions[first : last + 1]) for first, last in loops(instructions)]
    return max(bodies, key=lambda body: (sum(bool(one.columns) for one in body), -len(body)), default=[])


def path(loop: Sequence[Instruction], jump: bool = False) -> list[Instruction]:
    """What a warp issues in one iteration: forward branches inside the loop are never taken, or all with `jump`."""
    place, found, i = {one.address: i for i, one in enumerate(loop)}, [], 0
    while i < len(loop):
        found.append(loop[i])
        to = place.get(loop[i].target or -1, 0)
        i = to if jump and to > i else i + 1
    return found


def pipes(instructions: Sequence[Instruction]) -> Counter[str]:
    """How many instructions each pipe gets."""
    return Counter(one.pipe for one in instructions)


def overwritten(loop: Sequence[Instruction]) -> set[int]:
    """Registers of left operands that a loop reads before it writes them, and does write.

    Its next iteration multiplies by what lies there then. In a loop that carries no left operand, such a kernel is wrong.
    """
    fresh: set[int] = set()
    before: set[int] = set()
    for one in loop:
        before |= set(one.left) - fresh
        fresh |= set(one.written)
    return before & fresh


def products(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Warpgroup products that add to one result, one list each: a matrix product, or its part of 64 rows."""
    found: list[list[Instruction]] = []
    open_: dict[str, list[Instruction]] = {}
    for one in instructions:
        if not one.columns:
            continue
        if one.starts or one.accumulator not in open_:
            open_[one.accumulator] = []
            found.append(open_[one.accumulator])
        open_[one.accumulator].append(one)
    return found
