"""The machine a command runs on: its devices, its versions, and torch's repeatable mode."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from igpt.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names: ``auto`` (CUDA where there is some), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: another word, or a device that this machine does not have.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        why = (device.type == "cuda" and without_cuda()) or f"this machine has cpu and {torch.cuda.device_count()} CUDA devices"
        raise ConfigError(f"device: {name} is not there; {why}")
    return device


def without_cuda() -> str:
    """Why no CUDA device can be used: a torch without CUDA, no driver or one too old, none visible; empty when one can.

    A torch for ROCm calls AMD GPUs CUDA devices.
    """
    if torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} for ROCm {torch.version.hip} sees no GPU"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; to use a GPU of NVIDIA or AMD install another build (https://pytorch.org)"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use a GPU: {str(error).strip().splitlines()[0]}"
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU"


@contextlib.contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Context manager: torch's deterministic algorithms inside, as before outside; nothing when not `wanted`."""
    if not wanted:
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace is None:
        # Without it cuBLAS picks its workspace anew for each stream, and torch refuses deterministic matrix products.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # it would write each new tensor twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    from igpt import __version__

    return {"igpt": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
