"""Image GPT: palettes, pretraining, sampling, completion and linear probes. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt.config import ImageGPTConfig, preset
    from igpt.model import ImageGPT
    from igpt.palette import Palette
    from igpt.probe import linear_probe
    from igpt.sampling import complete, sample
    from igpt.swap import use_kernels

__version__ = "0.1.0"
__all__ = ["ImageGPT", "ImageGPTConfig", "Palette", "complete", "linear_probe", "preset", "sample", "use_kernels"]

_HOMES = {
    "ImageGPT": "igpt.model",
    "ImageGPTConfig": "igpt.config",
    "Palette": "igpt.palette",
    "complete": "igpt.sampling",
    "linear_probe": "igpt.probe",
    "preset": "igpt.config",
    "sample": "igpt.sampling",
    "use_kernels": "igpt.swap",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'igpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
