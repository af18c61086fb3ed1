"""A child may die, hang or take all memory: the parent goes on, keeps what was sent, and says what happened."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import plans
from benchmarks.measure import timing, worker
from benchmarks.measure.worker import PRELOADED, Limits, Outcome, run_child
from tests.benchmarks import misbehave


def run(
    function: Callable[..., None], *, seconds: float = 60.0, memory: int = 8 << 30, argument: object = None
) -> tuple[Outcome, list[dict[str, Any]]]:
    received: list[dict[str, Any]] = []
    return run_child(function, argument, Limits(seconds, memory, 0.1), received.append), received


def test_what_a_child_sends_arrives() -> None:
    assert run(misbehave.send_and_exit, argument="x") == (Outcome("ok"), [{"answer": "x"}])


@pytest.mark.parametrize(("function", "name"), [(misbehave.kill_itself, "SIGKILL"), (misbehave.fault, "SIGSEGV")])
def test_a_child_that_dies_costs_itself_only(function: Callable[..., None], name: str) -> None:
    end, received = run(function)
    assert end.status == "error"
    assert name in end.reason
    assert received == ([{"first": 1}] if function is misbehave.kill_itself else [])


def test_the_last_words_of_a_child_are_the_reason() -> None:
    end, _ = run(misbehave.leave)
    assert end.status == "error"
    assert "code 7" in end.reason
    assert "last words" in end.reason


@pytest.mark.slow
def test_a_child_that_hangs_is_stopped() -> None:
    start = time.monotonic()
    end, received = run(misbehave.hang, seconds=3.0)
    assert end == Outcome("timeout", "not done after 3 s")
    assert received == [{"first": 1}]
    assert time.monotonic() - start < 60


def test_a_child_that_takes_memory_is_stopped_before_the_machine_is_out_of_it() -> None:
    end, _ = run(misbehave.hoard, memory=1 << 30)
    assert end.status == "oom"
    assert "the limit is 1.0 GiB" in end.reason


def test_a_child_of_an_unimportable_function_is_an_error() -> None:
    end, _ = run(_raises)
    assert end.status == "error"
    assert "ZeroDivisionError" in end.reason


@pytest.mark.slow
def test_the_server_that_children_are_forked_from_asks_for_no_gpu() -> None:
    # Whoever has asked CUDA anything can fork no child that uses it: "Cannot re-initialize CUDA in forked subprocess".
    loaded = {name for operation in plans.operations().values() for how in operation.methods.values() for name in how.loads}
    assert len(loaded) == 2
    code = (
        "import torch\n"
        "def refuse(*args): raise SystemExit('asked for a GPU')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = refuse\n"
        "if torch.cuda._is_compiled(): torch._C._cuda_getDeviceCount = refuse\n"
        "import importlib\n"
        f"[importlib.import_module(name) for name in {[*PRELOADED, *loaded]!r}]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_methods_load_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ["torch"]
    monkeypatch.setattr(worker, "PRELOADED", loaded)
    worker.preload(iter(["one", "torch", "one", "two"]))
    assert loaded == ["torch", "one", "two"]


def _raises(argument: object, send: object) -> None:
    print(1 / 0)


def test_bytes_of_what_a_call_returned() -> None:
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert timing.bytes_of(x) == 30
    assert timing.bytes_of((x, [x.double()], None, 4)) == 150
    assert timing.bytes_of(None) == 0
