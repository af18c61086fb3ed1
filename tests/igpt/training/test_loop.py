from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from igpt.commands.pretrain import run_pretrain
from igpt.console import Console
from igpt.data.batches import TokenBatches
from igpt.data.histogram import histogram_baseline
from igpt.errors import CheckpointError, ConfigError, DataError, IgptError, NonFiniteError
from igpt.kernels.state import active
from igpt.model.config import preset
from igpt.model.image_gpt import ImageGPT, ImageGPTOutput
from igpt.model.inference import BITS
from igpt.training import loop
from igpt.training.checkpoint import latest_checkpoint
from igpt.training.loop import TrainResult
from igpt.training.optim import learning_rate
from igpt.training.options import PretrainOptions
from igpt.training.pretrain import pretrain
from igpt.training.run_folder import TIME_FIELDS, read_config
from igpt.training.signals import Signals

GOLDEN = Path(__file__).parents[2] / "golden"
PALETTE = [[-1, -1, -1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """60 images of 3 x 4 tokens in 5 colours, each a shifted ramp, so that there is something to learn."""
    shift = np.random.default_rng(0).integers(0, 5, (60, 1))
    rows = (np.arange(12)[None] + shift) % 5
    np.save(tmp_path / "tokens.npy", rows.astype(np.uint8))
    (tmp_path / "tokens.json").write_text(json.dumps({"height": 3, "width": 4, "vocab": 5, "classes": [], "clusters": PALETTE}))
    return f"tokens:{tmp_path / 'tokens.npy'}"


@pytest.fixture
def options(tmp_path: Path, source: str) -> Callable[..., PretrainOptions]:
    def build(name: str = "run", **changes: Any) -> PretrainOptions:
        settings: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "steps": 6, "batch_size": 8, "log_every": 1}
        settings |= {"val_every": 3, "sample_every": 0, "checkpoint_every": 3, "lr": 0.01, "warmup": 2}
        return PretrainOptions(**({"source": source, "out": tmp_path / name} | settings | changes))

    return build


Options = Callable[..., PretrainOptions]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIME_FIELDS} for row in lines(run)]


