"""The run folder: its lock, its settings, its metrics."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import filelock
import pytest

from igpt.errors import CheckpointError, ConfigError
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import (
    CHANGEABLE,
    CONFIG,
    LOCK,
    METRICS,
    SYSTEM_LOCK,
    Metrics,
    RunLock,
    continued,
    holds_run,
    read_config,
    write_config,
)


def options(**changes: Any) -> PretrainOptions:
    return PretrainOptions(**({"source": "digits", "out": Path("runs/x"), "steps": 50} | changes))


def lock_file(run: Path, **owner: Any) -> None:
    run.mkdir(exist_ok=True)
    (run / LOCK).write_text(json.dumps(owner))


def test_the_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(CheckpointError, match=f"another run .*process {os.getpid()} on {socket.gethostname()}"),
    ):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    lines = ["import sys, time", "from pathlib import Path", "from igpt.training.run_folder import RunLock"]
    lines += ["lock = RunLock(Path(sys.argv[1])).__enter__()", "print(1, flush=True)", "time.sleep(99)"]
    code = "; ".join(lines)
    root = str(Path(sys.modules["igpt"].__path__[0]).parent)
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} "):
            RunLock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 0}'])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with RunLock(tmp_path):
        pass


def test_a_folder_named_lock_is_an_error_that_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match=r"out: .*lock is no plain file; a run writes a file of its own"), RunLock(tmp_path):
        pytest.fail("entered")
    (tmp_path / "lock").rmdir()
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_is_taken_over_and_another_host_is_not(tmp_path: Path) -> None:
    lock_file(tmp_path, pid=os.getppid(), host=socket.gethostname())  # it runs, but holds no lock
    with RunLock(tmp_path):
        pass
    lock_file(tmp_path, pid=7, host="elsewhere", since="noon")
    refused = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="process 7 on elsewhere, since noon; if it is gone for good, delete"):
        refused.__enter__()
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    with RunLock(tmp_path):  # though the refused one is still in memory
        pass


def test_a_lock_file_removed_by_its_owner_locks_nobody_out_and_nobody_in(tmp_path: Path) -> None:
    """Owner and waiter race 200 times over a lock file that each owner removes; never two at once."""
    code = """
        import sys, time
        from pathlib import Path
        from igpt.errors import CheckpointError
        from igpt.training.run_folder import RunLock
        run, inside = Path(sys.argv[1]), Path(sys.argv[2])
        taken = 0
        while taken < 100:
            try:
                with RunLock(run):
                    inside.mkdir()  # fails where another process is inside
                    inside.rmdir()
                    taken += 1
            except CheckpointError:
                pass
    """
    root = str(Path(sys.modules["igpt"].__path__[0]).parent)
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(tmp_path.with_name("inside"))]
    both = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert list(tmp_path.iterdir()) == []


def test_the_file_that_is_locked_is_removed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards it may be the next owner's, who would then share the folder with whoever makes it anew."""
    there: list[bool] = []
    release = filelock.FileLock.release

    def spy(self: filelock.FileLock, force: bool = False) -> None:
        there.append((tmp_path / SYSTEM_LOCK).exists())
        release(self, force)

    monkeypatch.setattr(filelock.FileLock, "release", spy)
    with RunLock(tmp_path):
        assert (tmp_path / SYSTEM_LOCK).exists()
    assert there[:1] == [False]


def test_a_lock_that_cannot_be_written_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = RunLock(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match=r"out: cannot write into .*run: No space left on device"):
            failed.__enter__()
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run"):  # though the failed one is still in memory
        pass


def test_a_folder_made_for_a_run_that_never_began_goes_away(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "mine").mkdir()
    with RunLock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()
    with RunLock(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out: cannot write into .*file"):
        RunLock(tmp_path / "file" / "run").__enter__()


def test_holds_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert not holds_run(out, resume=False)
    out.mkdir()
    (out / LOCK).touch()
    (out / ".tmp-config.toml").touch()
    assert not holds_run(out, resume=True)
    (out / "notes.txt").touch()
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"not empty \(notes.txt\) and holds no config.toml"):
            holds_run(out, resume)
    (out / "config.toml").touch()
    with pytest.raises(ConfigError, match="already holds a run: pass --resume"):
        holds_run(out, resume=False)
    assert holds_run(out, resume=True)
    with pytest.raises(ConfigError, match=r"notes.txt is a file, a folder is wanted"):
        RunLock(out / "notes.txt").__enter__()


