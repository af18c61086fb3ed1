"""What the machine code of a kernel says about its speed on compute capability 9.0, for `tools.audit`.

`problems` names what usually costs time in the hot loop. `predict` gives a rate from the cycle model (`tools.cycles`) with
constants fitted on kernels that were timed on an H100 (`tools.calibrate`). A prediction is an estimate: its error on rows that
the fit has not seen stands beside it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from igpt_kernels import layouts
from igpt_kernels.tuning import Config
from tools.cycles import iteration_cycles, resident
from tools.kernels import HEAD_DIMS, KERNELS, Inputs
from tools.sass import Instruction, hot_loop, overwritten, path, products
from tools.variants import HEADS, PRODUCTS, RADII, SIDE, SPARSE_HEADS, TOKENS

OVERWRITTEN = "the loop writes over operands in registers"
CALIBRATION = Path(__file__).with_name("calibration.json")
MULTIPROCESSORS = 132
"""Of an H100 or H200, SXM."""
ADDRESSES = 0.35
"""Largest share of an attention kernel's hot loop that may be integer or uniform arithmetic, comparisons left out. Dense ones
at the head dims of Image GPT take 21 to 29 % (Triton 3.6.0, timed entries); a fifth more is let through. Kernels without an
exponential have little else in their loop: the loss takes 60 to 68 % beside four products, and is not judged."""
ATTENTION = [name for name, kernel in KERNELS.items() if kernel.operation.sizes == HEAD_DIMS]
"""Kernels that take q, k and v of any strides."""
EXPOSED = "loads are waited for with no product in between"
PUBLISHED = {
    ("forward", 64): "FA3 473, cuDNN 388 (Shah et al. 2024, figure 5); FlexAttention 340 (pytorch PR 137036)",
    ("forward", 128): "FA3 616, cuDNN 539 (Shah et al. 2024, figure 5); cuDNN 9.19 on H200 673 (cudnn-frontend, 8 key heads)",
    ("backward", 64): "FA3 432, cuDNN 384, FlexAttention 263 (pytorch PR 137036, from its times)",
    (
        "backward",
        128,
    ): "FA3 575 at 8,192 tokens (flash-attention PR 1893); cuDNN 9.19 on H200 579 (cudnn-frontend, 8 key heads)",
}
"""TFLOP/s on an H100 unless said, 16-bit, causal, 16,384 tokens unless said: what others have published, not measured here."""


def waits(loop: Sequence[Instruction]) -> int:
    """How often an iteration waits for products."""
    return sum(one.opcode.startswith("WARPGROUP.DEPBAR") for one in loop)


def exposed(loop: Sequence[Instruction]) -> bool:
    """Whether an iteration waits for a copy with no product between the copy and the wait: all of the latency is seen.

    A wait that leaves n groups of copies in flight is for the one before the last n. Counted round the loop. Without copies,
    wide loads by way of registers are exposed; narrow ones are not judged, since copies take no less than 4 bytes.
    """
    commits = [i for i, one in enumerate(loop) if one.opcode == "LDGDEPBAR"]
    if not commits:
        return any(one.pipe == "global" and one.bits == 128 for one in loop) and any(
            one.opcode.startswith("STS") for one in loop
        )
    for i, one in enumerate(loop):
        if not one.opcode.startswith("DEPBAR"):
            continue
        before = [place for place in reversed(commits) if place < i] + [place for place in reversed(commits) if place >= i]
        rounds, which = divmod(one.number, len(commits))
        if rounds:
            continue  # older than a whole iteration
        last = before[which]
        between = loop[last:i] if last < i else [*loop[last:], *loop[:i]]
        if not any(other.columns for other in between):
            return True
    return False


def narrowest(head_dim: int) -> int:
    """Columns that every product of a head should have: 64, or the smaller part of a head (96 is 64 and 32)."""
    rest = head_dim % 64
    return min(64, head_dim, rest or 64)


def address_share(loop: Sequence[Instruction]) -> float:
    """The share of integer and uniform arithmetic, most of which computes addresses; comparisons, which mask, left out."""
    return sum(one.pipe in ("integer", "uniform") and not one.opcode.startswith("ISETP") for one in loop) / len(loop)


def problems(loop: Sequence[Instruction], size: int, heads: bool = True) -> list[str]:
    """What usually costs time in a hot loop.

    Args:
        loop: its instructions.
        size: head dim; what else a kernel's table lists.
        heads: whether `size` is a head dim.
    """
    found = []
    waited, distinct = waits(loop), len(products(loop))
    if waited > distinct:
        found.append(f"{waited} waits for {distinct} products")
    if exposed(loop):
        found.append(EXPOSED)
    narrow = min(one.columns for one in loop if one.columns)
    if narrow < (narrowest(size) if heads else 64):
        found.append(f"products of {narrow} columns")
    if heads and (share := address_share(loop)) > ADDRESSES:
        found.append(f"{share:.0%} of the loop computes addresses")
    return found


def unaligned(inputs: Inputs) -> Inputs:
    """The same shapes from a base that is aligned to 8 bytes only, with odd strides: no load may take 16 bytes."""

    def moved(x: Tensor) -> Tensor:
        batch, heads, tokens, width = x.shape
        row = heads * (width + 1)
        memory = torch.zeros(batch * tokens * row + 8, dtype=x.dtype, device=x.device)
        return memory.as_strided(x.shape, (tokens * row, width + 1, row, 1), 8 // x.element_size())

    return replace(inputs, tensors=tuple(moved(x) if x is not None and x.dim() == 4 else x for x in inputs.tensors))


@dataclass(frozen=True)
class Work:
    """What one head asks of a kernel.

    Attributes:
        programs: that are launched.
        iterations: of all of them.
        masked: those of a sparse kernel whose tile has a mask; 0 where all iterations are the same.
        flops: two for each multiply-add of a visible pair.
        heads: of the timed call.
    """

    programs: int
    iterations: int
    masked: int
    flops: float
    heads: int


@functools.cache
def work(kernel: str, head_dim: int, block_m: int, block_n: int, layout: str) -> Work:
    """At the shapes of `tools.variants`: ``causal``, or ``local2d:`` and a radius."""
    each = PRODUCTS[kernel.rsplit("_", 1)[1]] * head_dim
    if layout != "causal":
        pattern = layouts.local2d(SIDE, SIDE, int(layout.partition(":")[2]))
        lists = layouts.lists_of(pattern.key, block_m, block_n)
        keys = kernel.endswith("keys")
        masks = [part.k_masks if keys else part.q_masks for part in lists]
        return Work(
            sum(len(part.k_ptr if keys else part.q_ptr) - 1 for part in lists),
            sum(len(mask) for mask in masks),
            sum(int((mask >= 0).sum()) for mask in masks),
            each * pattern.pairs,
            SPARSE_HEADS,
        )
    flops = each * TOKENS * (TOKENS + 1) / 2
    if kernel.endswith("keys"):
        iterations = sum((TOKENS - first // block_m * block_m) // block_m for first in range(0, TOKENS, block_n))
        return Work(TOKENS // block_n, iterations, 0, flops, HEADS)
    iterations = sum(-(-(first + block_m) // block_n) for first in range(0, TOKENS, block_m))
    return Work(TOKENS // block_m, iterations, 0, flops, HEADS)


@functools.cache
def calibration() -> Mapping[str, Any]:
    """What `tools.calibrate` wrote: constants, their error, and the rows they are from."""
    found: Mapping[str, Any] = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    return found


def family(kernel: str) -> str:
    """``dense`` or ``sparse``: the two have their own fitted clock."""
    return "sparse" if kernel.startswith("sparse") else "dense"


@dataclass(frozen=True)
class Cost:
    """Of one iteration of a compiled kernel, by the model.

    Attributes:
        programs: on a multiprocessor at once.
        cycles: of a multiprocessor for an iteration of one program, no branch taken: of a tile with a mask.
        full: the same with every forward branch taken: of a tile without.
    """

    programs: int
    cycles: float
    full: float


def cost(loop: Sequence[Instruction], registers: int, shared: int, warps: int) -> Cost:
    """Run the model on a loop; both ways where it branches."""
    programs = resident(registers, shared, warps)
    straight, jumping = path(loop), path(loop, jump=True)
    cycles = iteration_cycles(straight, warps, programs)
    full = iteration_cycles(jumping, warps, programs) if len(jumping) < len(straight) else cycles
    return Cost(programs, round(cycles, 1), round(full, 1))


def milliseconds(what: Cost, of: Work, clock: float, start: float) -> float:
    """Time of a launch: its iterations, and `start` cycles for each program, hidden behind those it runs beside."""
    iterations = of.masked * what.cycles + (of.iterations - of.masked) * (what.full if of.masked else what.cycles)
    cycles = (iterations + of.programs * start / what.programs) * of.heads / MULTIPROCESSORS
    return cycles / clock / 1e6


def predict(kernel: str, head_dim: int, config: Config, what: Cost, layout: str | None = None) -> float:
    """TFLOP/s at the shape of `tools.variants`; sparse kernels with a window of 7 pixels unless `layout` says else."""
    fitted = calibration()
    chosen = layout or (f"local2d:{RADII[0]}" if family(kernel) == "sparse" else "causal")
    of = work(kernel, head_dim, config.block_m, config.block_n, chosen)
    time = milliseconds(what, of, fitted["clock_ghz"][family(kernel)], fitted["start_cycles"])
    return of.flops * of.heads / time / 1e9


def measured(kernel: str, head_dim: int, config: Config) -> float:
    """TFLOP/s that the calibration has for this very configuration, at the shape that `predict` takes; 0 without."""
    layout = f"local2d:{RADII[0]}" if family(kernel) == "sparse" else "causal"
    for row in calibration()["rows"]:
        if (row["kernel"], row["head_dim"], row["config"], row["layout"]) == (kernel, head_dim, config.entry, layout):
            return float(row["tflops"])
    return 0.0


@dataclass(frozen=True)
class Look:
    """What the machine code of one kernel says.

    Attributes:
        problems: see `problems`.
        predicted: TFLOP/s; 0 for kernels that are not attention.
        measured: TFLOP/s on an H100; 0 where this configuration has no time.
    """

    problems: tuple[str, ...] = ()
    predicted: float = 0.0
    measured: float = 0.0


def look(instructions: Sequence[Instruction], kernel: str, size: int, config: Config, registers: int, shared: int) -> Look:
    """Problems and rate of a compiled kernel with warpgroup products."""
    loop = hot_loop(instructions)
    if not loop:
        return Look(("no loop of warpgroup products",))
    heads = kernel in ATTENTION
    found = tuple(problems(loop, size, heads))
    if not config.gluon and overwritten(loop):  # the loop in Gluon carries the weights of the tile before
        found = (*found, OVERWRITTEN)
    if config.num_stages < 3 and any(one.opcode.startswith("UTMALDG") for one in loop):
        # The copy of a descriptor is waited for by the parity of a barrier, which the code does not show. With two tiles in
        # memory it can only be issued when the products are done. On an H100: 294 to 461 TFLOP/s, modelled 19 to 30 % too fast.
        found = (*found, EXPOSED)
    if not heads:
        return Look(found)
    if config.gluon or config.descriptors:  # beyond the model: warps of different tasks, copies that the code does not time
        return Look(found, 0.0, measured(kernel, size, config))
    rate = predict(kernel, size, config, cost(loop, registers, shared, config.num_warps))
    return Look(found, round(rate, 1), measured(kernel, size, config))


class Row(Protocol):
    """What `lines` reads of a row of the audit."""

    @property
    def kernel(self) -> str:
        """Name of the kernel."""

    @property
    def size(self) -> int:
        """Head dim."""

    @property
    def config(self) -> tuple[int, int, int, int]:
        """Tile, warps and stages."""

    @property
    def predicted(self) -> float:
        """TFLOP/s by the model; 0 without."""

    @property
    def measured(self) -> float:
        """TFLOP/s on a device; 0 without."""


def both(keys: float, queries: float) -> float:
    """The rate of a backward pass as it is counted, 10 FLOPs a pair and value, from the rates of its two kernels."""
    return 10 / (8 / keys + 6 / queries) if keys and queries else 0.0


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The second table of the audit: predicted beside measured and published TFLOP/s at the head dims of Image GPT."""
    chosen = {(row.kernel, row.size): row for row in rows if (row.predicted or row.measured) and row.size in HEAD_DIMS}
    if not chosen:
        return
    error = calibration()["error"]
    yield (
        f"\nsm_90, 16 bits, TFLOP/s: predicted by a model of the machine code, ±{error['dense']['p80']:.0%} dense and "
        f"±{error['sparse']['p80']:.0%} sparse ({error['share']:.0%} of the rows that its fit has not seen);"
    )
    yield f"measured on {calibration()['device']} with Triton {calibration()['triton']}."
    yield f"{TOKENS:,} tokens: causal, or a window of radius {RADII[0]} on {SIDE} x {SIDE} pixels where sparse."
    yield f"{'kernel':24} {'size':>4} {'config':>15} {'predicted':>12} {'measured':>9}  published (causal, not measured here)"
    for (kernel, size), row in chosen.items():
        config, bar = ",".join(map(str, row.config)), row.predicted * error[family(kernel)]["p80"]
        said = PUBLISHED.get(("forward", size), "") if kernel == "flash_forward" else ""
        estimate = f"{row.predicted:>6.0f} ± {bar:>3.0f}" if row.predicted else ""
        yield f"{kernel:24} {size:>4} {config:>15} {estimate:>12} {row.measured or '':>9}  {said}".rstrip()
    for size in HEAD_DIMS:
        pair = [chosen.get((f"flash_backward_{one}", size)) for one in ("keys", "queries")]
        if pair[0] and pair[1]:
            guess = both(pair[0].predicted, pair[1].predicted)
            true = both(pair[0].measured, pair[1].measured)
            bar, said = guess * error["dense"]["p80"], PUBLISHED.get(("backward", size), "")
            shown, rate = f"{true:.0f}" if true else "", f"{guess:>6.0f} ± {bar:>3.0f}" if guess else ""
            yield f"{'both, as 5 products':24} {size:>4} {'':>15} {rate:>12} {shown:>9}  {said}".rstrip()
