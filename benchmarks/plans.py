"""Which cases a run takes, and which of them this machine can run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.registry import PRESETS, RESOLUTIONS, SUITES, Case, Method, Operation

CASE_MODULES = ("attention", "block_lists", "decode", "fused", "palette", "model")


@functools.cache
def operations() -> dict[tuple[str, str], Operation]:
    """The registry: every module of `benchmarks.cases` gives its operations, in the order of `SUITES`."""
    found = [op for name in CASE_MODULES for op in importlib.import_module(f"benchmarks.cases.{name}").OPERATIONS]
    order = list(SUITES)
    return {(op.suite, op.name): op for op in sorted(found, key=lambda op: order.index(op.suite))}


def find(case: Case) -> tuple[Operation, Method]:
    """The operation and method of a case.

    Raises:
        ValueError: the registry has no such thing.
    """
    operation = operations().get((case.suite, case.op))
    if operation is None or case.method not in operation.methods:
        raise ValueError(f"there is no benchmark {case.suite}/{case.op}/{case.method}")
    return operation, operation.methods[case.method]


def unavailable_reason(case: Case, way: str) -> str:
    """Why a case cannot run on this machine or in this version; empty when it can."""
    _, method = find(case)
    if case.device not in method.devices:
        return f"needs {' or '.join(method.devices)}"
    for module in method.needs:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if method.public:
        import igpt_kernels

        if method.public not in igpt_kernels.__all__:
            return f"not in this version: igpt_kernels has no {method.public}"
    return method.refuses(case, way) if method.refuses else ""


@dataclass(frozen=True)
class PlanEntry:
    """A part of a plan: operations of a suite (all when empty) at some presets and resolutions, by some methods (all)."""

    suite: str
    presets: tuple[str, ...] = ("S",)
    resolutions: tuple[int, ...] = RESOLUTIONS
    ops: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    batch: int | None = None
    """Images at once; None: see `batch_of`."""


# What a run takes: (device, mode). A CPU run is to end within ten minutes on two cores, its quick form within one; the quick
# form on a GPU within four. "full" is everything, for machines with time: it goes on where it stopped with --resume.
PLANS: dict[tuple[str, str], tuple[PlanEntry, ...]] = {
    ("cpu", "quick"): (
        PlanEntry("attention", resolutions=(32, 48), methods=("eager", "sdpa", "flash")),
        PlanEntry("sparse", resolutions=(48, 64), ops=("local2d:7",), methods=("sparse",)),
        PlanEntry("decode", resolutions=(64,)),
        PlanEntry("fused", resolutions=(32,), methods=("eager", "ours")),
        PlanEntry("palette", resolutions=(0, 64), methods=("ext", "torch", "scipy", "pillow")),
        PlanEntry("train", presets=("tiny",), resolutions=(32,), methods=("plain", "kernels", "sparse")),
        PlanEntry("sample", presets=("tiny",), resolutions=(32,), methods=("plain", "kernels")),
    ),
    ("cpu", "default"): (
        PlanEntry("attention", methods=("eager", "sdpa", "flash")),
        PlanEntry("attention", resolutions=(32, 48, 64), methods=("flex",)),
        PlanEntry("attention", presets=("M", "L"), resolutions=(32,), methods=("sdpa", "flash")),
        PlanEntry("sparse", ops=("local2d:7",), methods=("sparse",)),
        PlanEntry("sparse", ops=("local2d:7",), resolutions=(32, 64, 128), methods=("flex",)),  # lists of 256² take a minute
        PlanEntry("sparse", ops=("local2d:15", "row_column", "strided"), resolutions=(64,), methods=("sparse",)),
        PlanEntry("sparse", ops=("row_column",), resolutions=(64,), methods=("flex",)),
        PlanEntry("sparse", ops=("build",), resolutions=(64, 256)),
        PlanEntry("sparse", presets=("M", "L"), ops=("local2d:7",), resolutions=(32,), methods=("sparse",)),
        PlanEntry("decode", resolutions=(32, 64, 128, 256), ops=("dense", "local2d:7")),
        PlanEntry("decode", resolutions=(8, 16, 32), ops=("lengths",)),
        PlanEntry("fused", resolutions=(32, 64), methods=("eager", "torch", "ours")),
        PlanEntry("fused", resolutions=(64,), methods=("compile",)),
        PlanEntry("palette", resolutions=(0, 32, 64, 256)),
        PlanEntry("train", presets=("tiny",), resolutions=(32, 64, 96, 128), methods=("hf-eager", "kernels", "sparse")),
        PlanEntry("train", presets=("tiny",), resolutions=(32, 64), methods=("hf-kernels",)),
        PlanEntry("train", presets=("tiny",), resolutions=(32,), methods=("hf-compile", "plain")),
        PlanEntry("train", presets=("S",), resolutions=(32,), methods=("hf-eager", "kernels")),
        PlanEntry("sample", presets=("tiny",), resolutions=(32,)),
        PlanEntry("sample", resolutions=(32, 64)),
    ),
    ("cuda", "quick"): (
        PlanEntry("attention", presets=("S", "M", "L"), resolutions=(32,), methods=("sdpa", "flash")),
        PlanEntry(
            "attention", presets=("S", "M", "L"), resolutions=(64,), methods=("sdpa", "sdpa-flash", "sdpa-cudnn", "flash")
        ),
        PlanEntry("attention", presets=("S", "M", "L"), resolutions=(32,), methods=("sdpa-flash", "flash"), batch=1),
        PlanEntry("attention", presets=("S",), resolutions=(64,), methods=("eager", "flex", "flash"), batch=4),
        PlanEntry("attention", presets=("S", "M"), resolutions=(128,), methods=("sdpa-cudnn", "flash")),
        PlanEntry("sparse", resolutions=(64, 128, 256), ops=("local2d:7",), methods=("sparse",)),
        PlanEntry("sparse", resolutions=(128,), ops=("local2d:7",), methods=("flex",)),
        PlanEntry("sparse", resolutions=(128,), ops=("row_column",), methods=("sparse",)),
        PlanEntry("sparse", resolutions=(256,), ops=("build",), methods=("lists",)),
        PlanEntry("decode", resolutions=(64,), ops=("dense",)),
        PlanEntry("fused", resolutions=(64,), methods=("eager", "ours")),
        PlanEntry("palette", resolutions=(256,), methods=("torch", "cdist")),
        PlanEntry("train", presets=("S",), resolutions=(32,), methods=("plain", "kernels")),
        PlanEntry("train", presets=("S",), resolutions=(64,), methods=("kernels", "sparse")),
        PlanEntry("sample", presets=("S", "L"), resolutions=(32,), methods=("plain", "kernels")),
    ),
    ("cuda", "default"): (
        PlanEntry("attention", presets=("S", "M", "L")),
        PlanEntry(
            "sparse",
            presets=("S", "M", "L"),
            ops=("local2d:7", "local2d:15", "row_column", "build"),
            resolutions=(32, 64, 128, 256),
        ),
        PlanEntry("decode", presets=("S", "M", "L"), resolutions=(32, 64, 128, 256)),
        PlanEntry("fused", presets=("S", "M", "L"), resolutions=(32, 64, 128)),
        PlanEntry("palette", resolutions=(0, 32, 64, 256)),
        PlanEntry("train", presets=("S", "M", "L"), resolutions=(32, 64, 128)),
        PlanEntry("sample", presets=("S", "L"), resolutions=(32, 64)),
    ),
}
FULL = tuple(
    PlanEntry(
        suite, presets=("tiny", "S", "M", "L") if suite in ("train", "sample") else ("S", "M", "L"), resolutions=resolutions
    )
    for suite in SUITES
    for resolutions in [(0, *RESOLUTIONS) if suite == "palette" else RESOLUTIONS]
)


def batch_of(suite: str, op: str, preset: str, tokens: int, device: str) -> int:
    """Images at once: one on a CPU (palette: eight, above 128² two; decoding with lengths: up to 64); on a GPU many.

    Attention takes a million rows B·H·T, which is where targets are stated; decoding reads 256 MiB
    of keys and values, beyond any cache; fused operations run over 2¹⁸ pixels.
    """
    heads, head_dim = PRESETS[preset]
    if device == "cpu":
        if op == "lengths":
            return max(1, min(64, 2**16 // tokens))
        return (2 if tokens > 2**14 else 8) if suite == "palette" and op == "lookup" else 1
    wanted = {
        "attention": 2**20 // (heads * tokens),
        "sparse": 2**20 // (heads * tokens),
        "decode": 2**28 // (4 * heads * tokens * head_dim),
        "fused": 2**18 // tokens,
        "palette": 2**22 // tokens,
        "train": 8192 // tokens,
        "sample": 1,
    }
    return 1 if op == "table" else max(1, wanted[suite])


def default_dtype(suite: str, device: str) -> str:
    """bfloat16 on a GPU, float32 on a CPU; pixels are bytes anywhere."""
    return "uint8" if suite == "palette" else "bfloat16" if device == "cuda" else "float32"


@dataclass(frozen=True)
class Selection:
    """What a user asks for; what is left out is taken from the plan of the mode, which refuses nothing that is named."""

    device: str
    mode: str = "default"
    suites: tuple[str, ...] = ()
    resolutions: tuple[int, ...] = ()
    presets: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    dtype: str = ""
    shape: tuple[int, int, int, int] | None = None


def _picks(selection: Selection) -> Sequence[PlanEntry]:
    if selection.mode == "full" or selection.shape is not None:
        return FULL
    return PLANS[selection.device, selection.mode]


def plan(selection: Selection) -> Iterator[Case]:
    """The cases of a run: operation by operation, size by size, and at one size every method, peers first.

    Sizes come in order, because the time of a smaller one predicts that of a larger one.
    """
    wanted: dict[tuple[str, str, str, int, int], list[str]] = {}
    for pick in _picks(selection):
        if selection.suites and pick.suite not in selection.suites:
            continue
        for (suite, name), operation in operations().items():
            if suite != pick.suite or (pick.ops and name not in (*pick.ops, *selection.ops)):
                continue
            if selection.ops and name not in selection.ops:
                continue
            for preset in selection.presets or pick.presets:
                for resolution in selection.resolutions or pick.resolutions:
                    if (resolution == 0) != (name == "table"):
                        continue
                    batch = pick.batch or batch_of(suite, name, preset, max(resolution**2, 1), selection.device)
                    methods = wanted.setdefault((suite, name, preset, resolution, batch), [])
                    open_to = (*pick.methods, *selection.methods) if pick.methods else tuple(operation.methods)
                    methods += [m for m in operation.methods if m not in methods and m in open_to]
    done = set()
    order = {(suite, name): place for place, (suite, name) in enumerate(operations())}
    ranks = list(PRESETS)
    for size in sorted(wanted, key=lambda w: (order[w[0], w[1]], ranks.index(w[2]), w[3:])):
        for method, how in operations()[size[0], size[1]].methods.items():
            if method not in wanted[size] or (selection.methods and method not in selection.methods):
                continue
            if selection.device not in how.devices and not selection.methods:
                continue  # of another device, and not asked for by name
            case = _case(selection, method, *size)
            if case is not None and case not in done:
                done.add(case)
                yield case


def _case(selection: Selection, method: str, suite: str, name: str, preset: str, resolution: int, batch: int) -> Case | None:
    dtype = (selection.dtype if suite != "palette" else "") or default_dtype(suite, selection.device)
    if selection.shape is not None:
        if suite in ("palette", "train", "sample"):
            return None  # these are models and pictures, not shapes of a layer
        return Case(suite, name, method, "custom", 0, *selection.shape, dtype, selection.device)
    if suite == "palette":
        preset = "S"  # colours do not depend on the model; shape is written with one head of one channel
    tokens = max(resolution**2, 1)
    heads, head_dim = (1, 3) if suite == "palette" else PRESETS[preset]
    return Case(suite, name, method, preset, resolution, batch, heads, tokens, head_dim, dtype, selection.device)
