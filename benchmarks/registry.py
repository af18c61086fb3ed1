"""What there is to measure: operations, and the methods that compute them.

An `Operation` knows its inputs, its oracle and its cost; a `Method` knows how one library computes it. A `Case` is a method
of an operation at one size; it is plain data and is sent to a child process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
# Methods of this library, which alone are judged; the others are its peers.
OURS = ("flash", "sparse", "decode", "ours", "ext", "kernels", "hf-kernels")
# What the rows call a pass -> how a page writes it.
WAYS = {"forward": "forward", "backward": "backward", "both": "forward + backward", "step": "step"}
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
class Workload:
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
        prepare: (case, subject) -> `Workload`.
        verify: (case, subject) -> share of the error budget used; AssertionError beyond 1, before anything is timed.
        cost: (case, way) -> `Cost`.
        methods: by name; those that others are compared with come first.
        verify_forward: as `verify`, of the output alone, for where no other way is timed; None: `verify` does.
        backward_alone: whether a backward pass over a kept graph is what training pays. False for the loss: the first one takes
            gradients that the forward pass made, and any other makes them again.
    """

    suite: str
    name: str
    public: tuple[str, ...]
    ways: tuple[str, ...]
    prepare: Callable[[Case, Any], Workload]
    verify: Callable[[Case, Any], float]
    cost: Callable[[Case, str], Cost]
    methods: dict[str, Method]
    verify_forward: Callable[[Case, Any], float] | None = None
    backward_alone: bool = True

    def ways_on(self, device: str) -> tuple[str, ...]:
        """Ways that are timed on a device."""
        alone = device == "cuda" and self.ways == ("forward", "both") and self.backward_alone
        return ("forward", "backward", "both") if alone else self.ways
