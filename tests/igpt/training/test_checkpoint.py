from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from igpt.errors import CheckpointError, NonFiniteError
from igpt.files import write_durably
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from igpt.training import checkpoint
from igpt.training.checkpoint import (
    checkpoints,
    find_damage,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    resolve_model,
    save_checkpoint,
)
from igpt.training.optim import make_optimizer

CONFIG = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, height=3, width=4)


def made(seed: int = 0, config: ImageGPTConfig = CONFIG, steps: int = 2) -> tuple[ImageGPT, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = ImageGPT(config)
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        tokens = torch.randint(0, config.vocab_size, (3, config.n_ctx))
        loss = model(tokens, tokens).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


def saved(run: Path, *steps: int, keep: int = 9) -> list[Path]:
    model, optimizer = made()
    return [save_checkpoint(run, step, model=model, optimizer=optimizer, state={"at": step}, keep=keep) for step in steps]


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run)]


def seal(folder: Path) -> None:
    """Make the marker agree with the files, as an attacker or a careless editor could."""
    files = {p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in folder.iterdir()}
    files.pop("COMPLETE", None)
    (folder / "COMPLETE").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_weights_moments_and_state_come_back_bit_for_bit(tmp_path: Path, objective: Any) -> None:
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=5, height=3, width=4, objective=objective)
    model, optimizer = made(0, config)
    state = {"loss": 0.1 + 0.2, "window": [1.5], "name": None}
    folder = save_checkpoint(tmp_path, 7, model=model, optimizer=optimizer, state=state, keep=1)
    other, fresh = made(1, config, steps=1)
    found = load_checkpoint(folder, model=other, optimizer=fresh)
    assert found == {"format": 1, "step": 7, **state}
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert optimizer.state[a].keys() == fresh.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(optimizer.state[a][kind], fresh.state[b][kind]) for kind in optimizer.state[a]), name
    assert fresh.param_groups[0]["weight_decay"] == 0.1


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    model, optimizer = made(steps=0)
    folder = save_checkpoint(tmp_path, 0, model=model, optimizer=optimizer, state={}, keep=1)
    other, fresh = made(1, steps=0)
    assert load_checkpoint(folder, model=other, optimizer=fresh)["step"] == 0
    assert not fresh.state


def test_zero_biases_are_read_as_zero(tmp_path: Path) -> None:
    config = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, height=3, width=4, bias=True)
    model, optimizer = made(config=config, steps=0)
    folder = save_checkpoint(tmp_path, 0, model=model, optimizer=optimizer, state={}, keep=1)
    other, _ = made(1, config, steps=2)
    load_checkpoint(folder, model=other)
    assert not other.blocks[0].fc.bias.any()


def test_transformers_reads_a_checkpoint(tmp_path: Path) -> None:
    import transformers

    (folder,) = saved(tmp_path, 3)
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder).eval()
    tokens = torch.randint(0, 5, (2, 12))
    shifted = torch.cat([torch.full((2, 1), 5), tokens[:, :-1]], 1)
    ours = ImageGPT.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(shifted).logits, atol=1e-5, rtol=1e-5)


def test_files_are_readable_by_others_and_nothing_temporary_stays(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 3)
    names = {path.name for path in folder.iterdir()}
    assert names == {"COMPLETE", "config.json", "model.safetensors", "optim.safetensors", "state.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.name != "COMPLETE"} == {0o644}
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"]


def test_the_newest_is_the_largest_number_not_the_last_word(tmp_path: Path) -> None:
    saved(tmp_path, 9, 100, 10)
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / "step-300-copy").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-200").mkdir()
    assert steps_of(tmp_path) == [100, 10, 9]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-100"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_keep_counts_whole_checkpoints_up_to_the_one_written(tmp_path: Path) -> None:
    folders = saved(tmp_path, 1, 2, 3, 4, 9)
    (folders[3] / "COMPLETE").unlink()
    saved(tmp_path, 5, keep=2)
    assert steps_of(tmp_path) == [9, 5, 4, 3]  # 9 lies ahead, 4 is not whole and does not count
    saved(tmp_path, 6, keep=1)
    assert steps_of(tmp_path) == [9, 6]
    with pytest.raises(CheckpointError, match="keep"):
        saved(tmp_path, 7, keep=0)


