"""What there is to measure: operations, the methods that compute them, and which cases a run takes.

An `Operation` knows its inputs, its oracle and its cost; a `Method` knows how one library computes it. A `Case` is a method
of an operation at one size; it is plain data and travels to a child process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

RESOLUTIONS = (32, 48, 64, 96, 128, 192, 256)
# Heads and head dim of one layer; "tiny" is the model that two CPU cores can train.
PRESETS = {"tiny": (4, 32), "S": (8, 64), "M": (8, 128), "L": (16, 96)}
MODELS = {"tiny": "tiny", "S": "igpt-s", "M": "igpt-m", "L": "igpt-l"}
SUITES = {
    "attention": "one layer of dense causal attention",
    "sparse": "one layer of block-sparse attention, beside FlexAttention with the same mask",
    "decode": "one query against a cache of keys",
    "fused": "norm, activation and loss",
    "palette": "colours of images",
    "train": "one training step of a model",
    "sample": "one more pixel of a model with a full cache",
}
ROOMS = ("attention", "fused", "palette", "model")
# The peers that ratios are given against, by suite; a sparse layer is set against the dense layer of the same size.
PEERS = {
    "attention": ("eager", "sdpa"),
    "sparse": ("eager", "sdpa"),
    "decode": ("eager", "sdpa"),
    "fused": ("eager", "compile"),
    "palette": ("transformers", "scipy"),
    "train": ("hf-eager", "plain"),
    "sample": ("hf-eager", "plain"),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure. `resolution` is the side of a square image, 0 where a user gave a number of tokens."""

    suite: str
    op: str
    method: str
    preset: str
    resolution: int
    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    device: str

    @property
    def width(self) -> int:
        """C = H·D."""
        return self.heads * self.head_dim

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the image: as near to a square as the number of tokens allows."""
        height = math.isqrt(self.tokens)
        while self.tokens % height:
            height -= 1
        return height, self.tokens // height

    @property
    def shape(self) -> str:
        """``B×H×T×D``."""
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.head_dim}"

    @property
    def key(self) -> str:
        """The name of the case in files: what must agree for two rows to be the same measurement."""
        return "/".join((self.suite, self.op, self.method, self.preset, self.shape, self.dtype, self.device))

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """The case of a row of results."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "tokens", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cost:
    """What a call must do, whoever does it.

    Attributes:
        flops: floating point operations.
        bytes: memory that must be read and written once.
        bound: which of the two limits a good implementation: ``"compute"`` or ``"memory"``.
        formula: where the number comes from, for people.
        per: what a rate counts (``"pixels"``), with `count` of them; empty: nothing but operations and bytes.
        count: see `per`.
    """

    flops: float
    bytes: float
    bound: str
    formula: str
    per: str = ""
    count: int = 0


@dataclass
class Work:
    """A case made ready: closures over its inputs, by way.

    Attributes:
        calls: way -> what is timed (``forward``; ``both``: forward and backward; ``backward`` where a graph is kept; ``step``).
        warm: a small call that loads what the first call loads, so that it does not count as memory.
        config: which kernel and configuration really runs.
        compiled: the first call at full size compiles; its memory is not that of the work.
        facts: more columns of the row.
    """

    calls: dict[str, Callable[[], object]]
    warm: Callable[[], object] | None = None
    config: str = ""
    compiled: bool = False
    facts: dict[str, object] | None = None


@dataclass(frozen=True)
class Method:
    """One way to compute an operation.

    Attributes:
        make: case -> what `Operation.prepare` and `Operation.verify` run; imports its library when it is called.
        needs: modules that must be installed.
        loads: modules that are loaded once for all cases, before children are forked.
        public: name in `igpt_kernels` that must exist; a version without it skips the case.
        devices: where it runs.
        refuses: (case, way) -> why it cannot, or an empty string.
        memory: (case, way) -> bytes beyond the inputs that it takes at the least, and what they are.
        compiled: whether the first call compiles.
    """

    make: Callable[[Case], Any]
    needs: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    public: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    refuses: Callable[[Case, str], str] | None = None
    memory: Callable[[Case, str], tuple[int, str]] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Operation:
    """What is computed: inputs, oracle, cost, and who computes it.

    Attributes:
        suite: see `SUITES`.
        name: within its suite.
        public: the public names of `igpt_kernels` and `igpt` that it measures.
        ways: what is timed on a CPU; on CUDA attention adds ``backward`` alone.
        prepare: (case, subject) -> `Work`.
        verify: (case, subject) -> share of the error budget used; AssertionError beyond 1, before anything is timed.
        cost: (case, way) -> `Cost`.
        methods: by name; those that others are compared with come first.
        verify_forward: as `verify`, of the output alone, for where no other way is timed; None: `verify` does.
    """

    suite: str
    name: str
    public: tuple[str, ...]
    ways: tuple[str, ...]
    prepare: Callable[[Case, Any], Work]
    verify: Callable[[Case, Any], float]
    cost: Callable[[Case, str], Cost]
    methods: dict[str, Method]
    verify_forward: Callable[[Case, Any], float] | None = None

    def ways_on(self, device: str) -> tuple[str, ...]:
        """Ways that are timed on a device."""
        return ("forward", "backward", "both") if device == "cuda" and self.ways == ("forward", "both") else self.ways


@functools.cache
def operations() -> dict[tuple[str, str], Operation]:
    """The registry: every room of cases gives its operations, in the order of `SUITES`."""
    found = [op for room in ROOMS for op in importlib.import_module(f"benchmarks.cases_{room}").OPERATIONS]
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


