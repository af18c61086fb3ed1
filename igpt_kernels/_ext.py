"""The only place that loads the compiled library, and that says why it could not.

Nothing is loaded when this module is imported, and only `require` raises. A CUDA library will be a second file beside
this one (its own entry here, loaded in a try of its own), because it cannot load where torch has no CUDA.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = Path(__file__).with_name("_C.abi3.so")
_OPERATORS = ("palette_table", "palette_lookup")
_REBUILD = "run `python3 setup.py build_ext --inplace` in the source tree, or reinstall igpt-kernels with a C++ compiler"

_lock = threading.Lock()
_status: ExtensionStatus | None = None


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled library serves in this process."""

    loaded: bool
    path: Path | None
    """The library file; None where there is none."""
    reason: str
    """Why it is not loaded, and what to do, in one sentence; empty when it is."""


def status() -> ExtensionStatus:
    """Load the library on the first call; tell what came of it on every call. Never raises."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load(_LIBRARY)
    return _status


def require() -> None:
    """Make sure that the library is loaded.

    Raises:
        RuntimeError: it is not; the message is `status().reason`.
    """
    if not status().loaded:
        raise RuntimeError(status().reason)


def _load(library: Path) -> ExtensionStatus:
    if not library.is_file():
        return ExtensionStatus(False, None, f"the compiled extension {library.name} was not built; {_REBUILD}")
    try:
        import torch
    except ImportError as error:
        return ExtensionStatus(False, library, f"torch cannot be imported ({error}); install torch >= 2.11")
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        reason = f"{library} does not load with torch {torch.__version__} ({why}); to build it for this torch, {_REBUILD}"
        return ExtensionStatus(False, library, reason)
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.igpt_kernels, name)]
    if missing:
        return ExtensionStatus(False, library, f"{library} is out of date (it lacks {', '.join(missing)}); {_REBUILD}")
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
