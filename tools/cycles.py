"""How many cycles a loop of warpgroup products takes on a multiprocessor of compute capability 9.0: a model, no measurement.

A quarter of the multiprocessor is followed instruction by instruction: the others do the same. Its warps issue in order, one
instruction a cycle. What the assembler wrote into the control bits holds: stalls, scoreboards. Pipes take one instruction at
a time, for the cycles listed below. The tensor core takes products in the order of their issue. Copies into shared memory
come back after a latency, or when the bandwidth allows. Barriers join the warps of a program. Programs that share the
multiprocessor take part all at once. Caches, bank conflicts, power and waits for copies of descriptors (TMA) are not
modelled. A clock and a cost of each program stand for the rest: `tools.calibrate` fits both on measured rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.sass import Instruction

SCHEDULERS = 4
"""Of a multiprocessor; each has a quarter of its warps and pipes, and a tensor core."""
REGISTERS, SHARED, WARPS = 1 << 16, 228 << 10, 64
"""Of a multiprocessor: registers, bytes of shared memory (1 KiB of each program is reserved), warps."""
COSTS = {"mufu": 8.0, "fp32": 1.0, "integer": 2.0, "alu": 2.0, "uniform": 2.0, "shared": 4.0, "global": 4.0, "copy": 4.0}
"""Cycles that a warp's instruction keeps a pipe: 32 lanes by results a cycle (CUDA C++ programming guide, "throughput of
native arithmetic instructions", a quarter of its numbers). Of memory: values of 4 bytes; 16 bytes take four times as long."""
LATENCIES = {"mufu": 22.0, "uniform": 12.0, "shared": 30.0, "global": 600.0, "copy": 40.0, "constant": 40.0}
"""Cycles from the pipe to the result, where scoreboards tell; others 20."""
READ = 12.0
"""Cycles until operands are read."""
COPY_LATENCY = 550.0
"""Cycles of a copy from the L2 cache to shared memory, under load."""
COPY_BYTES = 12.0
"""Bytes a cycle that a quarter of a multiprocessor copies in a burst: 48 for the whole."""
WAIT, BARRIER, FENCE = 40.0, 20.0, 40.0
"""Cycles from the end of a product to its waiter; of a barrier; of a memory fence."""

