"""GPU tests are skipped, with the reason, where there is no GPU; everything else always runs."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# So that a failing assert in them shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.kit", "tests.operators", "tests.runs", "tests.huggingface")

# Interpreted and compiled kernels cannot share a process: test_interpreter.py runs that folder in one of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


# Tests compare kernels with the oracle themselves; the check at first use would run them once more in every process.
os.environ.setdefault("IGPT_KERNELS_SELF_CHECK", "0")


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and what is ignored is inherited, by the tests of signals too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Two workers begin at the start and in the middle (pytest-xdist, worksteal). Each has half of the slow tests first, so that
    # none of minutes is left over for the end, when one worker would wait for the other.
    slow = [item for item in items if "slow" in item.keywords]
    others = [item for item in items if "slow" not in item.keywords]
    half = len(others) // 2
    items[:] = [*slow[0::2], *others[:half], *slow[1::2], *others[half:]]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
