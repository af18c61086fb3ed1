"""Kernels for Image GPT: usable without `igpt`, and without a GPU, a compiler or any extra.

Importing this package costs nothing: torch is imported with the first name taken from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from igpt_kernels import layouts
    from igpt_kernels.attention import block_sparse_attention, decode_attention, flash_attention
    from igpt_kernels.backends import explain
    from igpt_kernels.fused import linear_cross_entropy, quick_gelu, rms_norm
    from igpt_kernels.palette import PaletteTable, palette_lookup

_ROOMS = {
    "PaletteTable": "palette",
    "block_sparse_attention": "attention",
    "decode_attention": "attention",
    "explain": "backends",
    "flash_attention": "attention",
    "layouts": "layouts",
    "linear_cross_entropy": "fused",
    "palette_lookup": "palette",
    "quick_gelu": "fused",
    "rms_norm": "fused",
}

__all__ = [
    "PaletteTable",
    "block_sparse_attention",
    "decode_attention",
    "explain",
    "flash_attention",
    "layouts",
    "linear_cross_entropy",
    "palette_lookup",
    "quick_gelu",
    "rms_norm",
]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(f"{__name__}.{_ROOMS[name]}")
    return room if name == _ROOMS[name] else getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
