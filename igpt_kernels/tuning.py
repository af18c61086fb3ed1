"""Kernel configurations as data: which tile sizes and warps a kernel runs with on a device. Nothing is tuned at run time.

Autotuning while a program runs lets the ranks of one job disagree (NVIDIA/Megatron-LM#6966) and hides wrong results; here
a table decides, and ``make tune`` writes a new one. Files are `configs/<name>.json`, one for each family of chips. `default`
serves every other NVIDIA chip from compute capability 8.0 on, `amd` every AMD chip. After ``make tune`` there is one for a
device by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "configs"
FAMILIES: Mapping[tuple[int, int], str] = {
    (8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip
"""Compute capability -> table. Others (8.6, 8.9: 99 KiB of shared memory) take the default. That of 12.0 differs from it in
entries that spill there."""
AMD = "amd"
"""The table of AMD chips that have none of their own; `AMD_CHIPS` are those that it was compiled for."""
AMD_CHIPS = ("gfx90a", "gfx942", "gfx950")
"""Of AMD Instinct MI200, MI300 and MI350. The kernels are compiled for them and were never run on one."""
PAIRS = {
    f"{kind}_backward_{one}": f"{kind}_backward_{other}"
    for kind in ("flash", "sparse")
    for one, other in (("keys", "queries"), ("queries", "keys"))
}
"""Backward kernels that one launcher launches together."""
FLAGS = ("descriptors", "whole_head", "gluon")
"""Fields of a configuration that are true where an entry of a table names them."""
WIDEST = 8192
"""Widest row that a table lists; wider ones, where a kernel takes them, run with its configuration."""


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched.

    Attributes:
        block_m: rows (attention: of queries) in a tile; a power of two.
        block_n: columns (attention: rows of keys) in a tile; a power of two.
        num_warps: warps of 32 threads in a program; on AMD's data center chips waves of 64.
        num_stages: tiles in flight between memory and the multiplications; where nothing is multiplied (norm, activation),
            programs that a multiprocessor holds at once.
        maxnreg: most registers a thread may take, so that more programs fit on a multiprocessor; 0 leaves it to the compiler.
            This and the flags below are for NVIDIA chips: the compiler for AMD chips knows none of them.
        descriptors: load tiles by the copy engine of compute capability 9.0 and later (TMA), where strides allow it.
        whole_head: a head in one part padded to a power of two (96 as 128, zeros beyond), not in two (64 and 32).
        gluon: the kernel written in Gluon, with a warp that copies and warpgroups that compute; compute capability 9.0.
            Only `flash_forward` has one. Then block_m is 128 or 192: 64 rows for each warpgroup; block_n 64 or 128; num_warps
            4, the warps of a warpgroup; num_stages the tiles of keys in shared memory, 2 or more.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0
    descriptors: bool = False
    whole_head: bool = False
    gluon: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "num_warps", "num_stages", "maxnreg"):
            value, free = getattr(self, name), name in ("num_stages", "maxnreg") or (self.gluon and name == "block_m")
            if not isinstance(value, int) or value < (name != "maxnreg") or (not free and value & (value - 1)):
                raise ValueError(
                    f"{name} must be a power of two (num_stages: any positive number; maxnreg: 0 or more), got {value!r}"
                )
        if self.gluon and not (
            self.block_m in (128, 192) and self.block_n in (64, 128) and self.num_warps == 4 and self.num_stages >= 2
        ):
            raise ValueError(
                "with gluon block_m must be 128 or 192, block_n 64 or 128, num_warps 4 and num_stages 2 or more, "
                f"got {self.block_m}, {self.block_n}, {self.num_warps}, {self.num_stages}"
            )

    @classmethod
    def read(cls, values: Sequence[int | str]) -> Config:
        """From an entry of a table: four or five numbers in the order of the attributes, then names of those that are true.

        Raises:
            ValueError: a number out of range, or a name that is no attribute.
            TypeError: too few numbers, or too many.
        """
        flags = [value for value in values if isinstance(value, str)]
        if unknown := sorted({*flags} - {*FLAGS}):
            raise ValueError(f"flags must be of {', '.join(FLAGS)}, got {', '.join(unknown)}")
        numbers = [value for value in values if not isinstance(value, str)]
        if not 4 <= len(numbers) <= 5:
            raise TypeError(f"a configuration must have four or five numbers, got {len(numbers)}")
        return cls(*numbers, **dict.fromkeys(flags, True))  # type: ignore[arg-type]

    @property
    def entry(self) -> list[int | str]:
        """As an entry of a table; `read` is the way back."""
        numbers = [self.block_m, self.block_n, self.num_warps, self.num_stages]
        return [*numbers, *([self.maxnreg] if self.maxnreg else []), *(flag for flag in FLAGS if getattr(self, flag))]

    def __str__(self) -> str:
        """The entry on one line: ``128x64,8,3`` and what follows."""
        m, n, *rest = self.entry
        return ",".join(map(str, (f"{m}x{n}", *rest)))

    @functools.cached_property
    def options(self) -> Mapping[str, int]:
        """What a launch hands to the compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