def test_a_failed_deletion_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse(path))
    with pytest.warns(UserWarning, match="busy"):
        saved(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-2"
    remove_leftovers(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-2"}


def _flip(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    return spoil


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def _marker(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "COMPLETE").write_text(text) and None


ENTRY = '{"size": 1, "sha256": "x"}'
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no marker": (lambda f: (f / "COMPLETE").unlink(), "no COMPLETE"),
    "empty marker": (_marker(""), "COMPLETE is not readable"),
    "marker is a list": (_marker("[]"), "COMPLETE is not readable"),
    "marker without files": (_marker('{"files": {}}'), "does not list config.json"),
    "marker leads outside": (_marker('{"files": {"../x": ' + ENTRY + "}}"), "no file name"),
    "marker size is infinite": (_marker('{"files": {"a": {"size": Infinity, "sha256": ""}}}'), "COMPLETE is not readable"),
    "marker is deep": (_marker("[" * 100_000), "COMPLETE is not readable"),
    "marker size is a word": (_marker('{"files": {"a": {"size": "a", "sha256": ""}}}'), "COMPLETE is not readable"),
    "weights flipped": (_flip("model.safetensors"), "model.safetensors is damaged"),
    "moments flipped": (_flip("optim.safetensors"), "optim.safetensors is damaged"),
    "state cut": (_truncate("state.json"), "state.json has"),
    "weights cut": (_truncate("model.safetensors"), "model.safetensors has"),
    "moments gone": (lambda f: (f / "optim.safetensors").unlink(), "optim.safetensors is missing"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path: Path, what: str) -> None:
    spoil, reason = DAMAGES[what]
    older, newer = saved(tmp_path, 1, 2)
    assert find_damage(newer) is None
    spoil(newer)
    with pytest.warns(UserWarning, match=f"step-2: .*{reason}"):
        assert latest_checkpoint(tmp_path) == older
    model, optimizer = made()
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(newer, model=model, optimizer=optimizer)
    spoil(older)
    with pytest.warns(UserWarning, match=reason):
        assert latest_checkpoint(tmp_path) is None


def _edit(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return spoil


def _state(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "state.json").write_text(text) and None


MISFITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "moment missing": (
        _edit("optim.safetensors", lambda t: t.pop("exp_avg/sos")),
        r"exp_avg/sos is missing; the model wants \(8,\)",
    ),
    "moment of another shape": (
        _edit("optim.safetensors", lambda t: t.update({"exp_avg/sos": torch.zeros(9)})),
        r"exp_avg/sos must be \(8,\), got \(9,\)",
    ),
    "moment of nothing": (
        _edit("optim.safetensors", lambda t: t.update({"exp_avg/x": torch.zeros(1)})),
        "unknown tensor exp_avg/x",
    ),
    "moments are no safetensors": (
        lambda f: (f / "optim.safetensors").write_bytes(b"\x80\x04pickle"),
        "not a readable safetensors",
    ),
    "weight missing": (_edit("model.safetensors", lambda t: t.pop("transformer.ln_f.weight")), "ln_f.weight is missing"),
    "state is no JSON": (_state("{"), "state.json: not readable as JSON"),
    "state is a list": (_state("[]"), "state.json: must hold an object"),
    "state of the future": (_state('{"format": 2, "step": 1}'), "format 1"),
    "step is a word": (_state('{"format": 1, "step": "1"}'), "integer step"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path, what: str) -> None:
    spoil, reason = MISFITS[what]
    (folder,) = saved(tmp_path, 1)
    spoil(folder)
    seal(folder)
    assert find_damage(folder) is None
    model, optimizer = made(3, steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state[model.head.weight]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(folder, model=model, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], moment)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_embd": 16}, r"tensor blocks.0.attn.proj.weight must be \(16, 16\), got \(8, 8\)"),
        ({"n_layer": 2}, "tensor blocks.1.attn.proj.weight is missing"),
        ({"objective": "bert"}, "unknown tensor sos"),
        ({"n_head": 4}, "n_head is 2, the model has 4"),
        ({"height": 4, "width": 3}, "height is 3, the model has 4"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (folder,) = saved(tmp_path, 1)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 5, "height": 3, "width": 4} | changes
    model, optimizer = made(config=ImageGPTConfig(**sizes), steps=0)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(folder, model=model, optimizer=optimizer)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-4: no such folder"):
        load_checkpoint(tmp_path / "step-4", model=made()[0])


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flush(handle: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path / "checkpoints"))
        fsync(handle)

    def move(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move)
    (folder,) = saved(tmp_path, 1)
    end = done.index(".tmp-step-1 -> step-1")
    assert set(done[:end]) >= {f".tmp-step-1/{path.name}" for path in folder.iterdir()}
    assert done[end - 2 :] == [".tmp-step-1/COMPLETE", ".tmp-step-1", ".tmp-step-1 -> step-1", "."]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "replace"])
def test_a_disk_that_refuses_at_any_moment_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (old,) = saved(tmp_path, 1)
    content = {path.name: path.read_bytes() for path in old.iterdir()}
    real = getattr(os, call)
    messages: list[str] = []
    for number in range(30):
        calls = 0

        def full(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number + 1:  # noqa: B023 - called in this round only
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                saved(tmp_path, 2)
            except CheckpointError as error:
                messages.append(str(error))
        # All that may have happened is that the new one was renamed into place and the last flush failed.
        assert {p.name for p in (tmp_path / "checkpoints").iterdir()} <= {"step-1", "step-2"}
        assert all(find_damage(folder) is None for _, folder in checkpoints(tmp_path))
        assert {path.name: path.read_bytes() for path in old.iterdir()} == content
        if calls <= number:
            break
    assert messages
    assert all("No space left on device; older checkpoints are untouched" in message for message in messages)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-2"


def test_a_full_disk_while_a_checkpoint_is_replaced_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    real = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        saved(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1"
    assert steps_of(tmp_path) == [1]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, 1)
    folder.rename(folder.with_name(".replaced-step-1"))
    folder.with_name(".tmp-step-1").mkdir()
    remove_leftovers(tmp_path)
    assert latest_checkpoint(tmp_path) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["step-1"]


def test_a_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-2"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1"


def test_broken_weights_are_not_saved(tmp_path: Path) -> None:
    model, optimizer = made()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"head.weight .*step 4"):
        save_checkpoint(tmp_path, 4, model=model, optimizer=optimizer, state={}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_state_that_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    model, optimizer = made()
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 4, model=model, optimizer=optimizer, state={"loss": float("nan")}, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_killed_save_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step-1" / "old").touch()
    (folder,) = saved(tmp_path, 1)
    assert find_damage(folder) is None
    assert not (folder / "old").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_of_others_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-٣").mkdir(parents=True)  # a digit, but not one that is written here
    (tmp_path / "checkpoints" / ".tmp-step-30").touch()
    saved(tmp_path, 4, keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-٣", "step-4"}


def test_resolve_model(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 1, 2)
    plain = tmp_path / "plain"
    made()[0].save_pretrained(plain)
    assert resolve_model(tmp_path) == newer
    assert resolve_model(str(older)) == older
    assert resolve_model(plain) == plain
    assert resolve_model("openai/imagegpt-small") == "openai/imagegpt-small"
    (newer / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        resolve_model(newer)
    with pytest.warns(UserWarning, match=r"state\.json is missing"):
        assert resolve_model(tmp_path) == older
    (older / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="no COMPLETE"):
        resolve_model(older)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*step-2: state.json is missing"),
    ):
        resolve_model(tmp_path)


def test_a_killed_write_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"one")
    die = "import os, sys; os.replace = lambda *_: os._exit(9)"
    write = "from pathlib import Path; from igpt.files import write_durably; write_durably(Path(sys.argv[1]), b'two')"
    killed = subprocess.run([sys.executable, "-c", f"{die}; {write}", str(path)], timeout=60, check=False)
    assert killed.returncode == 9
    assert path.read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 2
    write_durably(path, b"three")
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def test_write_durably_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert path.read_bytes() == b"two"

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="full"):
        write_durably(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
