"""The data of a run: palette, training and validation images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt.console import Console
from igpt.errors import ConfigError
from igpt.training.data import TrainingData
from igpt.training.options import PretrainOptions


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
