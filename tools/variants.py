"""Configurations of the attention kernels to try beside what ships, and the shapes at which they are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from igpt_kernels import tuning
from igpt_kernels.tuning import Config

Tiles = dict[int, str]
"""Head dim -> configurations to try beside what ships: block_m x block_n, num_warps, num_stages, and maxnreg if bounded."""

ATTENTION: dict[str, Tiles] = {
    "flash_forward": {
        64: "128x128,4,2,gluon 192x64,4,3,gluon",
        96: "128x128,4,2,gluon 192x64,4,3,gluon 128x128,8,3,whole_head",
        128: "128x128,4,2,gluon 128x128,4,3,gluon",
    },
    "flash_backward_keys": {
        64: "64x64,4,3,168,descriptors 64x64,4,3,descriptors 32x64,4,4,168,descriptors 64x64,4,4,168,descriptors",
        96: "64x64,4,2,descriptors,whole_head 64x64,4,3,168 64x64,4,3,descriptors 64x128,8,3,descriptors,whole_head",
        128: "64x64,4,2,descriptors 64x64,4,2,240,descriptors 64x128,8,3,descriptors",
        256: "64x64,8,2,descriptors 32x64,8,3,descriptors",
    },
    "flash_backward_queries": {
        64: "64x64,4,2,descriptors 64x64,4,3,descriptors 64x64,4,2,128,descriptors",
        96: "64x64,4,3,descriptors 64x64,4,2,descriptors,whole_head 128x64,8,3,descriptors,whole_head",
        128: "128x64,8,3,descriptors",
        256: "128x32,8,3,descriptors",
    },
    "sparse_forward": {
        64: "64x64,4,3 64x64,4,4 64x64,4,3,128 64x64,4,2,descriptors 64x64,4,3,descriptors 64x64,4,2,128,descriptors "
        "64x32,4,3,descriptors 64x32,4,4,descriptors 64x128,4,2,descriptors 128x64,8,2,descriptors",
        96: "64x64,4,2 64x64,4,3 64x64,4,2,descriptors 64x64,4,3,descriptors 64x32,4,3,descriptors 64x32,4,4,descriptors "
        "64x64,4,2,descriptors,whole_head 64x32,4,4,descriptors,whole_head",
        128: "64x64,4,2 64x64,4,3 64x64,4,2,descriptors 64x64,4,3,descriptors 64x32,4,3,descriptors 64x32,4,4,descriptors "
        "64x32,4,3,128,descriptors",
        192: "64x32,4,3 64x32,4,2,descriptors 64x32,4,3,descriptors 64x64,4,2,descriptors",
        256: "64x32,4,3 64x32,4,2 64x32,4,2,descriptors 64x32,4,3,descriptors",
    },
    "sparse_backward_keys": {
        64: "32x64,4,2,168 32x64,4,3,168 64x64,4,2,descriptors 32x64,4,3,descriptors 32x64,4,4,descriptors "
        "32x64,4,2,168,descriptors 32x64,4,3,168,descriptors 32x64,4,4,168,descriptors",
        96: "32x64,4,2 32x64,4,3 64x64,4,2,descriptors 32x64,4,3,descriptors 32x64,4,4,descriptors "
        "64x64,4,2,descriptors,whole_head 32x64,4,3,descriptors,whole_head",
        128: "32x64,4,2 64x64,4,2,descriptors 32x64,4,2,descriptors 32x64,4,3,descriptors 32x64,4,4,descriptors",
        192: "32x64,4,2 32x64,4,2,descriptors 32x64,4,3,descriptors",
        256: "16x64,4,2 32x64,4,1 32x64,8,1 32x64,4,1,descriptors 16x64,4,2,descriptors 32x64,8,1,descriptors",
    },
    "sparse_backward_queries": {
        64: "64x64,4,3 64x64,4,2 64x64,4,2,descriptors 64x64,4,3,descriptors 64x32,4,3,descriptors",
        96: "64x64,4,2 64x64,4,2,descriptors 64x64,4,3,descriptors 64x32,4,3,descriptors 64x64,4,2,descriptors,whole_head",
        128: "64x64,4,3 64x32,4,3 64x64,4,2,descriptors 64x64,4,3,descriptors 64x32,4,3,descriptors 64x32,4,4,descriptors",
        192: "64x32,4,2 64x32,4,2,descriptors 64x32,4,3,descriptors",
        256: "64x32,4,2 64x32,4,2,descriptors 64x16,4,3,descriptors",
    },
}
PRODUCTS = {"forward": 4, "keys": 8, "queries": 6}
"""FLOPs of a visible pair and value of a head: two for each matrix product of the kernel."""
NAMES = ("kernel", "head_dim", *(field.name for field in fields(Config)))
"""Columns that say which variant a row is of."""
TOKENS, HEADS = 16384, 16
"""The shape at which dense kernels are timed: one image of 128 x 128."""
SIDE, SPARSE_HEADS = 128, 32
"""Of sparse kernels: side of an image, heads of all images of a batch."""
RADII = (7, 15)
"""Of the windows of sparse kernels, in pixels."""


@dataclass(frozen=True)
class Variant:
    """One way to run one kernel."""

    kernel: str
    head_dim: int
    config: Config

    def row(self) -> dict[str, object]:
        """As columns."""
        return {"kernel": self.kernel, "head_dim": self.head_dim, **asdict(self.config)}


def parse(text: str) -> Config:
    """A configuration as it prints: ``128x64,8,3,128,descriptors``."""
    values = text.replace("x", ",", 1).split(",")
    return Config.read([int(value) if value.isdigit() else value for value in values])


def variants(kernels: Sequence[str] = ()) -> Iterator[Variant]:
    """All of them, or those of kernels whose name begins with one of `kernels`; head dims that matter most come first."""
    for head_dim in (64, 128, 96, 32, 192, 256):
        for kernel, dims in ATTENTION.items():
            if head_dim in dims and (not kernels or kernel.startswith(tuple(kernels))):
                device = torch.device("cuda", 0)
                shipped = tuning.lookup(kernel, dtype=torch.bfloat16, head_dim=head_dim, device=device)
                tried = [parse(one) for one in dims[head_dim].split()]
                for config in dict.fromkeys([shipped, *tried]):
                    yield Variant(kernel, head_dim, config)