@functools.cache
def table(name: str) -> Mapping[str, Mapping[str, Mapping[str, Config]]]:
    """The configurations of one file: kernel -> bits of the dtype -> largest head dim (or width) -> Config.

    Raises:
        ValueError: the file is not a table of configurations.
    """
    path = FOLDER / f"{name}.json"
    try:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        return {
            kernel: {bits: {dim: Config.read(values) for dim, values in dims.items()} for bits, dims in by_bits.items()}
            for kernel, by_bits in kernels.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold kernels -> bits -> head dim -> [block_m, block_n, num_warps, num_stages(, maxnreg)(, flags)]"
        ) from error


@functools.cache
def measured(name: str) -> Mapping[str, frozenset[int]]:
    """The 16-bit entries of a table that were timed on a device and chosen: kernel -> sizes; empty where none was."""
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")).get("measured", {})
    return {kernel: frozenset(sizes) for kernel, sizes in found.get("kernels", {}).items()}


def slug(device_name: str) -> str:
    """The file name of a device: ``NVIDIA H200`` is ``nvidia-h200``, ``AMD Instinct MI250X/MI250`` has no slash in it."""
    return "-".join(device_name.lower().replace("/", " ").split())


@functools.cache
def table_for(device: torch.device) -> str:
    """The name of the nearest table: the device's own, else its family's, else the default of its maker.

    A torch for ROCm calls AMD chips ``cuda`` too. Their family is the first part of a name like ``gfx942:sramecc+:xnack-``.
    """
    if device.type != "cuda":
        return "default"
    names = [slug(torch.cuda.get_device_name(device))]
    if torch.version.hip is not None:
        names.append(torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    for name in names:
        if (FOLDER / f"{name}.json").exists():
            return name
    if torch.version.hip is not None:
        return AMD
    return FAMILIES.get(torch.cuda.get_device_capability(device), "default")


def lookup(kernel: str, *, dtype: torch.dtype, head_dim: int, device: torch.device) -> Config:
    """The configuration of a kernel: that of the smallest listed head dim that is not below `head_dim`.

    Args:
        kernel: name of a kernel, for example ``"flash_forward"``.
        dtype: dtype of the inputs.
        head_dim: width of a head, up to 256; of a row, up to `WIDEST`, for kernels that know no heads.
        device: where it will run; any device but a GPU takes the default.

    Raises:
        ValueError: no such kernel, dtype or head dim in the table.
    """
    return _entry(table_for(device), kernel, dtype.itemsize * 8, head_dim)


@functools.cache
def _entry(name: str, kernel: str, bits: int, head_dim: int) -> Config:
    return nearest(table(name), kernel, bits, head_dim)


def nearest(configs: Mapping[str, Mapping[str, Mapping[str, Config]]], kernel: str, bits: int, head_dim: int) -> Config:
    """The entry of `configs` for the smallest listed head dim that is not below `head_dim`.

    Raises:
        ValueError: no such kernel, dtype or head dim in the table.
    """
    dims = configs.get(kernel, {}).get(str(bits), {})
    fitting = [int(dim) for dim in dims if int(dim) >= head_dim]
    if not fitting:
        raise ValueError(f"no configuration for {kernel}, {bits} bits, head_dim {head_dim}; the table has {configs!r}")
    return dims[str(min(fitting))]