def weights(run: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(run)
    assert newest is not None
    return dict(ImageGPT.from_pretrained(newest).state_dict())


def trainer(options: PretrainOptions) -> Any:
    options.out.mkdir()
    torch.manual_seed(options.seed)
    return loop.Trainer(options, torch.device("cpu"), Signals(), Console(False), begun=False)


def test_what_a_run_leaves_and_says(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(sample_every=3, samples=3, keep=1)
    assert run_pretrain(given) == 0
    run = given.out
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.toml", "metrics.jsonl", "samples"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-6"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-3.png", "step-6.png"]
    with Image.open(run / "samples" / "step-6.png") as picture:
        assert picture.width > picture.height
    resolved = read_config(run)
    assert (resolved.height, resolved.width, resolved.n_layer, resolved.warmup) == (3, 4, 1, 2)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "step 6 of 6" in out
    for word in (
        "model: 1 layers, 2 heads, width 8",
        "54 training and 6 validation",
        "histogram of each position",
        "kernels: ",
        "step 3: ",
    ):
        assert word in err
    assert "it/s" not in err  # no bars where stderr is no terminal


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


@pytest.mark.parametrize("lr", [0.01, 1e30])
def test_files_are_closed_at_the_end_and_after_an_error(options: Options, monkeypatch: pytest.MonkeyPatch, lr: float) -> None:
    closed: list[object] = []
    wanted: list[object] = []
    for kind in (loop.Metrics, TokenBatches):
        close = kind.close
        monkeypatch.setattr(kind, "close", lambda self, close=close: (closed.append(self), close(self)))
    train = loop.Trainer.train

    def spy(self: loop.Trainer) -> TrainResult:
        wanted.extend([self.metrics, self.data.train])
        return train(self)

    monkeypatch.setattr(loop.Trainer, "train", spy)
    with pytest.raises(NonFiniteError) if lr > 1 else contextlib.nullcontext():
        pretrain(options(lr=lr, warmup=0), progress=False)
    assert len(wanted) == 2
    assert {*map(id, wanted)} <= {*map(id, closed)}


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
        if self.training:
            seen.append(more["mask"])
        return forward(self, tokens, targets, **more)

    monkeypatch.setattr(ImageGPT, "forward", spy)
    pretrain(options("run", objective="bert", steps=2, accumulate=2), progress=False)
    drawn = trainer(options("again", objective="bert"))
    assert torch.equal(torch.cat(seen), torch.cat([drawn._mask("training", step, 8) for step in range(2)]))


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


def test_the_golden_loss_curve(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "loss_curve.json").read_text())
    run = pretrain(PretrainOptions(out=tmp_path / "run", **golden["options"]), progress=False).run
    rows = lines(run)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(golden["loss"], rel=1e-3), (
        f"the loss curve changed; if that is meant, run: {golden['command']}"
    )
    assert rows[-1]["val_loss"] == pytest.approx(golden["val_loss"], rel=1e-3)
    assert rows[-1]["histogram_loss"] == pytest.approx(golden["histogram_loss"], rel=1e-9)


def test_the_same_settings_give_the_same_run(options: Options) -> None:
    a, b = (pretrain(options(name), progress=False).run for name in "ab")
    c = pretrain(options("c", seed=1), progress=False).run
    assert timeless(a) == timeless(b) != timeless(c)
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_sampling_and_validating_change_nothing(options: Options) -> None:
    a = pretrain(options("a", sample_every=1, val_every=1, samples=2), progress=False).run
    b = pretrain(options("b", sample_every=0, val_every=100), progress=False).run
    assert [row["loss"] for row in lines(a) if "loss" in row] == [row["loss"] for row in lines(b) if "loss" in row]
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


def test_nothing_of_the_process_is_changed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    other = ImageGPT(preset("tiny", n_layer=1, n_embd=8, height=2, width=2)).blocks[0].attn
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    seen: list[Any] = []

    def state() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[union-attr, index]
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT),
            torch.is_grad_enabled(),
        ]

    before = state()
    update = loop.Trainer._update

    def spy(self: Any) -> None:
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                active(self.model.blocks[0].attn, "attention"),
                active(other, "attention"),
            )
        )
        update(self)

    monkeypatch.setattr(loop.Trainer, "_update", spy)
    pretrain(options("a"), progress=False)
    assert state() == before
    pretrain(options("b", deterministic=False, kernels="off"), progress=False)
    assert state() == before
    assert seen[0][0] is True
    assert seen[0][1] is not None
    assert seen[0][2] is None  # only the model in training
    assert seen[-1] == (False, None, None)
    broken = options("c", lr=1e30, warmup=0)
    with pytest.raises(NonFiniteError):
        pretrain(broken, progress=False)
    assert state() == before


