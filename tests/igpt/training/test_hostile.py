"""Run folders that someone spoiled, moved or removed: one line in bounded time, and nothing outside is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.commands.main import main
from igpt.errors import CheckpointError, ConfigError, IgptError
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from igpt.training import loop
from igpt.training.checkpoint import checkpoints, find_damage, latest_checkpoint, load_checkpoint, prune, save_checkpoint
from igpt.training.optim import make_optimizer
from igpt.training.options import PretrainOptions
from igpt.training.pretrain import pretrain
from igpt.training.run_folder import Metrics, RunLock, read_config
from tests.hostile import SECONDS, SPOILED, at_most, spoil
from tests.runs import Options, lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PretrainOptions:
    """A run of 4 steps with two checkpoints; copied by each test that spoils it."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "t.npy", np.random.default_rng(0).integers(0, 5, (20, 12)).astype(np.uint8))
    options = PretrainOptions(
        source=f"tokens:{folder / 't.npy'}",
        out=folder / "run",
        height=3,
        width=4,
        n_layer=1,
        n_head=2,
        n_embd=8,
        steps=4,
        batch_size=4,
        log_every=1,
        checkpoint_every=2,
        warmup=2,
    )
    pretrain(options, progress=False)
    return options


@pytest.fixture
def run(finished: PretrainOptions, tmp_path: Path) -> Path:
    shutil.copytree(finished.out, tmp_path / "run")
    return tmp_path / "run"


def resume(finished: PretrainOptions, run: Path, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pretrain(dataclasses.replace(finished, out=run, resume=True, **changes), progress=False)


def seal(folder: Path) -> None:
    """Make the marker agree with the files, as an attacker could."""
    files = {p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in folder.iterdir()}
    files.pop("COMPLETE", None)
    (folder / "COMPLETE").write_text(json.dumps({"files": files}))


WELCOME = {
    ".lock": {"empty", "nested", "nested TOML", "a gigabyte", "huge number", "no text"},
    "lock": {"empty", "nested", "nested TOML", "a gigabyte", "huge number", "no text"},
    "metrics.jsonl": {"empty", "huge number", "no text"},
    "samples": {"folder"},
    "checkpoints": {"folder"},
}
"""What a run replaces, takes for a line cut short, or finds to be what it wants."""


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "lock", ".lock", "samples", "checkpoints"])
def test_whatever_stands_in_a_run_folder_ends_in_one_line_or_in_a_run(
    finished: PretrainOptions, run: Path, name: str, kind: str
) -> None:
    place = run / name
    if name == "checkpoints":
        shutil.rmtree(place)
    spoil(place, kind)
    with at_most(SECONDS):
        if kind in WELCOME.get(name, ()):
            assert resume(finished, run).step == 4
            return
        with pytest.raises(IgptError) as raised:
            resume(finished, run)
    assert str(place) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("name", ["COMPLETE", "state.json", "optim.safetensors", "model.safetensors", "config.json"])
def test_whatever_stands_in_a_checkpoint_is_skipped_or_named(
    finished: PretrainOptions, run: Path, name: str, kind: str
) -> None:
    newest = run / "checkpoints" / "step-4"
    spoil(newest / name, kind)
    with at_most(SECONDS):
        reason = find_damage(newest)
        assert reason is not None
        assert name in reason
        with pytest.warns(UserWarning, match=name):
            assert latest_checkpoint(run) == run / "checkpoints" / "step-2"


