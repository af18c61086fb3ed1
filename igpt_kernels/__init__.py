"""Kernels for Image GPT: usable without `igpt`, and without a GPU, a compiler or any extra.

Importing this package costs nothing: torch is imported with the first name taken from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from igpt_kernels import layouts
    from igpt_kernels.activation import quick_gelu
    from igpt_kernels.attention import block_sparse_attention, decode_attention, flash_attention
    from igpt_kernels.backends import explain
    from igpt_kernels.loss import linear_cross_entropy
    from igpt_kernels.norm import rms_norm
    from igpt_kernels.palette import PaletteTable, palette_lookup

_EXPORTS = {
    "PaletteTable": "palette",
    "block_sparse_attention": "attention",
    "decode_attention": "attention",
    "explain": "backends",
    "flash_attention": "attention",
    "layouts": "layouts",
    "linear_cross_entropy": "loss",
    "palette_lookup": "palette",
    "quick_gelu": "activation",
    "rms_norm": "norm",
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
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
    return module if name == _EXPORTS[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
