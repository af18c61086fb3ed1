"""`igpt info`: what is installed, what it runs on, and what would be chosen. The text to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from igpt.config import InfoOptions
from igpt_kernels import _ext, backends

_PACKAGES = ("igpt-kernels", "torch", "triton", "numpy", "pillow", "safetensors", "scikit-learn", "matplotlib", "transformers")


def collect() -> dict[str, Any]:
    """Versions, devices, the compiled extension with the reason when it is absent, and the backends by dtype."""
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
        devices.append(f"cuda:{index}: {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    status = _ext.status()
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    chosen: dict[str, dict[str, list[str]]] = {}
    for op in backends.CAPABILITIES:
        for kind in kinds:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                size = {name: 64 if name == "head_dim" else 512 for name in (backends.SIZES.get(op, "head_dim"),)}
                table = backends.explain(op, dtype=dtype, device=kind, **size)
                words = [f"{name} ({'; '.join(reasons)})" if reasons else name for name, reasons in table]
                chosen.setdefault(op, {})[f"{kind} {str(dtype).removeprefix('torch.')}"] = words
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "extension": {"loaded": status.loaded, "path": str(status.path or ""), "reason": status.reason},
        "backends, best first": chosen,
    }


def run_info(options: InfoOptions) -> None:
    """Print `collect()` as text or JSON."""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    print(f"python        {facts['python']} on {facts['platform']}")
    for name, version in facts["versions"].items():
        print(f"{name:14s}{version}")
    for device in facts["devices"]:
        print(f"device        {device}")
    extension = facts["extension"]
    print(f"extension     {'loaded: ' + extension['path'] if extension['loaded'] else 'not loaded: ' + extension['reason']}")
    for op, rows in facts["backends, best first"].items():
        for case, words in rows.items():
            print(f"{op:24s}{case:15s}{' > '.join(words)}")
