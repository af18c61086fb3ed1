"""A run that was interrupted equals one that was not, bit for bit.

As a script (``python test_resume.py FOLDER ROUNDS``) it kills runs with SIGKILL and prints what it saw as JSON: torch is
imported once and each run is a fork, because 24 fresh interpreters would take minutes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from igpt.commands.pretrain import run_pretrain
from igpt.errors import CheckpointError, ConfigError
from igpt.training import loop
from igpt.training.checkpoint import checkpoints, find_damage, latest_checkpoint
from igpt.training.data import TrainingData
from igpt.training.loop import TrainResult
from igpt.training.options import PretrainOptions
from igpt.training.pretrain import pretrain
from tests.runs import Options, timeless, write_tokens


def build(folder: Path, name: str = "run", **changes: Any) -> PretrainOptions:
    """A run whose cadences do not divide each other."""
    settings: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "steps": 20, "batch_size": 8, "lr": 0.01, "warmup": 2}
    settings |= {"log_every": 3, "val_every": 6, "sample_every": 8, "samples": 2, "checkpoint_every": 4, "weight_decay": 0.01}
    return PretrainOptions(**({"source": write_tokens(folder), "out": folder / name} | settings | changes))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return lambda name="run", **changes: build(tmp_path, name, **changes)


def traces(run: Path) -> dict[str, Any]:
    """All that must be equal: lines of metrics without times, the newest checkpoint's tensors and state, pictures."""
    newest = latest_checkpoint(run)
    assert newest is not None
    found: dict[str, Any] = {"metrics": timeless(run)}
    for file in ("model.safetensors", "optim.safetensors"):
        found[file] = {name: value.numpy().tobytes() for name, value in load_file(newest / file).items()}
    found["state"] = json.loads((newest / "state.json").read_text())
    found["samples"] = {path.name: path.read_bytes() for path in sorted((run / "samples").glob("*.png"))}
    return found


