"""`igpt info`: what is installed, what it runs on, and what would be chosen. The text to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from typing import Any

from igpt.checks import Options
from igpt.console import aligned_table


@dataclass(frozen=True)
class InfoOptions(Options):
    """Options of `igpt info`: versions, devices, the compiled extension, and which kernels would be chosen."""

    build: bool = False
    """Build the compiled extension first, where it is missing and a compiler is there."""
    json: bool = False
    """Print JSON instead of text."""


_SIZES: dict[str | None, tuple[int | None, ...]] = {
    None: (None,),
    "head_dim": (16, 64, 96, 128, 192, 256, 320),
    "width": (32, 512, 1536, 6144, 8192, 16384),
    "vocab": (2, 512, 8192, 16384),
}

_PACKAGES = ("igpt-kernels", "torch", "triton", "numpy", "pillow", "safetensors", "scikit-learn", "matplotlib", "transformers")


def collect() -> dict[str, Any]:
    """Versions, devices, the compiled extension with the reason when it is absent, and the backends by dtype."""
    import torch

    from igpt.machine import without_cuda
    from igpt_kernels import backends, self_check
    from igpt_kernels._native import load

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:
            capability = f"{properties.gcnArchName} (Triton kernels: {backends.AMD_STATE})"
        devices.append(f"cuda:{index}: {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    if reason := without_cuda():
        devices.append(f"cuda: none: {reason}")
    devices_of: tuple[load.Device, ...] = ("cpu", "cuda")
    libraries = {device: load.status(device) for device in devices_of}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "cpu_kernels": torch.ops.igpt_kernels.cpu_kernels() if libraries["cpu"].loaded else "",
        "extension": {
            device: {"loaded": status.loaded, "path": str(status.path or ""), "reason": status.reason}
            for device, status in libraries.items()
        },
        "self_check": self_check.describe(),
        "kernels": kernels(),
    }


def kernels() -> list[dict[str, str]]:
    """What ``backend="auto"`` takes, by operation, device and size, and why not the first choice; dtypes alike share a row."""
    import torch

    from igpt_kernels import backends

    rows: dict[tuple[str, str, str, str], list[str]] = {}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = {op: (torch.uint8,) if op == "palette_lookup" else floats for op in backends.IMPLEMENTATIONS}
    cases_of = ((op, kind, dtype) for op in dtypes for kind in ("cpu", "cuda") for dtype in dtypes[op])
    for op, kind, dtype in cases_of:
        name = backends.SIZE_ARGUMENT[op]
        cases: dict[str, list[int | None]] = {}
        reasons: dict[str, str] = {}
        for size in _SIZES[name]:
            table = backends.explain(op, dtype=dtype, device=kind, **({} if name is None else {name: size}))  # type: ignore[arg-type]
            chosen = backends.choose("auto", table, op)
            before = table[: [backend for backend, _ in table].index(chosen)]
            cases.setdefault(chosen, []).append(size)
            reasons.setdefault(chosen, "; ".join(f"{backend}: {', '.join(why)}" for backend, why in before))
        for chosen, sizes in cases.items():
            why = reasons[chosen]
            span = "any" if name is None else f"{name} {sizes[0]}" + (f"..{sizes[-1]}" if len(sizes) > 1 else "")
            rows.setdefault((op, kind, span, f"{chosen} ({why})" if why else chosen), []).append(
                str(dtype).removeprefix("torch.")
            )
    return [
        {"op": op, "device": kind, "dtypes": ", ".join(dtypes), "sizes": span, "auto": text}
        for (op, kind, span, text), dtypes in rows.items()
    ]


def run_info(options: InfoOptions) -> None:
    """Print `collect()` as text or JSON."""
    if options.build:
        from igpt_kernels._native import load

        load.build()
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    print(f"python        {facts['python']} on {facts['platform']}")
    for name, version in facts["versions"].items():
        print(f"{name:14s}{version}")
    for device in facts["devices"]:
        print(f"device        {device}")
    for device, library in facts["extension"].items():
        words = f"loaded: {library['path']}" if library["loaded"] else f"not loaded: {library['reason']}"
        if device == "cpu" and facts["cpu_kernels"]:
            words += f" ({facts['cpu_kernels']} kernels)"
        print(f"extension     {device}: {words}")
    print(f"self-check    {facts['self_check']}")
    rows = [("operation", "device", "sizes", "dtypes", "auto takes (why not a faster one)")]
    rows += [(row["op"], row["device"], row["sizes"], row["dtypes"], row["auto"]) for row in facts["kernels"]]
    print()
    print(*aligned_table(rows), sep="\n")