@pytest.mark.parametrize("kind", ["nested", "huge number", "no text", "empty"])
@pytest.mark.parametrize("name", ["state.json", "optim.safetensors"])
def test_what_an_attacker_seals_is_named(finished: PretrainOptions, run: Path, name: str, kind: str) -> None:
    newest = run / "checkpoints" / "step-4"
    spoil(newest / name, kind)
    seal(newest)
    with at_most(SECONDS), pytest.raises(CheckpointError, match=name):
        resume(finished, run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -1}, "integer step of at least 0"),
        ({"step": True}, "integer step"),
        ({"step": 4.0}, "integer step"),
        ({"step": 2**63}, "integer step"),
        ({"step": 3}, "step is 3, the folder is named step-4"),
        ({"train_loss": -0.5}, "train_loss cannot be -0.5"),
        ({"val_loss": 3}, "val_loss cannot be 3"),
        ({"best_val_loss": "x" * 1000}, "best_val_loss cannot be x{80}$"),
        ({"window": [1.0, None]}, "window cannot be"),
        ({"window": [[1.0]]}, "window cannot be"),
        ({"window": {"0": 1.0}}, "window cannot be"),
        ({"pending": "validate"}, "pending cannot be"),
        ({"pending": ["sample", "validate"]}, "pending cannot be"),
        ({"pending": [["validate"]]}, "pending cannot be"),
        ({"format": True}, None),
        ({"conditions": []}, None),
        ({"conditions": {"torch": [1]}}, None),
        ({"more": 1}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_that_cannot_be_is_named(
    finished: PretrainOptions, run: Path, changes: dict[str, Any], words: str | None
) -> None:
    newest = run / "checkpoints" / "step-4"
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | changes))
    seal(newest)
    if words is None:
        assert resume(finished, run).step == 4
        return
    with pytest.raises(CheckpointError, match=words):
        resume(finished, run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"train_loss": NaN', "NaN is no JSON"),
        ('"train_loss": -Infinity', "-Infinity is no JSON"),
        ('"train_loss": 1e999', "1e999 is too large a number"),
        ('"step": 4', "the key 'step' is given twice"),
    ],
)
def test_a_state_that_is_no_json_is_named(finished: PretrainOptions, run: Path, text: str, words: str) -> None:
    newest = run / "checkpoints" / "step-4"
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state.rstrip().removesuffix("}") + f", {text}}}")
    seal(newest)
    with pytest.raises(CheckpointError, match=words):
        resume(finished, run)


def moments(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def many_empty_tensors(path: Path) -> None:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(10**6)) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


MOMENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "negative square": (moments(lambda t: t["exp_avg_sq/sos"].fill_(-1)), "exp_avg_sq/sos must be finite and not below 0"),
    "NaN": (moments(lambda t: t["exp_avg/sos"].fill_(float("nan"))), "exp_avg/sos must be finite"),
    "another step": (moments(lambda t: t["step/sos"].fill_(9)), r"the optimizer has made \[4.0, 9.0\] steps, the run 4"),
    "negative step": (moments(lambda t: t["step/sos"].fill_(-4)), "step/sos must be finite and not below 0"),
    "integers": (
        moments(lambda t: t.update({"exp_avg/sos": torch.zeros(8, dtype=torch.int64)})),
        "must be floating point, got I64",
    ),
    "complex": (moments(lambda t: t.update({"exp_avg/sos": torch.zeros(8, dtype=torch.complex64)})), "must be floating point"),
    "no moments at all": (moments(lambda t: t.clear()), "exp_avg/blocks.0.attn.proj.weight is missing"),
    "a million empty tensors": (many_empty_tensors, "its header takes 57,888,891 bytes"),
    "a thousand empty tensors": (
        moments(lambda t: t.update({f"z{i}": torch.zeros(0) for i in range(1000)})),
        r"unknown tensor z0 \(0,\)",
    ),
    "a header of 2⁶³ bytes": (lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "its header takes"),
    "a header that ends": (lambda path: path.write_bytes(b"\x10"), "not a readable safetensors file"),
}


@pytest.mark.parametrize("what", MOMENTS)
def test_moments_that_cannot_be_are_named(finished: PretrainOptions, run: Path, what: str) -> None:
    change, words = MOMENTS[what]
    newest = run / "checkpoints" / "step-4"
    change(newest / "optim.safetensors")
    seal(newest)
    with at_most(SECONDS), pytest.raises(CheckpointError, match=words):
        resume(finished, run)


@pytest.mark.parametrize(
    "listed", [{"": {}}, {"a\0b": {}}, {"\ud800": {}}, {".": {}}, {"x" * 5000: {}}, {"../config.toml": {}}]
)
def test_names_that_no_file_has_are_damage(run: Path, listed: dict[str, Any]) -> None:
    newest = run / "checkpoints" / "step-4"
    marker = json.loads((newest / "COMPLETE").read_text())
    marker["files"] |= {name: {"size": 0, "sha256": ""} for name in listed}
    (newest / "COMPLETE").write_text(json.dumps(marker))
    assert find_damage(newest) is not None


