"""The check of kernels at first use, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from igpt_kernels import backends, flash_attention, self_check, self_check_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", self_check_cases.CASES, ids="-".join)
def test_kernels_pass(case: tuple[str, str], dtype: torch.dtype) -> None:
    functions = next(each.functions for each in backends.IMPLEMENTATIONS[case[0]] if each.backend == "triton")
    for size in (64, 96, 128):
        self_check_cases.CASES[case](lambda step: backends._load(functions[step]), dtype, size, torch.device("cuda", 0))


def test_a_call_is_checked_and_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(self_check, "_states", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    state = torch.cuda.get_rng_state()
    flash_attention(q, q, q, backend="triton")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    key = ("flash_attention", "forward", torch.bfloat16, 64, q.device)
    assert self_check._states == {key: "passed"}
    assert self_check.passed(self_check.record(key))
