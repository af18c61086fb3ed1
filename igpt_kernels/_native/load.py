"""The only place that loads the compiled libraries, and that says why it could not.

The CUDA library loads only with a CUDA build of torch, so there are two: ``_C`` handles CPU tensors, ``_C_cuda`` those on
NVIDIA GPUs. Each is taken from this package, else from the user's cache (cache.py). Nothing is loaded when this module is
imported, and only `require` raises.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]
_LIBRARIES: dict[Device, Path] = {
    "cpu": Path(__file__).resolve().parents[1] / "_C.abi3.so",
    "cuda": Path(__file__).resolve().parents[1] / "_C_cuda.abi3.so",
}
_OPERATORS: dict[Device, tuple[str, ...]] = {
    "cpu": (
        "palette_table",
        "palette_lookup",
        "palette_pixels",
        "cpu_cross_entropy_rows",
        "cpu_cross_entropy_sum",
        "cpu_scale",
        "cpu_decode",
    ),
    "cuda": ("palette_table", "palette_lookup", "palette_pixels"),
}
_REBUILD = "run `igpt info --build`, or `python3 setup.py build_ext --inplace` in the source tree, or reinstall igpt-kernels"

_lock = threading.RLock()
_statuses: dict[Device, ExtensionStatus] = {}
_tried_to_build = False


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether a compiled library serves in this process."""

    loaded: bool
    path: Path | None
    """The library file; None where there is none."""
    reason: str
    """Why it is not loaded, and what to do, in one sentence; empty when it is."""


def status(device: Device = "cpu") -> ExtensionStatus:
    """Load the library for tensors of `device` on the first call; return the cached status afterwards. Never raises."""
    found = _statuses.get(device)
    if found is None:
        with _lock:
            if device not in _statuses:
                _statuses[device] = _load(device)
            found = _statuses[device]
    return found


def require(device: Device = "cpu") -> None:
    """Make sure that the library is loaded.

    Raises:
        RuntimeError: it is not; the message is `status(device).reason`.
    """
    if not status(device).loaded:
        raise RuntimeError(status(device).reason)


def build() -> ExtensionStatus:
    """`status()`, after building the libraries that are missing: once a process, 10 to 30 seconds. Never raises.

    The CUDA library is built where torch has CUDA and its toolkit is there.
    """
    global _tried_to_build
    from igpt_kernels._native import cache

    with _lock:
        missing = [_LIBRARIES[device].name for device in _buildable() if _find(device) is None]
        if missing and not _tried_to_build:
            _tried_to_build = True
            problem = cache.build_libraries([_LIBRARIES[device].name for device in _buildable()])
            _statuses.clear()
            if problem and not status().loaded:
                _statuses["cpu"] = ExtensionStatus(False, None, f"{status().reason} (it cannot be built now: {problem})")
            elif problem:
                _statuses["cuda"] = ExtensionStatus(False, None, f"the CUDA library cannot be built now: {problem}")
        return status()


def _buildable() -> list[Device]:
    import torch

    from igpt_kernels._native import build

    return ["cpu"] if torch.version.cuda is None or build.cuda(torch).reason else ["cpu", "cuda"]


def _find(device: Device) -> Path | None:
    from igpt_kernels._native import cache

    library = _LIBRARIES[device]
    if library.is_file():
        return library
    try:
        cached = cache.folder() / library.name
        return cached if cached.is_file() else None
    except (OSError, RuntimeError):  # no home folder, or sources that cannot be read
        return None


def _load(device: Device) -> ExtensionStatus:
    library = _find(device)
    try:
        import torch
    except (ImportError, OSError) as error:
        return ExtensionStatus(False, library, f"torch cannot be imported ({error}); install torch >= 2.11")
    if device == "cuda":
        if torch.version.hip is not None:
            return ExtensionStatus(
                False, library, f"the CUDA library is for NVIDIA GPUs, torch {torch.__version__} is for ROCm"
            )
        if torch.version.cuda is None:
            return ExtensionStatus(False, library, f"torch {torch.__version__} has no CUDA; install one that has")
        if not status("cpu").loaded:
            return ExtensionStatus(False, library, status("cpu").reason)
    if library is None:
        what = "the compiled extension" if device == "cpu" else "the CUDA library"
        return ExtensionStatus(False, None, f"{what} {_LIBRARIES[device].name} was not built; {_REBUILD}")
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        reason = f"{library} does not load with torch {torch.__version__} ({why}); to build it for this torch, {_REBUILD}"
        return ExtensionStatus(False, library, reason)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [
        name
        for name in _OPERATORS[device]
        if not (hasattr(torch.ops.igpt_kernels, name) and has_kernel(f"igpt_kernels::{name}", device.upper()))
    ]
    if missing:
        return ExtensionStatus(False, library, f"{library} is out of date (it lacks {', '.join(missing)}); {_REBUILD}")
    if device == "cpu":
        _register_fakes()
    return ExtensionStatus(True, library, "")


def _register_fakes() -> None:
    """Tell torch.compile the shapes of the operators."""
    import torch

    @torch.library.register_fake("igpt_kernels::palette_table")  # type: ignore[untyped-decorator]
    def palette_table(colors: torch.Tensor) -> torch.Tensor:
        return colors.new_empty(1 << 24, dtype=torch.uint16)

    @torch.library.register_fake("igpt_kernels::palette_lookup")  # type: ignore[untyped-decorator]
    def palette_lookup(table: torch.Tensor, pixels: torch.Tensor, channel_dim: int, tokens: torch.Tensor) -> None:
        return None

    @torch.library.register_fake("igpt_kernels::palette_pixels")  # type: ignore[untyped-decorator]
    def palette_pixels(
        colors: torch.Tensor, tokens: torch.Tensor, run: int, pixels: torch.Tensor, beyond: torch.Tensor
    ) -> None:
        return None
