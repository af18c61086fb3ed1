"""The machine a command runs on: its devices, its versions, and torch's repeatable mode."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt.console import gibibytes
from igpt.errors import ConfigError
from igpt_kernels.memory import free_memory


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


_SHARE = 0.9
"""Of free memory: the system needs some, and what is freed comes back in pieces."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on `device`, less a tenth; None where that cannot be told.

    On the CPU it is the least of three: what the system has, what control groups allow (containers), the process's own limit.
    """
    free = free_memory(device)
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return None if free is None else int(_SHARE * (free + own))
    found = [free, *_left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")), _left_of_limit()]
    known = [int(_SHARE * each) for each in found if each is not None]
    return min(known, default=None)


def check_memory(what: str, size: int, device: torch.device, advice: str) -> None:
    """Refuse work that takes more bytes than are free, before the system kills the process for it.

    Raises:
        ConfigError: with both numbers and the advice.
    """
    free = available_memory(device)
    if free is not None and size > free:
        raise ConfigError(f"{what} takes about {gibibytes(size)}, {gibibytes(free)} are free on {device}: {advice}")


def _left_in_groups(root: Path, own: Path) -> list[int]:
    """What the control groups of this process leave, version 2 or 1; pages of files that can be dropped count as free."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                base, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = base / path.strip("/")
            # In a container the path can be one of the host, which is not to be seen here: the root is the container's own.
            for folder in dict.fromkeys([group, *(each for each in group.parents if base in (each, *each.parents)), base]):
                left = _left_in_group(folder, *names)
                found += [] if left is None else [left]
    return found


def _left_in_group(folder: Path, limit: str, used: str, files: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        cached = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines()).get(files, "0")
        return max(int(most) - int((folder / used).read_text()) + int(cached), 0)
    except (OSError, ValueError):
        return None


def _left_of_limit() -> int | None:
    """What `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        return max(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize(), 0)
    return None
