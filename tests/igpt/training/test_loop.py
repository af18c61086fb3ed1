"""The steps of a run: losses, gradients, lines of metrics, and numbers that are not finite."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt.console import Console
from igpt.data.histogram import histogram_baseline
from igpt.errors import CheckpointError, NonFiniteError
from igpt.model.image_gpt import ImageGPT, ImageGPTOutput
from igpt.training import loop
from igpt.training.checkpoint import latest_checkpoint
from igpt.training.loop import TrainResult
from igpt.training.optim import learning_rate
from igpt.training.pretrain import pretrain
from tests.runs import Options, lines, trainer, weights


def test_metrics_have_nats_bits_and_the_baseline(options: Options) -> None:
    result = pretrain(options(), progress=False)
    rows = lines(result.run)
    train, val = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in val] == [3, 6]
    assert train[0]["loss"] == pytest.approx(math.log(5), rel=1e-6)  # the head starts at zero
    assert train[-1]["loss"] < train[0]["loss"]
    assert [row["lr"] for row in train] == [learning_rate(i, peak=0.01, warmup=2, steps=6) for i in range(6)]
    for row in train:
        assert row["bits_per_pixel"] == pytest.approx(row["loss"] / math.log(2))
        assert min(row["grad_norm"], row["pixels_per_second"], row["seconds"]) > 0
    assert val[1]["val_bits_per_pixel"] == pytest.approx(val[1]["val_loss"] / math.log(2))
    assert result == TrainResult(
        run=result.run,
        step=6,
        train_loss=train[-1]["loss"],
        val_loss=val[1]["val_loss"],
        best_val_loss=min(row["val_loss"] for row in val),
        histogram_loss=val[0]["histogram_loss"],
        checkpoint=result.run / "checkpoints" / "step-6",
        parameters=12 * 64 + 16 + 12 * 8 + 2 * 5 * 8 + 16,
    )


def test_lines_hold_the_mean_since_the_last_line(options: Options) -> None:
    each = [row["loss"] for row in lines(pretrain(options("a"), progress=False).run) if "loss" in row]
    some = [
        (row["step"], row["loss"]) for row in lines(pretrain(options("b", log_every=4), progress=False).run) if "loss" in row
    ]
    assert some == [(4, math.fsum(each[:4]) / 4), (6, math.fsum(each[4:]) / 2)]


def test_each_step_has_gradients_of_its_own(options: Options) -> None:
    """With what earlier steps left in them, Adam goes nearly the same way: the golden curve is no proof."""
    opened = trainer(options(clip=0.1))
    opened.bar, opened.began, opened.busy = Console(False).progress(1, 0, "", ""), 0.0, 0.0
    for step in range(3):
        model = copy.deepcopy(opened.model)
        tokens = opened.data.train.batch(step).long()
        opened._update()
        wanted = torch.nn.utils.get_total_norm(torch.autograd.grad(model(tokens, tokens).loss, list(model.parameters())))
        assert lines(opened.run)[step]["grad_norm"] == pytest.approx(float(wanted), rel=1e-4)
    opened.metrics.close()


def test_a_line_counts_the_steps_and_the_time_since_the_last(options: Options) -> None:
    opened = trainer(options())
    opened.bar, opened.began, opened.busy = Console(False).progress(1, 0, "", ""), 0.0, 0.0
    for losses, seconds in (([1.0, 3.0], 4.0), ([5.0], 8.0)):
        opened.window.extend(losses)
        opened.busy += seconds
        opened._log(0.1, 1.0, 96)
    opened.metrics.close()
    assert [(row["loss"], row["pixels_per_second"]) for row in lines(opened.run)] == [(2.0, 96 * 2 / 4.0), (5.0, 96 / 8.0)]


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_validation_is_the_loss_of_all_held_out_images(options: Options, objective: str) -> None:
    changes: dict[str, Any] = {
        "objective": objective,
        "batch_size": 4,
        "val_fraction": 0.5,
    }  # 30 images: the last part is smaller
    result = pretrain(options(**changes), progress=False)
    opened = trainer(options("again", **changes))
    assert result.checkpoint is not None
    model = ImageGPT.from_pretrained(result.checkpoint)
    tokens, mask = opened.data.val_tokens.long(), opened.val_mask
    assert (mask is None) == (objective == "ar")
    if mask is not None:
        assert 0 < int((~mask.any(1)).sum()) < 30  # some images have nothing hidden, and do not count
    with torch.no_grad():
        assert result.val_loss == pytest.approx(float(model(tokens, tokens, mask=mask).loss), rel=1e-5)
    every = opened.data.train.at(np.arange(30))
    assert result.histogram_loss == pytest.approx(histogram_baseline(every, tokens, 5, mask=mask), rel=1e-12)


def test_the_best_validation_is_kept(options: Options) -> None:
    opened = trainer(options())
    opened.began, opened.histogram_loss = 0.0, 1.0
    for best, wanted in ((None, math.log(5)), (0.5, 0.5), (9.0, math.log(5))):
        opened.best_val_loss = best
        opened._validate()
        assert opened.val_loss == pytest.approx(math.log(5), rel=1e-6)
        assert opened.best_val_loss == pytest.approx(wanted, rel=1e-6)
    opened.metrics.close()


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, save = os.fsync, loop.save_checkpoint

    def flush(handle: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def saving(*args: Any, **named: Any) -> Path:
        done.append("save")
        return save(*args, **named)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(loop, "save_checkpoint", saving)
    pretrain(options(), progress=False)
    assert [done[index - 1] for index, what in enumerate(done) if what == "save"] == ["metrics.jsonl"] * 2


def test_sampling_and_validating_change_nothing(options: Options) -> None:
    a = pretrain(options("a", sample_every=1, val_every=1, samples=2), progress=False).run
    b = pretrain(options("b", sample_every=0, val_every=100), progress=False).run
    assert [row["loss"] for row in lines(a) if "loss" in row] == [row["loss"] for row in lines(b) if "loss" in row]
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_clipping_bounds_the_gradient_and_reports_the_norm_before(options: Options) -> None:
    opened = trainer(options(clip=1e-3))
    free = trainer(options("free"))
    for each in (opened, free):
        each.bar, each.began, each.busy = Console(False).progress(1, 0, "", ""), 0.0, 0.0
        each._update()
        each.metrics.close()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in each.model.parameters()]).item() for each in (opened, free)]
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] > 1e-2
    assert lines(opened.run)[0]["grad_norm"] == lines(free.run)[0]["grad_norm"] == pytest.approx(norms[1])


def test_decay_reaches_the_optimizer(options: Options) -> None:
    opened = trainer(options(weight_decay=0.25, beta1=0.8, beta2=0.9))
    assert [group["weight_decay"] for group in opened.optimizer.param_groups] == [0.25, 0.0]
    assert opened.optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("steps", "wanted"), [(1000, 7), (40, 4)])
def test_warmup_is_an_epoch_but_at_most_a_tenth(options: Options, steps: int, wanted: int) -> None:
    assert trainer(options(warmup=None, steps=steps)).options.warmup == wanted


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[ImageGPT]:
    """The loss of the fourth training step is NaN; the model is handed to the test."""
    seen: list[ImageGPT] = []
    forward = ImageGPT.forward

    def spoiled(self: ImageGPT, tokens: Tensor, targets: Tensor | None = None, **more: Any) -> ImageGPTOutput:
        found = forward(self, tokens, targets, **more)
        if not torch.is_inference_mode_enabled():
            seen.append(self)
            if len(seen) == 4 and found.loss is not None:
                found.loss = found.loss * math.nan
        return found

    monkeypatch.setattr(ImageGPT, "forward", spoiled)
    return seen


def test_a_loss_that_is_not_finite_stops_before_the_update(options: Options, poison: list[ImageGPT]) -> None:
    given = options(checkpoint_every=2)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 4 .*last checkpoint is .*step-2.*nonfinite-step-4.json"):
        pretrain(given, progress=False)
    model = poison[-1]
    facts = json.loads((given.out / "nonfinite-step-4.json").read_text())
    assert (facts["step"], facts["loss"], facts["grad_norm"]) == (4, "nan", "nan")
    assert facts["grad_norms"].keys() == dict(model.named_parameters()).keys()
    assert set(facts["grad_norms"].values()) == {"nan"}
    assert facts["lr"] == learning_rate(3, peak=0.01, warmup=2, steps=6)
    opened = trainer(options("again"))
    assert len(facts["images"]) == 8
    assert torch.equal(opened.data.train.at(facts["images"]), opened.data.train.batch(3))
    assert [row["step"] for row in lines(given.out) if "loss" in row] == [1, 2, 3]
    poison.clear()
    poison.extend([model] * 4)  # spoils nothing any more
    pretrain(options("clean", steps=6, checkpoint_every=3, keep=9), progress=False)
    wanted = ImageGPT.from_pretrained(given.out.parent / "clean" / "checkpoints" / "step-3").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert not (given.out / "lock").exists()


def test_a_full_disk_does_not_hide_that_the_loss_is_not_finite(
    options: Options, poison: list[ImageGPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_durably", full)
    with pytest.raises(NonFiniteError, match="loss is nan at step 4"):
        pretrain(options(), progress=False)


def test_a_gradient_that_is_not_finite_stops_too(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.utils.get_total_norm
    calls: list[int] = []

    def norm(tensors: list[Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            tensors[3].fill_(math.inf)
        return real(tensors)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    given = options(checkpoint_every=100)
    with pytest.raises(NonFiniteError, match=r"gradient norm is inf at step 2 .*no checkpoint yet"):
        pretrain(given, progress=False)
    facts = json.loads((given.out / "nonfinite-step-2.json").read_text())
    assert math.isfinite(facts["loss"])
    assert facts["grad_norm"] == "inf"
    assert [value for value in facts["grad_norms"].values() if isinstance(value, str)] == ["inf"]


def test_a_validation_that_is_not_finite_stops_too(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.Trainer._losses

    def losses(self: loop.Trainer, tokens: Any, *rest: Any) -> Any:
        for value in real(self, tokens, *rest):
            yield value * math.nan if tokens is self.data.val_tokens else value

    monkeypatch.setattr(loop.Trainer, "_losses", losses)
    with pytest.raises(NonFiniteError, match=r"the validation loss is not finite at step \d+\. A lower --lr often helps"):
        pretrain(options(), progress=False)


def test_a_weight_that_is_not_finite_is_never_saved(options: Options) -> None:
    given = options(lr=1e30, warmup=0, checkpoint_every=1, val_every=100)
    with pytest.raises(NonFiniteError):
        pretrain(given, progress=False)
    newest = latest_checkpoint(given.out)
    assert newest is None or all(bool(torch.isfinite(v).all()) for v in ImageGPT.from_pretrained(newest).state_dict().values())


def test_without_held_out_images_there_is_no_validation(options: Options) -> None:
    result = pretrain(options(val_fraction=0.0), progress=False)
    assert (result.val_loss, result.best_val_loss, result.histogram_loss) == (None, None, None)
    assert result.train_loss is not None
    assert all("val_loss" not in row for row in lines(result.run))


def test_metrics_that_cannot_be_written_stop_the_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_durably", full)
    given = options(sample_every=3)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-3.png: No space left"):
        pretrain(given, progress=False)
    assert not (given.out / "lock").exists()
