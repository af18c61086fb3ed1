"""Plots: what the lines show."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.errors import DataError
from igpt.evaluation.probe import ProbeResult
from igpt.plots import curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every plot made in the test."""
    found: list[Any] = []
    finish = curves._finish

    def spy(figure: Any, axes: Any, path: Path) -> None:
        found.append(axes)
        finish(figure, axes, path)

    monkeypatch.setattr(curves, "_finish", spy)
    return found


def result(**changes: Any) -> ProbeResult:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "normed": np.array([0.5, 0.7, 0.9, 0.8]) + rng.normal(0, 0.01, (3, 4)),
        "raw": np.array([0.4, 0.6, 0.8, 0.7]) + rng.normal(0, 0.01, (3, 4)),
        "untrained": np.array([0.3, 0.3, 0.3, 0.3]) + rng.normal(0, 0.01, (3, 4)),
        "pixels": np.array([0.6, 0.61, 0.62]),
        "chance": 0.1,
        "settings": {},
        "fits": 39,
        "not_converged": 0,
    }
    return ProbeResult(**{**values, **changes})


def test_probe_plot_shows_means_spreads_and_baselines(tmp_path: Path, drawn: list[Any]) -> None:
    shown = result()
    curves.plot_probe(shown, tmp_path / "probe.png")
    (axes,) = drawn
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["after the layer's norm"], 100 * shown.normed.mean(0))
    assert shown.raw is not None
    np.testing.assert_allclose(lines["raw residual stream"], 100 * shown.raw.mean(0))
    np.testing.assert_allclose(lines["raw pixels"], 61.0)
    assert "untrained model" in lines
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(100 * (shown.normed.mean(0) + shown.normed.std(0, ddof=1)).max())
    assert axes.texts[0].get_text() == f"best: layer 2, {100 * shown.normed.mean(0)[2]:.1f} %"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert axes.get_title()
    with Image.open(tmp_path / "probe.png") as picture:
        assert picture.size == (960, 600)


def test_probe_plot_without_baselines_and_with_one_split(tmp_path: Path, drawn: list[Any]) -> None:
    curves.plot_probe(result(normed=np.array([[0.2, 0.9]]), raw=None, untrained=None, pixels=None), tmp_path / "probe.png")
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == ["after the layer's norm"]
    assert "one fit" in drawn[0].get_title()


def test_loss_plot_shows_the_rows_that_hold(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": step, "loss": 3 - step / 100, "lr": 0.1} for step in range(10, 60, 10)]
    rows += [{"step": 50, "val_loss": 2.6, "histogram_loss": 2.9}, {"step": 50, "loss": 9.0}]  # a resumed run wrote 50 again
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 60, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    curves.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (axes,) = drawn
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["training"] == ([10, 20, 30, 40, 50], [2.9, 2.8, 2.7, 2.6, 9.0])
    assert lines["validation"] == ([50], [2.6])
    assert lines["histogram of each position (2.900)"][1] == [2.9, 2.9]
    assert axes.get_ylabel() == "loss (nats per pixel)"
    (right,) = axes.child_axes
    assert right.get_ylabel() == "bits per pixel"
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    assert right.get_ylim() == pytest.approx((low / math.log(2), high / math.log(2)))
    assert Image.open(tmp_path / "loss.png").size == (960, 600)


def test_long_runs_are_smoothed_in_place(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": step, "loss": 2.0 * step} for step in range(1, 401)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    smooth = next(line for line in drawn[0].lines if "mean of" in str(line.get_label()))
    np.testing.assert_allclose(smooth.get_ydata(), 2.0 * smooth.get_xdata())  # a straight line stays where it is


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no loss"),
        ('{"step": 1}\n', "holds no loss"),
        ('nonsense\n{"step": 1, "loss": 2}', "line 1"),
        ('{"step": 1, "loss": "2"}\n', "loss of step 1 must be a number, got 2"),
        ('{"step": 1, "val_loss": [2]}\n', r"val_loss of step 1 must be a number, got \[2\]"),
        ('{"step": 1, "loss": NaN}\n', "loss of step 1 must be a number, got nan"),
        ('{"step": 1, "loss": 1%s}\n' % ("0" * 400), "loss of step 1 must be a number, got 1000"),
        ('{"step": 1e40, "loss": 1}\n{}', "line 1"),
        ('{"step": true, "loss": 1}\n{}', "line 1"),
    ],
)
def test_broken_metrics_are_data_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        curves.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        curves.plot_loss(tmp_path / "nothing.jsonl", tmp_path / "loss.png")


def test_import_is_light_and_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = (
        "import sys, igpt.plots.curves as f\n"
        "assert not {'matplotlib', 'PIL', 'torch', 'sklearn'} & set(sys.modules), sys.modules.keys()\n"
        f"f.plot_loss({str(tmp_path / 'm.jsonl')!r}, {str(tmp_path / 'loss.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(curves.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