INTERFERENCE = 3.0
"""Cycles between two instructions while the tensor core works; else 1. A guess at the bandwidth of registers that products
take: without it kernels with several programs on a multiprocessor are predicted 10 to 25 % too fast."""


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return max(1, min(by_registers, SHARED // (shared + 1024), WARPS // warps))


def tensor_cycles(one: Instruction) -> float:
    """Of a product m64nNk16 of 16-bit values: N / 2, or as long as its operands take to come from shared memory.

    A core does 512 multiply-adds of its 16 rows a cycle. Shared memory gives 128 bytes a cycle: N x 16 x 2 bytes of the right
    operand, and 64 x 16 x 2 of the left one where that is there.
    """
    loaded = one.columns * 32 + (2048 if one.left_in_shared else 0)
    return max(one.columns / 2, loaded / 128)


@dataclass
class _Warp:
    """Where a warp is, and what it waits for. Times are cycles."""

    program: int
    ready: float
    position: int = 0
    iteration: int = 0
    board: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: deque[float] = field(default_factory=deque)
    """Ends of its groups of products."""
    product: float = 0.0
    copies: deque[float] = field(default_factory=deque)
    """Arrivals of its groups of copies."""
    copy: float = 0.0
    blocked: bool = False
    marks: list[float] = field(default_factory=list)
    """Ends of its iterations."""


class Scheduler:
    """A quarter of a multiprocessor that runs `loop`: `warps` warps of each of `programs` programs."""

    def __init__(self, loop: Sequence[Instruction], warps: int, programs: int) -> None:
        self.loop = [self._step(one) for one in loop]
        # Programs did not start together: a third of a load apart.
        self.warps = [_Warp(i // warps, i // warps * 233.0 + i % warps * 3.0) for i in range(warps * programs)]
        self.mates = [[other for other in self.warps if other.program == warp.program] for warp in self.warps]
        self.free = dict.fromkeys([*COSTS, "tensor", "memory"], 0.0)
        self.now = 0.0
        self.last = 0

    @staticmethod
    def _step(one: Instruction) -> tuple[Instruction, str, float, float]:
        """What is asked of an instruction again and again: the instruction, its kind, its cycles in a pipe, its latency."""
        kind, cost = one.pipe, COSTS.get(one.pipe, 0.0)
        name = one.opcode.split(".")[0]
        if one.columns:
            return one, "tensor", tensor_cycles(one), 0.0
        if one.opcode.startswith("WARPGROUP.DEPBAR"):
            kind = "wait"
        elif name in ("BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR"):
            kind = name
        elif one.predicate == "@!PT":
            kind, cost = "none", 0.0
        elif kind in ("shared", "global", "copy") and one.bits > 32:
            cost *= one.bits / 32
        elif name == "IMAD":
            kind = "fp32"
        return one, kind, cost, LATENCIES.get(one.pipe, 20.0)

    def _earliest(self, warp: _Warp) -> float:
        """When the warp can issue its next instruction."""
        one, kind, _, _ = self.loop[warp.position]
        at = warp.ready
        for number in one.waits:
            at = max(at, warp.board[number])
        if kind == "wait" and len(warp.groups) > one.number:
            at = max(at, warp.groups[-one.number - 1] + WAIT)
        elif kind == "DEPBAR" and len(warp.copies) > one.number:
            at = max(at, warp.copies[-one.number - 1])
        elif kind in self.free and kind != "tensor":
            at = max(at, self.free[kind])
        return at

    def _issue(self, warp: _Warp, at: float) -> None:
        one, kind, cost, latency = self.loop[warp.position]
        end = at
        if kind in self.free:
            # A product joins the queue of the tensor core 8 cycles after its issue.
            end = self.free[kind] = max(at + (8.0 if kind == "tensor" else 0.0), self.free[kind]) + cost
        if one.writes is not None:
            warp.board[one.writes] = max(warp.board[one.writes], end + latency)
        if one.reads is not None:
            warp.board[one.reads] = max(warp.board[one.reads], end + (0.0 if kind == "tensor" else READ))
        if kind == "tensor":
            warp.product = end
            if "gsb0" in one.operands:
                warp.groups.append(end)
        elif kind == "copy":
            self.free["memory"] = max(at, self.free["memory"]) + one.bits * 4 / COPY_BYTES
            warp.copy = max(at + COPY_LATENCY, self.free["memory"] + COPY_LATENCY / 2)
        elif kind == "LDGDEPBAR":
            warp.copies.append(warp.copy)
        warp.ready = at + max(1, one.stall) + (FENCE if kind == "MEMBAR" else 0.0)
        warp.position += 1
        if warp.position == len(self.loop):
            warp.position, warp.iteration = 0, warp.iteration + 1
            warp.marks.append(at)
            warp.ready = max(warp.ready, at + 10.0)  # the branch

    def _meet(self, number: int, total: int) -> None:
        """A warp has come to a barrier: the last of its program opens it."""
        self.warps[number].blocked = True
        mates = [warp for warp in self.mates[number] if warp.iteration < total]
        if all(warp.blocked for warp in mates):
            opened = max(warp.ready for warp in mates) + BARRIER
            for warp in mates:
                warp.blocked, warp.ready = False, opened

    def run(self, iterations: int) -> None:
        """Until each warp has done so many iterations."""
        count = len(self.warps)
        while True:
            chosen, when = -1, 0.0
            for step in range(count):
                number = (self.last + step) % count
                warp = self.warps[number]
                if warp.blocked or warp.iteration == iterations:
                    continue
                at = self._earliest(warp)
                if chosen < 0 or at < when:
                    chosen, when = number, at
            if chosen < 0:
                return
            kind = self.loop[self.warps[chosen].position][1]
            when = max(when, self.now)
            self._issue(self.warps[chosen], when)
            crowded = kind != "tensor" and self.free["tensor"] > when
            self.now, self.last = when + (INTERFERENCE if crowded else 1.0), chosen
            if kind == "BAR":
                self._meet(chosen, iterations)


def iteration_cycles(loop: Sequence[Instruction], warps: int, programs: int, iterations: int = 9, warm: int = 3) -> float:
    """Cycles of a multiprocessor for one iteration of one program, when `programs` of `warps` warps share it.

    Args:
        loop: the instructions of an iteration, in order.
        warps: of a program; a multiple of four.
        programs: on the multiprocessor at once.
        iterations: how many are simulated.
        warm: how many of the first, and one of the last, are left out.
    """
    scheduler = Scheduler(loop, max(1, warps // SCHEDULERS), programs)
    scheduler.run(iterations)
    spans = [(warp.marks[-2] - warp.marks[warm - 1]) / (iterations - 1 - warm) for warp in scheduler.warps]
    return sum(spans) / len(spans) / programs
