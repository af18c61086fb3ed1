"""Image GPT: palettes, pretraining, sampling, completion and linear probes. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt.evaluation.probe import linear_probe
    from igpt.generation.sample import complete, sample
    from igpt.kernels.use import use_kernels
    from igpt.model.config import ImageGPTConfig, preset
    from igpt.model.image_gpt import ImageGPT
    from igpt.palette.palette import Palette

__version__ = "0.1.0"
__all__ = ["ImageGPT", "ImageGPTConfig", "Palette", "complete", "linear_probe", "preset", "sample", "use_kernels"]

_EXPORTS = {
    "ImageGPT": "igpt.model.image_gpt",
    "ImageGPTConfig": "igpt.model.config",
    "Palette": "igpt.palette.palette",
    "complete": "igpt.generation.sample",
    "linear_probe": "igpt.evaluation.probe",
    "preset": "igpt.model.config",
    "sample": "igpt.generation.sample",
    "use_kernels": "igpt.kernels.use",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'igpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