@pytest.mark.parametrize("name", ["lock", ".lock", "config.toml", "metrics.jsonl"])
def test_a_link_in_a_run_folder_leads_nowhere(tmp_path: Path, options: Options, name: str) -> None:
    """What it points to stays as it is, in a new run and in one that goes on."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    given = options()
    given.out.mkdir()
    (given.out / name).symlink_to(precious)
    with pytest.raises(ConfigError, match=f"out: .*{name} is a link; a run writes a file of its own there: move it away"):
        pretrain(given, progress=False)
    (given.out / name).unlink()
    os.link(precious, given.out / name)  # a second name of the same file
    for resume in (False, True):
        with pytest.raises(IgptError) if name != "lock" else pytest.MonkeyPatch.context():
            pretrain(options(resume=resume), progress=False)
        shutil.rmtree(given.out / "checkpoints", ignore_errors=True)
        if name == "lock":
            break
    assert precious.read_text() == "precious"


def test_folders_of_a_run_may_be_links(tmp_path: Path, options: Options) -> None:
    given = options()
    given.out.mkdir()
    (tmp_path / "large").mkdir()
    (given.out / "checkpoints").symlink_to(tmp_path / "large")
    (tmp_path / "large" / ".tmp-x").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"not empty \(checkpoints\) and holds no config.toml.*if it was one, put"):
        pretrain(given, progress=False)
    (given.out / "checkpoints").unlink()
    pretrain(given, progress=False)
    shutil.move(given.out / "checkpoints", tmp_path / "moved")
    (given.out / "checkpoints").symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / ".tmp-x").symlink_to(tmp_path)
    assert pretrain(options(resume=True, steps=8), progress=False).step == 8
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["step-6", "step-8"]


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something once `step` steps are made."""
    update = loop.Trainer._update

    def acting(self: Any) -> None:
        update(self)
        if self.step == step:
            act()

    patch.setattr(loop.Trainer, "_update", acting)


def test_a_folder_that_is_moved_while_it_trains_loses_nothing(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, moved = options(), tmp_path / "moved"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: given.out.rename(moved))
        with pytest.raises(CheckpointError, match=f"run was moved to {moved} while it trained; step 4 is saved there, and"):
            pretrain(given, progress=False)
    assert not given.out.exists()
    assert sorted(path.name for path in moved.iterdir()) == ["checkpoints", "config.toml", "metrics.jsonl"]
    result = pretrain(options("moved", resume=True), progress=False)
    assert result.step == 6
    whole = pretrain(options("whole"), progress=False)
    assert [row["loss"] for row in lines(moved) if "loss" in row] == [row["loss"] for row in lines(whole.run) if "loss" in row]


def test_a_folder_that_is_removed_or_replaced_ends_the_run_at_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options()

    def replace() -> None:
        shutil.rmtree(given.out)
        given.out.mkdir()

    for act in (lambda: shutil.rmtree(given.out), replace):
        with monkeypatch.context() as patch:
            at_step(patch, 2, act)
            with pytest.raises(CheckpointError, match="run was moved or removed while it trained, after step 2"):
                pretrain(given, progress=False)
        assert not given.out.exists() or list(given.out.iterdir()) == []


