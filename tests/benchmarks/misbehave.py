"""What children of the tests do: die, hang, take memory, or pretend to measure. Importable by name, as children must be."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from benchmarks.measure.worker import Job, Send


def send_and_exit(argument: Any, send: Send) -> None:
    send({"answer": argument})


def kill_itself(argument: Any, send: Send) -> None:
    send({"first": 1})
    os.kill(os.getpid(), signal.SIGKILL)


def fault(argument: Any, send: Send) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(argument: Any, send: Send) -> None:
    print("last words", file=sys.stderr)
    sys.stderr.flush()
    os._exit(7)


def hang(argument: Any, send: Send) -> None:
    send({"first": 1})
    time.sleep(600)


def hoard(argument: Any, send: Send) -> None:
    hoarded = []
    while True:
        hoarded.append(bytearray(os.urandom(1) * (8 << 20)))
        time.sleep(0.001)


def ok_row(seconds: float) -> dict[str, Any]:
    return {
        "status": "ok",
        "reason": "",
        "median_s": seconds,
        "p20_s": 0.9 * seconds,
        "p80_s": 1.1 * seconds,
        "n": 3,
        "times_s": [0.9 * seconds, seconds, 1.1 * seconds],
        "peak_bytes": 1 << 20,
        "error_ratio": 0.5,
        "bound": "compute",
        "flops": 1e9,
        "bytes": 1e6,
        "per": "",
        "count": 0,
        "tflops": 1e-3 / seconds,
        "gbs": 1e-3 / seconds,
        "of_machine": 0.5,
        "config": "",
        "formula": "",
    }


def pretend(order: Job, send: Send) -> None:
    """A row a way, a second for a million pixels and more for eager; sizes with a name do what the name says."""
    for way in order.ways:
        send({"way": way, "started": True})
        if order.case.tokens == 48 * 48 and way == "both":
            os.kill(os.getpid(), signal.SIGKILL)
        send({"way": way, **ok_row(order.case.tokens**2 / 1e6 * (4 if order.case.method == "eager" else 1))})
