"""Pictures, pixel by pixel, and what the curves show."""

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

from igpt import figures
from igpt.errors import ConfigError, DataError
from igpt.figures import GAP, HIDDEN
from igpt.palette import Palette
from igpt.probe import ProbeResult


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("columns", "scale", "pad"), [(None, 3, 1), (2, 1, 0), (5, 4, 2), (9, 2, 1)])
def test_grid_pixels(columns: int | None, scale: int, pad: int) -> None:
    images = noise(5, 4, 6, 3)
    picture = np.asarray(figures.grid(images, columns=columns, scale=scale, pad=pad))
    across = {None: 3, 9: 5}.get(columns, columns)
    assert across is not None
    down = math.ceil(5 / across)
    assert picture.shape == ((down * (4 + pad) + pad) * scale, (across * (6 + pad) + pad) * scale, 3)
    seen = np.zeros(picture.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = (i // across) * (4 + pad) + pad, (i % across) * (6 + pad) + pad
        for y in range(4):
            for x in range(6):
                cell = (slice((top + y) * scale, (top + y + 1) * scale), slice((left + x) * scale, (left + x + 1) * scale))
                assert (picture[cell] == image[y, x]).all()
                seen[cell] = True
    assert (picture[~seen] == GAP).all()


@pytest.mark.parametrize(("n", "side"), [(1, 8), (16, 8), (16, 32), (64, 32), (100, 8), (9, 64), (4, 256)])
def test_grids_are_sized_for_a_page(n: int, side: int) -> None:
    picture = figures.grid(np.zeros((n, side, side, 3), np.uint8))
    assert 500 <= picture.width <= 1200


def test_completion_grid_pixels() -> None:
    originals, completions = noise(2, 8, 8, 3), noise(2, 3, 8, 8, 3, seed=1)
    mask = np.random.default_rng(2).random((2, 8, 8)) < 0.5
    picture = np.asarray(figures.completion_grid(originals, mask, completions, scale=10))
    body = picture[-190:]
    header = picture[:-190]
    assert len(header) > 15
    kept = np.where(mask[..., None], completions[:, 0], np.array(HIDDEN, np.uint8))
    rows = np.concatenate([originals[:, None], kept[:, None], completions], axis=1).reshape(10, 8, 8, 3)
    assert np.array_equal(body, np.asarray(figures.grid(rows, columns=5, scale=10)))
    shared = figures.completion_grid(originals, mask[0], completions, scale=10)
    assert np.array_equal(
        np.asarray(shared), np.asarray(figures.completion_grid(originals, mask[[0, 0]], completions, scale=10))
    )


@pytest.mark.parametrize("n", [1, 4])
def test_header_is_inside_its_strip_and_over_its_columns(n: int) -> None:
    page = np.asarray(figures.completion_grid(noise(1, 8, 8, 3), np.ones((8, 8), bool), noise(1, n, 8, 8, 3)))
    scale = page.shape[1] // ((2 + n) * 9 + 1)
    header = page[: len(page) - 10 * scale]
    ink = (header < 128).all(-1)
    assert not ink[0].any()
    assert not ink[-1].any()
    ends = [(0, 9), (9, 18), (18, 9 * (2 + n))]
    inked = np.flatnonzero(ink.any(0))
    for first, last in ends:
        inside = inked[(inked >= (first + 1) * scale) & (inked < (last + 1) * scale)]
        assert len(inside) > 20
        middle = (inside.min() + inside.max()) / 2
        assert abs(middle - (first + last + 1) * scale / 2) < 4
    assert (header[:, -scale:] == 255).all()


def test_header_is_left_out_where_nobody_could_read_it() -> None:
    picture = figures.completion_grid(noise(2, 8, 8, 3), np.ones((8, 8), bool), noise(2, 2, 8, 8, 3), scale=2)
    assert picture.size == ((4 * 9 + 1) * 2, (2 * 9 + 1) * 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.grid(np.zeros((0, 4, 4, 3), np.uint8)),
        lambda: figures.grid(np.zeros((2, 4, 4), np.uint8)),
        lambda: figures.grid(np.zeros((2, 4, 4, 3))),
        lambda: figures.grid([[1]]),  # type: ignore[arg-type]
        lambda: figures.grid(noise(2, 4, 4, 3), columns=0),
        lambda: figures.grid(noise(2, 4, 4, 3), scale=0),
        lambda: figures.grid(noise(2, 4, 4, 3), scale=1.5),  # type: ignore[arg-type]
        lambda: figures.grid(noise(2, 4, 4, 3), pad=-1),
        lambda: figures.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4), bool), noise(3, 1, 4, 4, 3)),
        lambda: figures.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4), bool), noise(2, 1, 4, 5, 3)),
        lambda: figures.completion_grid(noise(2, 4, 4, 3), np.ones((5, 4), bool), noise(2, 1, 4, 4, 3)),
        lambda: figures.completion_grid(noise(2, 4, 4, 3), np.ones((4, 4)), noise(2, 1, 4, 4, 3)),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_config_errors(call: Any) -> None:
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("size", [2, 7, 64, 512])
def test_palette_picture_shows_every_colour(size: int) -> None:
    colors = np.unique(noise(2 * size, 3), axis=0)[:size]
    picture = np.asarray(figures.palette_picture(Palette(colors)))
    shown = {tuple(color) for color in picture.reshape(-1, 3)}
    assert {tuple(color) for color in colors} <= shown
    assert shown - {tuple(color) for color in colors} <= {(255, 255, 255)}


