"""Tuning on a GPU, with the GPU replaced by the interpreter and the clock by a table."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks import tune, tune_rows
from igpt_kernels import tuning
from igpt_kernels.tuning import Config

SHIPPED, FAST, WRONG = Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)


def small_inputs(batch: int, heads: int, tokens: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    q, k, v, grad = torch.randn(4, 1, 2, 40, head_dim, generator=torch.Generator().manual_seed(0))
    return [x.requires_grad_() for x in (q, k, v)], grad


@pytest.mark.parametrize("kernel", sorted(tuning.table("default")))
def test_the_fastest_right_candidate_is_taken(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {SHIPPED: 3.0, FAST: 2.0, WRONG: 1.0}
    monkeypatch.setattr(tune, "inputs", small_inputs)
    monkeypatch.setattr(tune, "candidates", lambda kernel, bits: [WRONG, FAST])
    monkeypatch.setattr(tune_rows, "candidates", lambda kernel, bits, size: [WRONG, FAST])
    monkeypatch.setattr(tune_rows, "ROWS", 40)
    monkeypatch.setattr(tune_rows, "material", functools.partial(tune_rows.material, device="cpu"))
    room = tune_rows if kernel in tune_rows.KERNELS else tune
    monkeypatch.setattr(tune, "milliseconds", lambda run, repeats: (times[run.args[0]], 0.0, 0.0))
    assert tune.best(kernel, "32", 16, SHIPPED, SHIPPED) == WRONG
    original = room.runner

    def broken(*arguments: object) -> object:
        call = original(*arguments)  # type: ignore[arg-type]
        return lambda config, other: [x + (config == WRONG) for x in call(config, other)]

    def broken_partial(*arguments: object) -> object:
        return functools.partial(broken(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(room, "runner", broken_partial)
    assert tune.best(kernel, "32", 16, SHIPPED, SHIPPED) == FAST
    times[FAST] = 2.99
    assert tune.best(kernel, "32", 16, SHIPPED, SHIPPED) == SHIPPED
