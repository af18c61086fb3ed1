"""Free memory of a device, and a refusal before a tensor takes too much of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes free on `device`, or None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def guard_square(what: str, size: int, device: torch.device) -> None:
    """Refuse to allocate `size` bytes of a queries x keys tensor beyond a quarter of free memory.

    Raises:
        MemoryError: with both numbers.
    """
    free = free_memory(device)
    if free is not None and size > free // 4:
        raise MemoryError(
            f"{what} takes {size / 2**30:.1f} GiB, over a quarter of the {free / 2**30:.1f} GiB free on {device}; "
            "use a fused backend or fewer queries at a time"
        )
