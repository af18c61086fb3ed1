"""All commands against hostile options, names and outputs: one line on stderr and code 2, or a result."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.checks import hints
from igpt.commands.main import COMMANDS, main
from igpt.errors import ConfigError
from igpt.plots import grids
from tests.hostile import at_most, deep_folder
from tests.models import greys, random_model

VALUES = ["nan", "inf", "-inf", "-1", "0", str(2**80), str(2**62), "1e308", "1e-320", "", "x"]
SMALL = {
    "palette": ["digits", "--uniform", "--k", "8"],
    "tokenize": ["photos:PICTURES", "--palette", "uniform:8", "--out", "t.npy"],
    "pretrain": ["tokens:TOKENS", "--out", "run", "--steps", "1", "--n-layer", "1", "--n-head", "1", "--n-embd", "4"],
    "sample": ["MODEL", "--n", "1"],
    "complete": ["MODEL", "tokens:TOKENS", "--images", "1", "--n", "1"],
    "probe": ["MODEL", "tokens:TOKENS", "--out", "probe", "--seeds", "1", "--no-raw", "--no-untrained"],
    "layouts": ["local2d:1", "--size", "4"],
    "demo": ["--out", "demo"],
    "info": [],
}
"""The smallest call of each command. Capitals stand for what the fixture `place` makes."""
LONG = {("pretrain", "steps")}
"""Options that make a run long when they are legal."""


def options_of(*kinds: type) -> Iterator[tuple[str, str]]:
    """Every option of every command that takes one of these."""
    for name in SMALL:
        options = COMMANDS[name].options
        for field in dataclasses.fields(options):
            if {*kinds} & {*_leaves(hints(options)[field.name])}:
                yield name, field.name


def _leaves(hint: Any) -> list[Any]:
    parts = typing.get_args(hint)
    return [hint] if not parts else [leaf for part in parts for leaf in _leaves(part)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, labelled tokens and pictures, all small."""
    folder = tmp_path_factory.mktemp("made")
    model = random_model(0.1, n_layer=1, n_head=1, n_embd=4, vocab_size=4, height=2, width=3)
    model.palette = greys(4)
    model.save_pretrained(folder / "MODEL")
    np.save(folder / "TOKENS.npy", np.random.default_rng(0).integers(0, 4, (20, 6)).astype(np.uint8))
    (folder / "TOKENS.json").write_text('{"height": 2, "width": 3, "vocab": 4, "classes": []}')
    np.save(folder / "TOKENS.labels.npy", np.arange(20) % 2)
    (folder / "PICTURES").mkdir()
    Image.new("RGB", (3, 2), "red").save(folder / "PICTURES" / "a.png")
    os.mkfifo(folder / "PIPE")
    (folder / "LOOP").symlink_to("LOOP")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory. A demo ends where its long part would begin."""

    def stop(*_: object) -> None:
        raise ConfigError("minutes of work begin")

    monkeypatch.setattr("igpt.commands.demo._palette", stop)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(made: Path, command: str, *more: str) -> int:
    """Run the smallest call of a command with more options."""
    words = [each.replace("TOKENS", str(made / "TOKENS.npy")) for each in SMALL[command]]
    return main(
        [command, *(each.replace("MODEL", f"{made}/MODEL").replace("PICTURES", f"{made}/PICTURES") for each in words), *more]
    )


def clean(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, or nothing."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "a fault of igpt" not in err
    return err


def test_every_numeric_option_is_attacked() -> None:
    options = list(options_of(int, float))
    assert len(options) > 50
    assert {command for command, _ in options} == {*SMALL} - {"info"}


@pytest.mark.parametrize(("command", "option"), [*options_of(int, float)])
def test_a_hostile_number_is_one_line_or_a_result(
    command: str, option: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = 0
    for value in VALUES:
        if (command, option) in LONG and value in (str(2**62), "0"):
            continue
        with at_most(20):
            code = call(made, command, f"--{option.replace('_', '-')}", value)
        line = said(capsys)
        if code == 0:
            ran += 1
        else:
            assert code == 2, (value, line)
            *before, last = line.splitlines()  # what a run says before it fails
            assert last.startswith("igpt: "), (value, line)
            assert command == "pretrain" or not before, (value, line)
        clean(place)
    assert ran <= 5, "the others are no numbers, or none that could be meant"


TEXTS = ["", "\0", "x" * 300, "x/" * 3000, os.fsdecode(b"\xff"), "a\x1b\n", "..", "~", "/dev/zero", "PIPE", "LOOP"]
TEXTS += [":", "tokens:", "tokens:PIPE", "tokens:LOOP", "tokens:/dev/zero"]


@pytest.mark.parametrize(("command", "option"), [*options_of(str, Path)])
def test_a_hostile_text_is_one_line_or_a_result(
    command: str, option: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in TEXTS:
        value = text.replace("PIPE", str(made / "PIPE")).replace("LOOP", str(made / "LOOP"))
        with at_most(20):
            code = call(made, command, f"--{option.replace('_', '-')}={value}")
        line = said(capsys)
        assert code in (0, 2), (value, line)
        assert code == 0 or line.splitlines()[-1].startswith("igpt: "), (value, line)
        clean(place)


@pytest.mark.parametrize(
    "value", ["1_0", "٣", "0x10", "--", "-inf", "1e400", " ", "\0", "🙂", "1;2", "None", "True", "1" * 5000]
)
def test_odd_spellings_of_a_number(value: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (("sample", "seed"), ("sample", "temperature")):
        assert call(made, command, f"--{option}", value) in (0, 2)
        assert said(capsys).count("\n") <= 1


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ("sample", ["--scale", "100000"], "scale must be at most 3663 for a picture of 4 x 5 pixels, got 100000"),
        ("complete", ["--scale", "100000"], "scale must be at most "),
        (
            "sample",
            ["--n", "100000000"],
            "a picture of 30,001 x 40,001 pixels is too large (at most 268,435,456): show fewer images",
        ),
        ("pretrain", ["--lr", "inf"], "lr must be a finite number above 0 and at most 1e+30, got inf"),
        ("pretrain", ["--lr", "0"], "lr must be a finite number above 0"),
        ("pretrain", ["--clip", "nan"], "clip must be a finite number of at least 0, got nan"),
        ("pretrain", ["--seed", str(2**80)], "seed must be an integer of at least 0 (64 bits)"),
        ("pretrain", ["--lr", "1e30", "--steps", "2"], "A lower --lr, a longer --warmup or --clip 1 often helps"),
        ("palette", ["--k", "1"], "k must be an integer from 2 to 65536, got 1"),
        ("tokenize", ["--palette", "fit:2"], "a"),
        (
            "tokenize",
            ["--height", "100000", "--width", "1"],
            "height must be an integer from 1 to 4096 or left out, got 100000",
        ),
    ],
)
def test_what_is_wrong_is_said(
    command: str, more: list[str], words: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(made, command, *more) == 2
    assert words in said(capsys)
    assert [path.name for path in place.rglob("*.np*")] == []


OUTPUTS = {"sample": "x.png", "complete": "x.png", "layouts": "x.png", "tokenize": "x.npy", "palette": "x", "probe": "x"}


@pytest.mark.parametrize("command", ["sample", "complete", "layouts", "tokenize"])
def test_an_output_that_is_a_link_is_written_through(command: str, made: Path, place: Path) -> None:
    """The file that it leads to is replaced, in its own folder; a link to nothing makes that file."""
    end = OUTPUTS[command][1:]
    for name, there in (("old", True), ("new", False)):
        folder = place / name
        folder.mkdir()
        target = folder / f"target{end}"
        if there:
            target.write_text("old")
        (place / f"{name}1{end}").symlink_to(target)
        (place / f"{name}2{end}").symlink_to(f"{name}1{end}")
        assert call(made, command, "--out", f"{name}2{end}") == 0
        assert (place / f"{name}2{end}").is_symlink()
        assert (place / f"{name}1{end}").is_symlink()
        assert target.stat().st_size > 50
        assert [path.name for path in folder.iterdir()] == [target.name]


@pytest.mark.parametrize("command", OUTPUTS)
def test_outputs_that_cannot_be_written_are_found_before_the_work(
    command: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for begin in ("igpt.data.open.open_source", "igpt.commands.inputs.open_model", "igpt.plots.patterns.plot_layout"):
        monkeypatch.setattr(begin, lambda *_, **__: pytest.fail("the work began"))
    out = OUTPUTS[command]
    bad = place / f"bad{Path(out).suffix}"
    is_folder = "." not in out
    os.mkfifo(place / "pipe")
    (place / "file").touch()
    (place / "null").symlink_to("/dev/null")
    (place / "loop").symlink_to("loop")
    names = ["n" * 300, f"{'d' * 300}/x", "/".join(["d" * 200] * 30)]
    for name in names:
        assert call(made, command, "--out", name + Path(out).suffix) == 2
        assert "File name too long" in said(capsys)
    for kind in ("pipe", "null", "loop", "file" if is_folder else "folder"):
        (place / "folder").mkdir(exist_ok=True)
        bad.symlink_to(place / kind)
        assert call(made, command, "--out", str(bad)) == 2
        assert said(capsys).startswith("igpt: out: "), kind
        bad.unlink()
    assert call(made, command, "--out", f"file/{out}") == 2
    assert "file is a file, a folder is wanted" in said(capsys)
    assert (place / "file").read_bytes() == b""
    assert (place / "pipe").is_fifo()


@pytest.mark.parametrize("command", OUTPUTS)
def test_long_and_odd_names(command: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = Path(OUTPUTS[command]).suffix
    spare = len(".labels.npy") if command == "tokenize" else 4
    longest = 249 if command != "tokenize" else 255 - len(".labels.npy") + len(".npy")
    for name in ("n" * (longest - len(end)), "é" * ((255 - spare) // 2), os.fsdecode(b"\xff\x1b[2J\n"), "-", " ", "a\tb"):
        assert call(made, command, f"--out={name}{end}") == 0, (name, said(capsys))
        assert (place / f"{name}{end}").exists()
        shown = capsys.readouterr().out
        assert all(one.isprintable() or one == "\n" for one in shown)
        shown.encode()


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_thousand_nested_folders(command: str, made: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with deep_folder(place, 1100) as deep:
        assert call(made, command, "--out", f"{deep}/{OUTPUTS[command]}") == 0, said(capsys)
        assert (place / deep / OUTPUTS[command]).exists()
    assert call(made, command, "--out", "/".join(["d"] * 2100) + f"/{OUTPUTS[command]}") == 2
    assert "File name too long" in said(capsys)


def test_a_run_in_a_thousand_nested_folders(made: Path, place: Path) -> None:
    with deep_folder(place, 1100) as deep:
        assert call(made, "pretrain", "--out", deep) == 0
        assert main(["sample", deep, "--n", "1"]) in (0, 2)


def test_tokens_are_kept_when_the_picture_fails(
    made: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(grids, "grid", fail)
    monkeypatch.setattr(grids, "completion_grid", fail)
    for command in ("sample", "complete"):
        assert call(made, command, "--out", f"{command}.png") == 2
        line = said(capsys)
        assert "out of memory" in line
        assert f"{command}.npy holds the tokens" in line
        assert np.load(place / f"{command}.npy").shape[-1] == 6
        assert not (place / f"{command}.png").exists()


PROGRAM = [sys.executable, "-m", "igpt"]
ROOT = str(Path(__file__).resolve().parents[3])


def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


ASCII = [
    ({"PYTHONIOENCODING": "ascii"}, ["layouts", "local2d:1", "--size", "4", "--out", "é×\x1b.png"], 0),
    ({"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ["layouts", "π\x1b"], 2),
    ({"PYTHONIOENCODING": "ascii"}, ["--help"], 0),
]


@pytest.mark.parametrize(("env", "arguments", "code"), ASCII)
def test_a_terminal_that_knows_ascii_only(env: dict[str, str], arguments: list[str], code: int, place: Path) -> None:
    done = start(arguments, env=env, cwd=place)
    out, err = done.communicate(timeout=60)
    assert done.returncode == code, err
    assert (out + err).decode("ascii").replace("\n", "").isprintable()
    assert b"Traceback" not in err


def test_an_output_that_takes_nothing_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT}
        )
    assert (done.returncode, done.stderr) == (2, b"igpt: No space left on device\n")
    closed = ["sh", "-c", f"exec {sys.executable} -m igpt --version >&- 2>&-"]
    assert subprocess.run(closed, env=os.environ | {"PYTHONPATH": ROOT}, check=False).returncode == 0


def test_an_interrupt_at_any_moment_is_code_130_without_a_traceback(place: Path) -> None:
    """Also while modules are imported, from the first of this project on."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import igpt.__main__ as program; "
        "print(1, flush=True); sys.argv = ['igpt', 'sample', 'nothing', '--out', 'x.png']; sys.exit(program.run())"
    )
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    codes = []
    for _ in range(10):
        begun = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert begun.stdout is not None
        assert begun.stdout.readline() == b"1\n"
        time.sleep(chance.uniform(0.005, 0.6))
        begun.send_signal(signal.SIGINT)
        _, err = begun.communicate(timeout=60)
        assert err in (b"igpt: interrupted\n", b""), err
        codes.append(begun.returncode)
    assert codes.count(130) >= 8
    assert {*codes} <= {130, -signal.SIGINT}
