"""Python per call of each launcher, in microseconds: ``python -m tools.launch_overhead``.

Where there is no GPU, a driver stands in that compiles for compute capability 9.0 and whose launch does nothing. On a GPU the
real driver launches. Times are of the calling thread's processor alone, so waiting for the GPU does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tools.kernels import KERNELS

CASES = {
    "flash forward": ("flash_forward", 64, 0),
    "flash backward": ("flash_backward_keys", 64, 0),
    "sparse forward, 2 parts": ("sparse_forward", 64, 1),
    "sparse backward, 2 parts": ("sparse_backward_keys", 64, 1),
    "decode": ("decode", 64, 0),
    "sparse decode, 2 parts": ("sparse_decode", 64, 1),
    "RMSNorm forward": ("rms_norm_forward", 512, 0),
    "QuickGELU forward": ("quick_gelu_forward", 512, 1),
    "loss forward": ("cross_entropy_forward", 512, 0),
}
"""What is measured -> entry of `KERNELS`, size, and form of inputs."""
ROWS = 64
_DEVICES = itertools.count(1000)
_BATCH = 20
"""Calls that are timed together, then waited for: few enough that a GPU queues all their launches."""


class StubDriver:
    """A driver of Triton's without a device: compiles for `capability`; a launch calls `launched`.

    Attributes:
        device: what is current. Each stub has a number of its own, because Triton keeps compiled kernels by that number.
        launched: takes what Triton's launcher takes: grid, stream, function, metadata, hooks and arguments.
    """

    def __init__(self, capability: int = 90, launched: Callable[..., None] = lambda *args: None) -> None:
        self.capability = capability
        self.device = next(_DEVICES)
        self.launched = launched
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        """(module, function, registers, spills, threads) of a binary, none of which is real."""
        return kernel, name, 0, 0, 1024

    def launcher_cls(self, src: object, metadata: object) -> Callable[..., None]:
        return self.launched


@contextmanager
def stubbed(stub: StubDriver) -> Iterator[StubDriver]:
    """Inside, Triton's driver is the stub."""
    before = driver._active
    driver.set_active(stub)
    try:
        yield stub
    finally:
        driver._active = before


def measure(call: Callable[[], object], calls: int, synchronize: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of this thread that a call takes, over batches of calls: the median, and the first tenth.

    On a machine that others use the median says how busy they were; the first tenth moves less.
    """
    call()
    times = []
    for _ in range(max(1, calls // _BATCH)):
        begin = time.thread_time_ns()
        for _ in range(_BATCH):
            call()
        times.append((time.thread_time_ns() - begin) / _BATCH / 1e3)
        synchronize()
    times.sort()
    return median(times), times[len(times) // 10]


def rows(calls: int, names: Sequence[str] = tuple(CASES), device: str = "cpu") -> Iterator[tuple[str, tuple[float, float]]]:
    """(case, what `measure` says) of each named case of `CASES`."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    for name in names:
        entry, size, form = CASES[name]
        kernel = KERNELS[entry]
        call = kernel.prepare(kernel.operation.inputs(size, ROWS, torch.bfloat16, device, form))
        yield name, measure(lambda call=call: call(None, None), calls, synchronize)  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each launcher; ``--json`` prints one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5000, help="calls of each launcher (default 5000)")
    parser.add_argument("--stub", action="store_true", help="do without the GPU although there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all when none is named")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"cases must be of {', '.join(CASES)}; got {', '.join(unknown)}")
    names = options.cases or list(CASES)
    if torch.cuda.is_available() and not options.stub:
        where, found = torch.cuda.get_device_name(), dict(rows(options.calls, names, "cuda"))
    else:
        where = "driver stubbed"
        with stubbed(StubDriver()):
            found = dict(rows(options.calls, names))
    if options.json:
        print(json.dumps({"where": where, "triton": triton.__version__, "microseconds": found}))
        return 0
    print(f"microseconds of Python a call, Triton {triton.__version__}, {where}\n{'':26}  median  first tenth")
    for name, (middle, tenth) in found.items():
        print(f"{name:26}{middle:8.1f}{tenth:13.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
