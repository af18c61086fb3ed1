"""What a run reports on stderr, and columns as aligned text."""

from __future__ import annotations

import pytest

from igpt.console import Console, aligned_table


def test_the_console_logs_on_stderr_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    Console(False).log("quiet")
    Console(True).log("loud")
    with Console(True).progress(3, 0, "x", "y") as bar:
        bar.update()
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "loud\n")


def test_columns_are_aligned_and_rows_may_be_short() -> None:
    rows = [("op", "modules", "why"), ("attention", "2"), ("norm", "all", "device cpu")]
    assert aligned_table(rows) == ["op         modules  why", "attention  2", "norm       all      device cpu"]