def absent(case: Case, way: str) -> str:
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
class Pick:
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
PLANS: dict[tuple[str, str], tuple[Pick, ...]] = {
    ("cpu", "quick"): (
        Pick("attention", resolutions=(32, 48), methods=("eager", "sdpa", "flash")),
        Pick("sparse", resolutions=(48, 64), ops=("local2d:7",), methods=("sparse",)),
        Pick("decode", resolutions=(64,)),
        Pick("fused", resolutions=(32,), methods=("eager", "ours")),
        Pick("palette", resolutions=(0, 64), methods=("ext", "torch", "scipy", "pillow")),
        Pick("train", presets=("tiny",), resolutions=(32,), methods=("plain", "kernels", "sparse")),
        Pick("sample", presets=("tiny",), resolutions=(32,), methods=("plain", "kernels")),
    ),
    ("cpu", "default"): (
        Pick("attention", methods=("eager", "sdpa", "flash")),
        Pick("attention", resolutions=(32, 48, 64), methods=("flex",)),
        Pick("attention", presets=("M", "L"), resolutions=(32,), methods=("sdpa", "flash")),
        Pick("sparse", ops=("local2d:7",), methods=("sparse",)),
        Pick("sparse", ops=("local2d:7",), resolutions=(32, 64, 128), methods=("flex",)),  # lists of 256² take a minute
        Pick("sparse", ops=("local2d:15", "row_column", "strided"), resolutions=(64,), methods=("sparse",)),
        Pick("sparse", ops=("row_column",), resolutions=(64,), methods=("flex",)),
        Pick("sparse", ops=("build",), resolutions=(64, 256)),
        Pick("sparse", presets=("M", "L"), ops=("local2d:7",), resolutions=(32,), methods=("sparse",)),
        Pick("decode", resolutions=(32, 64, 128, 256)),
        Pick("fused", resolutions=(32, 64), methods=("eager", "torch", "ours")),
        Pick("fused", resolutions=(64,), methods=("compile",)),
        Pick("palette", resolutions=(0, 32, 64, 256)),
        Pick("train", presets=("tiny",), resolutions=(32, 64, 96, 128), methods=("hf-eager", "kernels", "sparse")),
        Pick("train", presets=("tiny",), resolutions=(32, 64), methods=("hf-kernels",)),
        Pick("train", presets=("tiny",), resolutions=(32,), methods=("hf-compile", "plain")),
        Pick("train", presets=("S",), resolutions=(32,), methods=("hf-eager", "kernels")),
        Pick("sample", presets=("tiny",), resolutions=(32,)),
        Pick("sample", resolutions=(32, 64)),
    ),
    ("cuda", "quick"): (
        Pick("attention", presets=("S", "M", "L"), resolutions=(32,), methods=("sdpa", "flash")),
        Pick("attention", presets=("S", "M", "L"), resolutions=(64,), methods=("sdpa", "sdpa-flash", "sdpa-cudnn", "flash")),
        Pick("attention", presets=("S", "M", "L"), resolutions=(32,), methods=("sdpa-flash", "flash"), batch=1),
        Pick("attention", presets=("S",), resolutions=(64,), methods=("eager", "flex", "flash"), batch=4),
        Pick("attention", presets=("S", "M"), resolutions=(128,), methods=("sdpa-cudnn", "flash")),
        Pick("sparse", resolutions=(64, 128, 256), ops=("local2d:7",), methods=("sparse",)),
        Pick("sparse", resolutions=(128,), ops=("local2d:7",), methods=("flex",)),
        Pick("sparse", resolutions=(128,), ops=("row_column",), methods=("sparse",)),
        Pick("sparse", resolutions=(256,), ops=("build",), methods=("lists",)),
        Pick("decode", resolutions=(64,), ops=("dense",)),
        Pick("fused", resolutions=(64,), methods=("eager", "ours")),
        Pick("palette", resolutions=(256,), methods=("torch", "cdist")),
        Pick("train", presets=("S",), resolutions=(32,), methods=("plain", "kernels")),
        Pick("sample", presets=("S", "L"), resolutions=(32,), methods=("kernels",)),
    ),
    ("cuda", "default"): (
        Pick("attention", presets=("S", "M", "L")),
        Pick(
            "sparse",
            presets=("S", "M", "L"),
            ops=("local2d:7", "local2d:15", "row_column", "build"),
            resolutions=(32, 64, 128, 256),
        ),
        Pick("decode", presets=("S", "M", "L"), resolutions=(32, 64, 128, 256)),
        Pick("fused", presets=("S", "M", "L"), resolutions=(32, 64, 128)),
        Pick("palette", resolutions=(0, 32, 64, 256)),
        Pick("train", presets=("S", "M", "L"), resolutions=(32, 64, 128)),
        Pick("sample", presets=("S", "L"), resolutions=(32, 64)),
    ),
}
FULL = tuple(
    Pick(suite, presets=("tiny", "S", "M", "L") if suite in ("train", "sample") else ("S", "M", "L"), resolutions=resolutions)
    for suite in SUITES
    for resolutions in [(0, *RESOLUTIONS) if suite == "palette" else RESOLUTIONS]
)


def batch_of(suite: str, op: str, preset: str, tokens: int, device: str) -> int:
    """Images at once: one on a CPU (palette: eight, above 128² two); on a GPU as many as fill it.

    Attention takes a million rows B·H·T, which is where targets are stated; decoding reads 256 MiB
    of keys and values, beyond any cache; fused operations run over 2¹⁸ pixels.
    """
    heads, head_dim = PRESETS[preset]
    if device == "cpu":
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


def _picks(selection: Selection) -> Sequence[Pick]:
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