def test_metrics_that_are_short_long_or_gone_are_no_hindrance(
    finished: PretrainOptions, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:1]))
    given = dataclasses.replace(finished, out=run, resume=True)
    pretrain(given)
    assert f"resume: {path} ends at step 1, the checkpoint is of step 4" in capsys.readouterr().err
    path.write_bytes(b"".join(rows) + b'{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    pretrain(given)
    assert path.read_bytes() == b"".join(rows)
    path.unlink()
    assert pretrain(given).step == 4
    path.write_bytes(b"x\n" + rows[0])
    with pytest.raises(CheckpointError, match=r"line 1 is not .*; to go on without the lines so far, move .* away"):
        pretrain(given)
    path.unlink()
    assert pretrain(given).step == 4


def test_a_long_file_of_metrics_is_read_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    row = json.dumps({"step": 1, "loss": 1.0, "text": "x" * 400}).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(row * 20_000)
    tracemalloc.start()
    metrics = Metrics(tmp_path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    metrics.close()
    assert metrics.last == 1
    assert (tmp_path / "metrics.jsonl").stat().st_size == 20_000 * len(row)
    assert peak < 2**20


def test_a_checkpoint_too_many_goes_at_the_next_start(finished: PretrainOptions, run: Path) -> None:
    """A process that is killed after it wrote a checkpoint, and before it deleted the oldest, leaves one more."""
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-2", folder / "step-1")
    (folder / ".tmp-step-6").mkdir()
    (folder / ".trash-step-0").mkdir()
    assert resume(finished, run).step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    assert resume(finished, run, keep=1).step == 4
    assert sorted(path.name for path in folder.iterdir()) == ["step-4"]


def test_a_link_among_checkpoints_is_unlinked_and_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (run / "checkpoints" / "step-1").symlink_to(tmp_path / "mine")
    prune(run, 4, 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert (tmp_path / "mine" / "file").exists()


def test_steps_below_the_warm_up_of_a_run_are_explained(finished: PretrainOptions, run: Path) -> None:
    given = dataclasses.replace(finished, out=run, resume=True, steps=1, warmup=None)
    with pytest.raises(ConfigError, match="steps: the run warms up for 2 steps and cannot end at 1"):
        pretrain(given, progress=False)


@pytest.mark.parametrize("what", ["file", "link to a file", "link to nothing", "link to itself", "pipe"])
def test_an_out_that_is_no_folder_is_named(options: Options, tmp_path: Path, what: str) -> None:
    given = options()
    (tmp_path / "file").write_text("mine")
    {
        "file": lambda: given.out.write_text("mine"),
        "link to a file": lambda: given.out.symlink_to(tmp_path / "file"),
        "link to nothing": lambda: given.out.symlink_to(tmp_path / "nothing"),
        "link to itself": lambda: given.out.symlink_to(given.out),
        "pipe": lambda: os.mkfifo(given.out),
    }[what]()
    kind = "a link that leads to no folder" if "link" in what else "a file"
    with at_most(SECONDS), pytest.raises(ConfigError, match=f"out: {given.out} is {kind}, a folder is wanted"):
        pretrain(given, progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_names_in_another_encoding(options: Options, tmp_path: Path) -> None:
    """A source may have one; a run folder may not, because safetensors would not read its checkpoints."""
    name = os.fsdecode(b"r\xff\xe9n")
    with pytest.raises(ConfigError, match=r"out: .* is no name in UTF-8, which checkpoints need"):
        pretrain(options(name), progress=False)
    assert not (tmp_path / name).exists()
    for end in (".npy", ".json"):
        shutil.copy(tmp_path / f"tokens{end}", tmp_path / f"{name}{end}")
    given = options(source=f"tokens:{tmp_path / name}.npy")
    pretrain(given, progress=False)
    assert read_config(given.out).source == given.source
    assert pretrain(options(source=given.source, resume=True), progress=False).step == 6


def test_a_disk_that_is_read_only_is_named_with_what_to_do(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    given = options()

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["pretrain", given.source, "--out", str(given.out)]) == 2
    said = capsys.readouterr().err
    assert said == f"igpt: out: cannot write into {given.out}: Read-only file system: name a place elsewhere\n"


def test_a_system_with_fewer_calls_trains_too(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none of these; there `Place` knows a folder by its name and number."""
    for name in ("pwrite", "pread", "fork", "O_DIRECTORY", "sched_getaffinity", "mkfifo", "getuid"):
        monkeypatch.delattr(os, name)
    for name in ("SIGUSR1", "SIGHUP", "SIGALRM", "setitimer", "pthread_sigmask"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert pretrain(options(), progress=False).step == 6
    assert pretrain(options(resume=True, steps=7), progress=False).step == 7


def test_a_lock_that_cannot_be_removed_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no open file."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "in use")

    with monkeypatch.context() as patch:
        lock = RunLock(tmp_path).__enter__()
        patch.setattr(Path, "unlink", refuse)
        lock.__exit__(None, None, None)
    with RunLock(tmp_path):
        pass


def test_a_checkpoint_is_written_only_into_a_folder_that_is_there(tmp_path: Path) -> None:
    model = ImageGPT(ImageGPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=3, height=2, width=2))
    optimizer = make_optimizer(model, lr=0.1)
    with pytest.raises(CheckpointError, match="No such file"):
        save_checkpoint(tmp_path / "gone", 0, model=model, optimizer=optimizer, state={})
    assert not (tmp_path / "gone").exists()
    folder = save_checkpoint(tmp_path, 0, model=model, optimizer=optimizer, state={})
    assert load_checkpoint(folder, model=model, optimizer=optimizer)["step"] == 0
    assert [number for number, _ in checkpoints(tmp_path)] == [0]
