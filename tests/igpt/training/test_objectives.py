"""Which pixels a step hides, and gradients in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from igpt.model.image_gpt import ImageGPT, ImageGPTOutput
from igpt.training.pretrain import pretrain
from tests.runs import Options, timeless, trainer


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("step", [0, 1])
def test_accumulated_gradients_are_those_of_the_whole_batch(options: Options, objective: str, step: int) -> None:
    found = []
    for size in (8, 4, 2, 1):
        opened = trainer(options(f"run{size}", objective=objective))
        opened.model.double()
        torch.nn.init.normal_(opened.model.head.weight, generator=torch.Generator().manual_seed(1))
        tokens, mask = opened.data.train.batch(step), opened._mask("training", step, 8)
        total = 0.0
        for loss in opened._losses(tokens, mask, size):
            loss.backward()
            total += loss.item()
        found.append((total, {name: p.grad for name, p in opened.model.named_parameters()}))
    if objective == "bert":
        assert mask is not None
        assert not mask.any(1).all()  # the case in which a plain mean of the parts would be wrong
    for total, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_an_accumulated_run_follows_the_whole_batch(options: Options, objective: str) -> None:
    whole = timeless(pretrain(options("a", objective=objective), progress=False).run)
    parts = timeless(pretrain(options("b", objective=objective, accumulate=4), progress=False).run)
    assert [row["loss"] for row in whole if "loss" in row] == pytest.approx([r["loss"] for r in parts if "loss" in r], rel=1e-4)
    assert whole[-1]["val_loss"] == pytest.approx(parts[-1]["val_loss"], rel=1e-4)


def test_masks_are_fixed_by_seed_and_step(options: Options) -> None:
    opened = trainer(options(objective="bert"))
    first = opened._mask("training", 3, 8)
    assert torch.equal(first, opened._mask("training", 3, 8))
    for other in (
        opened._mask("training", 4, 8),
        opened._mask("validation", 3, 8),
        trainer(options("b", objective="bert", seed=1))._mask("training", 3, 8),
    ):
        assert not torch.equal(first, other)


def test_each_step_hides_its_own_pixels(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = ImageGPT.forward

    def spy(self: ImageGPT, tokens: Tensor, targets: Tensor | None = None, **more: Any) -> ImageGPTOutput:
        if not torch.is_inference_mode_enabled():
            seen.append(more["mask"])
        return forward(self, tokens, targets, **more)

    monkeypatch.setattr(ImageGPT, "forward", spy)
    pretrain(options("run", objective="bert", steps=2, accumulate=2), progress=False)
    drawn = trainer(options("again", objective="bert"))
    assert torch.equal(torch.cat(seen), torch.cat([drawn._mask("training", step, 8) for step in range(2)]))
