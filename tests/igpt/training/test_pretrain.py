"""Whole runs: what they leave, what they refuse, and that they change nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.commands.pretrain import run_pretrain
from igpt.data.batches import TokenBatches
from igpt.errors import CheckpointError, ConfigError, DataError, IgptError, NonFiniteError
from igpt.kernels.state import active
from igpt.model.config import preset
from igpt.model.image_gpt import ImageGPT
from igpt.model.inference import BITS
from igpt.training import loop
from igpt.training.loop import TrainResult
from igpt.training.options import PretrainOptions
from igpt.training.pretrain import pretrain
from igpt.training.run_folder import read_config
from tests.runs import Options, lines, timeless, weights

GOLDEN = Path(__file__).parents[2] / "golden"


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


def test_the_golden_loss_curve(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "loss_curve.json").read_text())
    run = pretrain(PretrainOptions(out=tmp_path / "run", **golden["options"]), progress=False).run
    rows = lines(run)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(golden["loss"], rel=1e-3), (
        f"the loss curve changed; if that is meant, run: {golden['command']}"
    )
    assert rows[-1]["val_loss"] == pytest.approx(golden["val_loss"], rel=1e-3)
    assert rows[-1]["histogram_loss"] == pytest.approx(golden["histogram_loss"], rel=1e-9)


def test_regenerating_the_golden_curve_is_one_command() -> None:
    golden = json.loads((GOLDEN / "loss_curve.json").read_text())
    script = Path(golden["command"].split()[1])
    assert (GOLDEN.parents[1] / script).exists()
    found = subprocess.run([sys.executable, GOLDEN / "regenerate.py", "--list"], capture_output=True, text=True, check=True)
    assert "loss_curve.json" in found.stdout


def test_the_same_settings_give_the_same_run(options: Options) -> None:
    a, b = (pretrain(options(name), progress=False).run for name in "ab")
    c = pretrain(options("c", seed=1), progress=False).run
    assert timeless(a) == timeless(b) != timeless(c)
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