def test_before_after_panels() -> None:
    palette, photo = Palette.uniform(27), noise(30, 40, 3)
    picture = np.asarray(figures.before_after(photo, palette, scale=5))
    body = picture[-32 * 5 :: 5, ::5]
    decoded = palette.decode(palette.encode(photo), 30, 40)
    assert np.array_equal(body[1:31, 1:41], photo)
    assert np.array_equal(body[1:31, 42:82], decoded)
    difference = np.minimum(8 * np.abs(photo.astype(int) - decoded), 255)
    assert np.array_equal(body[1:31, 83:123], difference)
    assert len(picture) > 32 * 5


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every plot made in the test."""
    found: list[Any] = []
    finish = figures._finish

    def spy(figure: Any, axes: Any, path: Path) -> None:
        found.append(axes)
        finish(figure, axes, path)

    monkeypatch.setattr(figures, "_finish", spy)
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
    figures.plot_probe(shown, tmp_path / "probe.png")
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
    figures.plot_probe(result(normed=np.array([[0.2, 0.9]]), raw=None, untrained=None, pixels=None), tmp_path / "probe.png")
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == ["after the layer's norm"]
    assert "one fit" in drawn[0].get_title()


def test_loss_plot_shows_the_rows_that_hold(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": step, "loss": 3 - step / 100, "lr": 0.1} for step in range(10, 60, 10)]
    rows += [{"step": 50, "val_loss": 2.6, "histogram_loss": 2.9}, {"step": 50, "loss": 9.0}]  # a resumed run wrote 50 again
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 60, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    figures.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
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
    figures.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    smooth = next(line for line in drawn[0].lines if "mean of" in str(line.get_label()))
    np.testing.assert_allclose(smooth.get_ydata(), 2.0 * smooth.get_xdata())  # a straight line stays where it is


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no loss"), ('{"step": 1}\n', "holds no loss"), ('nonsense\n{"step": 1, "loss": 2}', "line 1")],
)
def test_broken_metrics_are_data_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        figures.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        figures.plot_loss(tmp_path / "nothing.jsonl", tmp_path / "loss.png")


def test_import_is_light_and_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = (
        "import sys, igpt.figures as f\n"
        "assert not {'matplotlib', 'PIL', 'torch', 'sklearn'} & set(sys.modules), sys.modules.keys()\n"
        f"f.plot_loss({str(tmp_path / 'm.jsonl')!r}, {str(tmp_path / 'loss.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(figures.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
