"""What the benchmarks measure on a GPU, where it has a known size. No time decides a test."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import timing

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cold", [False, True])
def test_short_calls_are_timed_in_a_graph(cold: bool) -> None:
    x = torch.ones(1 << 20, device="cuda")
    times = timing.gpu_times(lambda: x * 2, 0.01, cold=cold)
    assert times.median > 0
    assert times.graph is not None
    assert times.graph > 0


def test_a_call_that_waits_for_the_device_has_no_graph() -> None:
    x = torch.ones(4, device="cuda")
    assert timing.graph_time(lambda: x.sum().item()) is None
    torch.cuda.synchronize()


def test_peak_memory_is_what_a_call_adds() -> None:
    x = torch.ones(1 << 20, device="cuda")
    peak, result = timing.peak_memory(lambda: (x * 2 + 1) * 3, "cuda")
    assert peak == 2 * x.nbytes
    assert timing.bytes_of(result) == x.nbytes
