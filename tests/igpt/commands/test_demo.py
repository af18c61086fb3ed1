"""The demo end to end, at a hundredth of its length, and its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from igpt.commands import info
from igpt.commands.demo import DemoOptions, run_demo
from igpt.errors import CheckpointError, ConfigError
from igpt.plots.page import Section, page
from igpt.training.run_folder import RunLock


@pytest.mark.slow
def test_demo_writes_one_page_with_everything_in_it(tmp_path: Path) -> None:
    report = run_demo(DemoOptions(out=tmp_path / "demo", steps=12))
    text = report.read_text(encoding="utf-8")
    assert report == tmp_path / "demo" / "report.html"
    assert len(re.findall(r'src="data:image/png;base64,', text)) == text.count("<img") >= 5
    for words in ("bits per pixel", "histogram", "Best layer", "igpt complete", "64×64"):
        assert words in text
    # Again into the same folder: the demo's own files may be replaced.
    assert (tmp_path / "demo" / "run" / "metrics.jsonl").exists()


def test_demo_touches_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no demo wrote"):
        run_demo(DemoOptions(out=tmp_path, steps=12))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_demo_leaves_the_run_of_the_first_alone(tmp_path: Path) -> None:
    (tmp_path / ".igpt-demo").touch()
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "metrics.jsonl").write_text("mine")
        with pytest.raises(CheckpointError, match=r"another run is writing into .*run: process"):
            run_demo(DemoOptions(out=tmp_path, steps=12))
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == "mine"


def test_page_escapes_what_is_not_its_own(tmp_path: Path) -> None:
    text = page("a < b", [Section("<i>", "igpt <x>", "plain", table="1 < 2")], ["h & h"], 1.0, info.collect())
    for raw in ("a < b", "<i>", "<x>", "1 < 2", "h & h"):
        assert raw not in text