def test_settings_come_back_from_toml(tmp_path: Path) -> None:
    given = options(lr=0.1 + 0.2, attention=("dense", "dense"), height=8, width=8, out=tmp_path, resume=True)
    write_config(tmp_path, given)
    found = read_config(tmp_path)
    assert found == options(lr=0.1 + 0.2, attention=("dense", "dense"), height=8, width=8, out=tmp_path, resume=False)
    assert "warmup" not in (tmp_path / "config.toml").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no run folder"),
        ("steps = ", "not readable as TOML"),
        ("\udcff", "not readable as TOML"),
        ("source = 'digits'\nout = 'x'\nwings = 2", "no setting 'wings'"),
        ("out = 'x'", "source"),
        ("source = 'digits'\nout = 'x'\nsteps = 'many'", "steps must be an integer of at least 1"),
        ("source = 'digits'\nout = 'x'\nval_fraction = 'half'", "val_fraction"),
        ("source = 'digits'\nout = 'x'\nclip = 'half'", "config.toml"),
    ],
)
def test_malformed_settings_are_named(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "config.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=reason):
        read_config(tmp_path)


def test_a_resume_takes_what_is_left_out_from_the_run() -> None:
    old = options(n_layer=3, height=8, width=8, warmup=5)
    new, notes = continued(options(out=Path("moved"), resume=True), old)
    assert (new.n_layer, new.height, new.warmup, new.out, new.resume, notes) == (3, 8, 5, Path("moved"), True, [])


def test_a_resume_may_change_how_long_and_how_often() -> None:
    changes: dict[str, Any] = {
        "steps": 80,
        "accumulate": 2,
        "val_every": 3,
        "sample_every": 0,
        "samples": 4,
        "checkpoint_every": 7,
        "keep": 5,
        "log_every": 1,
        "device": "cpu",
        "kernels": "off",
        "deterministic": False,
        "bad_images": "skip",
    }
    assert {*changes, "out", "resume"} == set(CHANGEABLE), "what is computed is fixed"
    new, notes = continued(options(**changes), options())
    assert {name: getattr(new, name) for name in changes} == changes
    assert len(notes) == len(changes)
    assert notes[0] == "steps: 50 -> 80"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr": 0.1}, "lr: the run has 0.003, this command says 0.1"),
        ({"source": "photos:x"}, "source: the run has 'digits', this command says 'photos:x'"),
        ({"n_layer": 2}, "n_layer: the run has 6, this command says 2"),
        ({"attention": ("dense", "dense")}, "attention: the run has"),
        ({"seed": 1, "batch_size": 64, "keep": 3}, "batch_size: .*; seed: the run has 0, this command says 1 "),
    ],
)
def test_a_resume_may_not_change_what_is_computed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--resume cannot change .*{reason}.*it may change steps, "):
        continued(options(**changes), options(n_layer=6))


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None)
    for step in (10, 20, 30):
        metrics.write(step=step, loss=0.1 * step)
        metrics.write(step=step, val_loss=1.0)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step // 5  # seen at once
    metrics.flush_to_disk()
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20}')  # a line without its end is no line, even if it reads like one
    Metrics(tmp_path, 20).close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    Metrics(tmp_path, 20).close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], *row.keys()) for row in rows] == [
        (10, "step", "loss"),
        (10, "step", "val_loss"),
        (20, "step", "loss"),
        (20, "step", "val_loss"),
    ]
    assert rows[0]["loss"] == 0.1 * 10
    again = Metrics(tmp_path, 20, ("val_loss",))
    again.write(step=20, val_loss=2.0)
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("val_loss") for row in rows] == [None, 1.0, None, 2.0]
    Metrics(tmp_path, None).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "x"}', '{"step": Infinity}', "[" * 100_000])
def test_a_malformed_line_in_the_middle_is_named_and_kept(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(CheckpointError, match="line 2 is not a JSON object with a step"):
        Metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl"):
        Metrics(tmp_path / "gone", None)


def test_a_disk_that_refuses_leaves_the_old_settings_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_config(tmp_path, options())
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", refuse)
    for name, write in ((CONFIG, lambda: write_config(tmp_path, options(lr=0.1))), (METRICS, lambda: Metrics(tmp_path, 1))):
        with pytest.raises(CheckpointError, match=f"cannot write .*{name}: No space left on device"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_metrics_never_hold_what_json_cannot(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, None)
    with pytest.raises(ValueError, match="JSON"):
        metrics.write(step=1, loss=float("nan"))
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