def test_kernels_change_how_not_what(options: Options) -> None:
    on, off = (timeless(pretrain(options(name, kernels=name), progress=False).run) for name in ("auto", "off"))
    for a, b in zip(on, off, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_bfloat16_trains_float32_weights(options: Options) -> None:
    fine, rough = (pretrain(options(name, precision=name), progress=False) for name in ("fp32", "bf16"))
    assert rough.val_loss == pytest.approx(fine.val_loss, rel=0.05)
    assert rough.val_loss != fine.val_loss
    assert {value.dtype for value in weights(rough.run).values()} == {torch.float32}


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
        if self.training:
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


def test_a_weight_that_is_not_finite_is_never_saved(options: Options) -> None:
    given = options(lr=1e30, warmup=0, checkpoint_every=1, val_every=100)
    with pytest.raises(NonFiniteError):
        pretrain(given, progress=False)
    newest = latest_checkpoint(given.out)
    assert newest is None or all(bool(torch.isfinite(v).all()) for v in ImageGPT.from_pretrained(newest).state_dict().values())


MISTAKES: dict[str, tuple[dict[str, Any], type[IgptError], str]] = {
    "source": ({"source": "digts"}, ConfigError, "digts"),
    "missing file": ({"source": "tokens:gone.npy"}, DataError, "gone.npy"),
    "size": ({"height": 4, "width": 4}, ConfigError, "3 x 4"),
    "palette": ({"palette": "uniform:2000000"}, ConfigError, "2000000"),
    "preset": ({"preset": "igpt-xs"}, ConfigError, "igpt-xs"),
    "heads": ({"n_head": 3}, ConfigError, "n_head"),
    "device": ({"device": "tpu"}, ConfigError, "device must be auto, cpu, cuda"),
    "device number": ({"device": "cuda:77"}, ConfigError, "device: cuda:77 is not there"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named_and_leaves_no_folder(options: Options, what: str) -> None:
    changes, kind, reason = MISTAKES[what]
    out = options().out
    with pytest.raises(kind, match=reason):
        pretrain(options(**changes), progress=False)
    assert not out.exists()


def test_a_folder_in_use_is_refused(options: Options) -> None:
    given = options()
    pretrain(given, progress=False)
    before = timeless(given.out)
    with pytest.raises(ConfigError, match="already holds a run: pass --resume"):
        pretrain(given, progress=False)
    assert timeless(given.out) == before
    other = options("other")
    other.out.mkdir()
    (other.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        pretrain(other, progress=False)
    assert [path.name for path in other.out.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    given, errors = options(), []
    update = loop.Trainer._update

    def second(self: Any) -> None:
        if self.step == 2:
            with pytest.raises(CheckpointError, match="another run is writing"):
                pretrain(options(resume=True), progress=False)
            errors.append(1)
        update(self)

    monkeypatch.setattr(loop.Trainer, "_update", second)
    assert pretrain(given, progress=False).step == 6
    assert errors == [1]


def test_tokens_without_a_palette_train_without_pictures(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens.json").unlink()
    result = pretrain(options(sample_every=1, height=3, width=4))
    assert "samples: none, no palette" in capsys.readouterr().err
    assert result.step == 6
    assert not (result.run / "samples").exists()


def test_bert_learns_and_draws_nothing(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    result = pretrain(options(objective="bert", sample_every=1, steps=40, batch_size=32))
    assert "samples: none, a bert model cannot draw" in capsys.readouterr().err
    rows = [row["loss"] for row in lines(result.run) if "loss" in row]
    assert np.mean(rows[-5:]) < rows[0]


def test_without_held_out_images_there_is_no_validation(options: Options) -> None:
    result = pretrain(options(val_fraction=0.0), progress=False)
    assert (result.val_loss, result.best_val_loss, result.histogram_loss) == (None, None, None)
    assert result.train_loss is not None
    assert all("val_loss" not in row for row in lines(result.run))


def test_digits_with_a_learned_palette(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "steps": 3, "batch_size": 16, "samples": 4}
    result = pretrain(PretrainOptions(source="digits", out=tmp_path / "run", palette="fit:8", **settings))
    assert "palette: 8 colours, mean" in capsys.readouterr().err
    assert (result.run / "samples" / "step-3.png").exists()
    assert result.checkpoint is not None
    model = ImageGPT.from_pretrained(result.checkpoint)
    assert model.palette is not None
    assert model.palette.size == model.config.vocab_size == 8
    assert result.val_loss is not None
    assert result.val_loss * BITS <= 3.0  # no worse than 8 even colours


def test_damaged_photographs_stop_the_run_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    colors = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 3), dtype=np.uint8)
    for number, pixels in enumerate(colors):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    settings: dict[str, Any] = {"source": f"photos:{folder}", "palette": "uniform:8", "n_layer": 1, "n_head": 1, "n_embd": 8}
    settings |= {"steps": 3, "batch_size": 4, "sample_every": 0}
    with pytest.raises(DataError, match=r"05\.png"):
        pretrain(PretrainOptions(out=tmp_path / "a", **settings), progress=False)
    assert run_pretrain(PretrainOptions(out=tmp_path / "b", bad_images="skip", **settings)) == 0
    assert "1 damaged images skipped" in capsys.readouterr().out


def test_metrics_that_cannot_be_written_stop_the_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_durably", full)
    given = options(sample_every=3)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-3.png: No space left"):
        pretrain(given, progress=False)
    assert not (given.out / "lock").exists()


def test_regenerating_the_golden_curve_is_one_command() -> None:
    golden = json.loads((GOLDEN / "loss_curve.json").read_text())
    script = Path(golden["command"].split()[1])
    assert (GOLDEN.parents[1] / script).exists()
    found = subprocess.run([sys.executable, GOLDEN / "regenerate.py", "--list"], capture_output=True, text=True, check=True)
    assert "loss_curve.json" in found.stdout
