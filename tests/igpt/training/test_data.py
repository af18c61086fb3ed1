from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.console import Console
from igpt.data.histogram import histogram_baseline
from igpt.errors import ConfigError
from igpt.training.data import TrainingData
from igpt.training.options import PretrainOptions


def test_histogram_baseline_by_hand() -> None:
    train = torch.tensor([[0, 1], [0, 2], [1, 2]])
    val = torch.tensor([[0, 2], [2, 0]])
    # Add-one smoothing over 3 images and 3 colours: position 0 has 3/6, 2/6, 1/6 and position 1 has 1/6, 2/6, 3/6.
    wanted = -(math.log(3 / 6) + math.log(3 / 6) + math.log(1 / 6) + math.log(1 / 6)) / 4
    assert histogram_baseline(train, val, 3) == pytest.approx(wanted, rel=1e-12)
    assert histogram_baseline(iter([train[:1], train[1:].int()]), val.int(), 3) == pytest.approx(wanted, rel=1e-12)


def test_histogram_baseline_over_hidden_pixels_is_the_mean_over_images() -> None:
    train = torch.tensor([[0, 1], [0, 2], [1, 2]])
    val = torch.tensor([[0, 2], [2, 0], [1, 1]])
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    wanted = ((-math.log(3 / 6) - math.log(3 / 6)) / 2 - math.log(1 / 6)) / 2
    assert histogram_baseline(train, val, 3, mask=mask) == pytest.approx(wanted, rel=1e-12)


def test_histogram_baseline_in_many_parts_and_of_uniform_colours() -> None:
    generator = torch.Generator().manual_seed(0)
    train, val = (torch.randint(0, 4, (n, 5), generator=generator) for n in (4000, 700))
    assert histogram_baseline(train.split(64), val, 4) == pytest.approx(math.log(4), rel=2e-3)
    assert histogram_baseline(train, val, 4) == histogram_baseline(train.split(64), val, 4)


@pytest.mark.parametrize(
    ("train", "val", "reason"),
    [((3, 2), (3, 4), r"train_tokens must be \[n,4\]"), ((0, 2), (3, 2), "got 0 and 3"), ((3, 2), (0, 2), "got 3 and 0")],
)
def test_histogram_baseline_refuses_what_cannot_be(train: Any, val: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        histogram_baseline(torch.zeros(train, dtype=torch.int64), torch.zeros(val, dtype=torch.int64), 2)


def tokens_file(folder: Path, n: int = 40, *, colors: int = 6) -> str:
    path = folder / "tokens.npy"
    rows = np.random.default_rng(0).integers(0, colors, (n, 6), dtype=np.uint8)
    rows[0, 0] = colors - 1
    np.save(path, rows)
    return f"tokens:{path}"


def corpus(source: str, folder: Path, **changes: Any) -> TrainingData:
    settings = {"height": 2, "width": 3, "batch_size": 8, "val_images": 5} | changes
    return TrainingData(PretrainOptions(source=source, out=folder, **settings), None, Console(False))


def test_tokens_without_a_palette_have_the_colours_they_use(tmp_path: Path) -> None:
    found = corpus(tokens_file(tmp_path), tmp_path)
    assert (found.palette, found.vocab, tuple(found.val_tokens.shape)) == (None, 6, (4, 6))
    assert found.train.batch(0).shape == (8, 6)
    assert "36 training and 4 validation images" in "\n".join(found.describe())
    held = {tuple(row) for row in found.val_tokens.tolist()}
    trained = {tuple(row) for row in torch.cat([found.train.batch(step) for step in range(9)]).tolist()}
    assert len(held & trained) <= 1  # 6 tokens of 6 colours: equal rows are rare
    assert found.baseline(PretrainOptions(source="digits", out=tmp_path), None) == pytest.approx(math.log(6), rel=0.1)


def test_a_palette_for_tokens_must_have_their_colours(tmp_path: Path) -> None:
    source = tokens_file(tmp_path, colors=9)
    found = corpus(source, tmp_path, palette="uniform:27")
    assert found.palette is not None
    assert (found.palette.size, found.vocab) == (27, 27)
    with pytest.raises(ConfigError, match=r"uniform:8 has 8 colours, .* uses 9"):
        corpus(source, tmp_path, palette="uniform:8")


def test_no_held_out_images(tmp_path: Path) -> None:
    found = corpus(tokens_file(tmp_path), tmp_path, val_fraction=0.0)
    assert tuple(found.val_tokens.shape) == (0, 6)
    assert found.baseline(PretrainOptions(source="digits", out=tmp_path), None) is None
    with pytest.raises(ConfigError, match="empty"):
        corpus(tokens_file(tmp_path, n=1), tmp_path)


def test_validation_is_capped_and_the_same_each_time(tmp_path: Path) -> None:
    source = tokens_file(tmp_path, n=300)
    first, second = (corpus(source, tmp_path, val_images=7) for _ in range(2))
    assert len(first.val_tokens) == 7
    assert torch.equal(first.val_tokens, second.val_tokens)
    assert not torch.equal(first.val_tokens, corpus(source, tmp_path, val_images=7, seed=1).val_tokens)


def test_a_continued_run_takes_the_palette_of_its_checkpoint(tmp_path: Path) -> None:
    from igpt.palette.palette import Palette

    colors = np.array([[0.0, 0, 0], [255, 255, 255], [9, 9, 9]])
    Palette(colors).save(tmp_path)
    options = PretrainOptions(source="digits", out=tmp_path, palette="fit:16")
    found = TrainingData(options, tmp_path, Console(False))
    assert found.palette is not None
    assert np.array_equal(found.palette.colors, colors)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["clusters"]