def stop_at(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM, where: str = "_update") -> None:
    """Send this process a signal when the run reaches `step` in the method `where`."""
    method = getattr(loop.Trainer, where)

    def interrupted(self: Any) -> None:
        if self.step == step and self.signals.received is None:
            os.kill(os.getpid(), number)
        method(self)

    patch.setattr(loop.Trainer, where, interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("step", [1, 4, 6, 8, 17, 20])
def test_stopped_and_resumed_equals_uninterrupted(options: Options, objective: str, step: int) -> None:
    whole = pretrain(options("whole", objective=objective), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step - 1)
        first = pretrain(options(objective=objective), progress=False)
    assert (first.step, first.stopped_by) == (step, signal.SIGTERM)  # also at 20: validation was left to do
    assert first.checkpoint == first.run / "checkpoints" / f"step-{step}"
    second = pretrain(options(objective=objective, resume=True), progress=False)
    assert second.stopped_by is None
    assert traces(second.run) == traces(whole.run)
    assert second == TrainResult(**(vars(whole) | {"run": second.run, "checkpoint": second.run / "checkpoints" / "step-20"}))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_validate", "_sample"])
@pytest.mark.parametrize("step", [6, 8, 20])
def test_validation_and_sampling_break_off_and_are_made_up_for(options: Options, where: str, step: int) -> None:
    if (where, step) in (("_validate", 8), ("_sample", 6)):
        where = "_sample" if where == "_validate" else "_validate"
    whole = pretrain(options("whole"), progress=False)
    for name in ("a", "b"):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step, where=where)
            first = pretrain(options(name), progress=False)
        assert (first.step, first.stopped_by) == (step, signal.SIGTERM)
        state = json.loads((first.run / "checkpoints" / f"step-{step}" / "state.json").read_text())
        assert state["pending"][0] == where.strip("_")
    # A second interruption at the same place, and then a death after the late work but before it is in a checkpoint.
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, where=where)
        again = pretrain(options("a", resume=True), progress=False)
    assert (again.step, again.stopped_by) == (step, signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(options("a", resume=True), progress=False)
    for name in ("a", "b"):
        assert traces(pretrain(options(name, resume=True), progress=False).run) == traces(whole.run)


def test_many_lives_equal_one(options: Options) -> None:
    whole = pretrain(options("whole"), progress=False)
    for step in (2, 3, 7, 11, 12, 18):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            assert pretrain(options(resume=True), progress=False).step == step + 1
    assert traces(pretrain(options(resume=True), progress=False).run) == traces(whole.run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_exit_code_tells_of_the_signal(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    stop_at(monkeypatch, 5, number)
    assert run_pretrain(options()) == code
    out, err = capsys.readouterr()
    assert "step 6 of 20" in out
    assert f"stopped by {signal.Signals(number).name}: " in err
    assert "step-6 is written, --resume goes on" in err


def test_a_signal_while_preparing_ends_without_a_run(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(TrainingData, "baseline", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    given = options()
    assert pretrain(given, progress=False) == TrainResult(run=given.out, stopped_by=signal.SIGTERM)
    assert run_pretrain(given) == 143
    assert not given.out.exists()


def test_a_signal_while_saving_lets_the_save_finish(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    save = loop.save_checkpoint

    def interrupted(*args: Any, **named: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **named)

    monkeypatch.setattr(loop, "save_checkpoint", interrupted)
    result = pretrain(options(), progress=False)
    assert (result.step, result.stopped_by) == (4, signal.SIGTERM)
    assert find_damage(result.run / "checkpoints" / "step-4") is None
    last = pretrain(options("last", checkpoint_every=99), progress=False)
    assert (last.step, last.stopped_by) == (20, None)  # it came too late to stop anything


def test_a_finished_run_has_nothing_to_resume(options: Options) -> None:
    first = pretrain(options(), progress=False)
    before = traces(first.run)
    assert pretrain(options(resume=True), progress=False) == first
    assert traces(first.run) == before


def test_resume_starts_where_there_is_nothing_yet(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(options("whole"), progress=False)
    assert traces(pretrain(options("a", resume=True), progress=False).run) == traces(whole.run)

    def die(*_: Any, **__: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", die)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(options("b"), progress=False)
    assert checkpoints(options("b").out) == []
    assert (options("b").out / "metrics.jsonl").read_text() != ""
    assert traces(pretrain(options("b", resume=True), progress=False).run) == traces(whole.run)


def test_a_longer_run_goes_on(options: Options) -> None:
    pretrain(options(), progress=False)
    longer = pretrain(options(steps=24, resume=True, log_every=1), progress=False)
    rows = [row for row in traces(longer.run)["metrics"] if "loss" in row]
    assert [row["step"] for row in rows][-6:] == [18, 20, 21, 22, 23, 24]
    assert rows[-4]["lr"] > 0  # the cosine ends at 24 now
    assert "steps = 24" in (longer.run / "config.toml").read_text()
    with pytest.raises(ConfigError, match="steps: the run has made 24 steps already and cannot end at 20"):
        pretrain(options(resume=True), progress=False)


def test_other_settings_are_refused_and_nothing_is_touched(options: Options) -> None:
    run = pretrain(options(), progress=False).run
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError, match=r"--resume cannot change lr: the run has 0\.01, this command says 0\.02"):
        pretrain(options(lr=0.02, resume=True), progress=False)
    (run / "config.toml").write_text("steps = [")
    with pytest.raises(ConfigError, match=r"config.toml: not readable as TOML"):
        pretrain(options(resume=True), progress=False)
    (run / "config.toml").write_bytes(before[run / "config.toml"])
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(options: Options) -> None:
    whole = pretrain(options("whole"), progress=False)
    run = pretrain(options(steps=20), progress=False).run
    newest, older = (folder for _, folder in checkpoints(run))
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.warns(UserWarning, match=r"skipped checkpoint .*step-20: model.safetensors is damaged"):
        result = pretrain(options(resume=True), progress=False)
    assert traces(result.run) == traces(whole.run)
    assert older.name == "step-16"
    for _, folder in checkpoints(run):
        (folder / "COMPLETE").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with (
        pytest.warns(UserWarning, match="no COMPLETE"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        pretrain(options(resume=True), progress=False)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_kill_while_the_only_checkpoint_is_replaced_does_not_begin_anew(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain(options(keep=1), progress=False).run
    before = traces(run)
    ((_, folder),) = checkpoints(run)
    folder.rename(folder.with_name(f".replaced-{folder.name}"))
    monkeypatch.setattr(loop.Trainer, "_update", lambda self: pytest.fail("no step is left to make"))
    assert pretrain(options(keep=1, resume=True), progress=False).step == 20
    assert traces(run) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pending", None),
        ("window", 3),
        ("val_loss", "low"),
        ("histogram_loss", [1.0]),
        ("window", ["x"]),
        ("pending", ["dance"]),
    ],
)
def test_a_state_that_makes_no_sense_is_named(options: Options, name: str, value: Any) -> None:
    import hashlib

    run = pretrain(options(), progress=False).run
    folder = run / "checkpoints" / "step-20"
    state = json.loads((folder / "state.json").read_text())
    text = json.dumps(state | {name: value}).encode()
    (folder / "state.json").write_bytes(text)
    marker = json.loads((folder / "COMPLETE").read_text())
    marker["files"]["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "COMPLETE").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match=f"state.json: {name} cannot be"):
        pretrain(options(resume=True), progress=False)


def test_other_conditions_are_said(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "versions", lambda: {"torch": "1.0"})
        pretrain(options(), progress=False)
    pretrain(options(resume=True, keep=5))
    err = capsys.readouterr().err
    assert f"resume: igpt None -> 0.1.0, torch 1.0 -> {torch.__version__}, " in err
    assert "threads" not in err
    assert "resume: keep: 2 -> 5" in err


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    root = str(Path(sys.modules["igpt"].__path__[0]).parent)
    found = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "24"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    seen = json.loads(found.stdout)
    assert seen["kills"] >= 24
    assert seen["unreadable"] == []
    assert seen["finished"] >= 2
    assert seen["different"] == []
    assert len(seen["inside a save"]) >= 3  # the moments were not all harmless ones
    assert seen["resumed at"] != []


def _child(options: PretrainOptions, fatal: int | None) -> None:
    """Train; with `fatal`, die by SIGKILL at that file system call of this life, before or after it is done."""
    calls = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal and calls % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*args, **named)
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    if fatal is not None:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
    pretrain(options, progress=False)


def _main(folder: Path, rounds: int) -> None:
    import igpt.generation.sample  # noqa: F401 - imported here once, not in every fork

    torch.set_num_threads(1)
    warm = torch.nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step()  # imports a second's worth of torch that each fork would import anew
    warnings.simplefilter("error")  # a damaged checkpoint would give a warning
    chance = random.Random(0)
    seen: dict[str, Any] = {"kills": 0, "unreadable": [], "finished": 0, "different": [], "inside a save": [], "resumed at": []}

    def life(options: PretrainOptions, fatal: int | None, seconds: float | None) -> bool:
        """One process; True when it was killed."""
        pid = os.fork()
        if pid == 0:
            try:
                _child(options, fatal)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return True
        if os.WEXITSTATUS(status):
            raise SystemExit("a run failed by itself")
        return False

    settings: dict[str, Any] = {"steps": 24, "checkpoint_every": 2, "sample_every": 11}
    life(build(folder, "whole", **settings), None, None)
    whole = traces(folder / "whole")
    began = time.perf_counter()
    life(build(folder, "timing", **settings), None, None)
    usual = time.perf_counter() - began
    while seen["kills"] < rounds or seen["finished"] < 2:
        options = build(folder, f"run-{seen['finished']}", resume=True, **settings)
        timed = chance.random() < 0.5
        fatal, seconds = (None, chance.uniform(0.05, 0.6) * usual) if timed else (chance.randint(1, 90), None)
        killed = life(options, fatal, seconds)
        parent = options.out / "checkpoints"
        seen["kills"] += killed
        if killed and parent.exists():
            half = [path.name for path in parent.iterdir() if path.name.startswith(".")]
            seen["inside a save"] += half
            seen["unreadable"] += [str(path) for _, path in checkpoints(options.out) if find_damage(path) is not None]
            newest = latest_checkpoint(options.out)
            seen["resumed at"].append(None if newest is None else newest.name)
        if not killed:
            seen["finished"] += 1
            if traces(options.out) != whole:
                seen["different"].append(options.out.name)
    print(json.dumps(seen))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
