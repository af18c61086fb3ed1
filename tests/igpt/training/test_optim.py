from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from igpt.errors import ConfigError
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from igpt.training.optim import learning_rate, make_optimizer, parameter_groups


def rates(steps: int, **changes: float) -> list[float]:
    settings = {"peak": 0.004, "warmup": 4, "final": 0.0} | changes
    return [learning_rate(step, steps=steps, **settings) for step in range(steps + 1)]  # type: ignore[arg-type]


def test_learning_rate_rises_in_a_line_then_falls_by_a_cosine() -> None:
    found = rates(12)
    assert found[:5] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])
    assert found[6] == pytest.approx(0.004 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[8] == pytest.approx(0.002)
    assert found[12] == pytest.approx(0.0, abs=1e-18)
    assert all(a >= b for a, b in itertools.pairwise(found[4:]))


def test_learning_rate_without_warmup_starts_at_the_peak_and_ends_at_the_final_share() -> None:
    found = rates(10, warmup=0, final=0.1)
    assert found[0] == 0.004
    assert found[10] == pytest.approx(0.0004)
    assert learning_rate(99, peak=0.004, warmup=0, steps=10, final=0.1) == pytest.approx(0.0004)


def test_learning_rate_that_only_warms_up_reaches_the_peak() -> None:
    assert rates(4, warmup=4)[:4] == pytest.approx([0.001, 0.002, 0.003, 0.004])


@pytest.mark.parametrize("changes", [{"step": -1}, {"warmup": -1}, {"warmup": 11}])
def test_learning_rate_refuses_what_cannot_be(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        learning_rate(**({"step": 0, "peak": 0.1, "warmup": 2, "steps": 10} | changes))  # type: ignore[arg-type]


def test_decay_touches_matrices_only() -> None:
    model = ImageGPT(ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, height=2, width=2, bias=True))
    decayed, free = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in decayed["params"]}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert found == {
        "wte.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.fc.weight",
        "blocks.0.proj.weight",
        "head.weight",
    }
    assert {names[id(parameter)] for parameter in free["params"]} == set(names.values()) - found


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    (only,) = parameter_groups(layer, 0.1)
    assert only["params"] == [layer.bias]
    layer.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter"):
        make_optimizer(layer, lr=0.1)


def test_one_step_is_adam_as_written_in_the_paper() -> None:
    layer = nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = make_optimizer(layer, lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.5)
    layer(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        # After one step both corrected moments are the gradient itself: the update is lr * g / (|g| + eps).
        moved = before[name] * (1 - 0.01 * (0.5 if name == "weight" else 0.0)) - 0.01 * parameter.grad / (
            parameter.grad.abs() + 1e-8
        )
        torch.testing.assert_close(parameter.detach(), moved)
