"""What a run reports on stderr, and columns as aligned text."""

from __future__ import annotations

import io
import sys

import pytest

from igpt.console import Console, aligned_table, gibibytes, one_line, printable, say


def test_the_console_logs_on_stderr_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    Console(False).log("quiet")
    Console(True).log("loud")
    with Console(True).progress(3, 0, "x", "y") as bar:
        bar.update()
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "loud\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [True, False])
def test_bars_are_for_terminals_and_go_away(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    console = Console(wanted)
    assert not console.is_interactive, "stderr of a test is no terminal"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert console.is_interactive == wanted
    with console.progress(10, 4, "training", "step") as bar:
        bar.update()
        assert ("training" in terminal.getvalue()) == wanted
        assert ("4/10" in terminal.getvalue()) == wanted
    assert terminal.getvalue().rpartition("\r")[0].endswith(" " * 10 if wanted else ""), "the bar is wiped out"


def test_columns_are_aligned_and_rows_may_be_short() -> None:
    rows = [("op", "modules", "why"), ("attention", "2"), ("norm", "all", "device cpu")]
    assert aligned_table(rows) == ["op         modules  why", "attention  2", "norm       all      device cpu"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é × 漢 🙂", "plain é × 漢 🙂"),
        ("\x1b[2J\r\x07\x00\x7f\x9b", r"\x1b[2J\r\x07\x00\x7f\x9b"),
        ("a\u202eb\u2066\u200b", r"a\u202eb\u2066\u200b"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("two\nlines\t", "two\nlines\\t"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    assert one_line(text) == shown.replace("\n", r"\n")
    say(text)
    Console(True).log(text)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


def test_bytes_in_words() -> None:
    assert [gibibytes(size) for size in (0, 2**20, 2**28, 5 * 2**40)] == ["0.0 MiB", "1.0 MiB", "0.2 GiB", "5,120.0 GiB"]
