"""Small runs for tests: their data, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.console import Console
from igpt.model.image_gpt import ImageGPT
from igpt.training import loop
from igpt.training.checkpoint import latest_checkpoint
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import TIME_FIELDS, Place
from igpt.training.signals import Signals

PALETTE = [[-1, -1, -1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


Options = Callable[..., PretrainOptions]


def write_tokens(folder: Path) -> str:
    """The name of a source of 60 images of 3 x 4 tokens in 5 colours, each a shifted ramp: there is something to learn."""
    path = folder / "tokens.npy"
    if not path.exists():
        shift = np.random.default_rng(0).integers(0, 5, (60, 1))
        np.save(path, ((np.arange(12)[None] + shift) % 5).astype(np.uint8))
        path.with_suffix(".json").write_text(
            json.dumps({"height": 3, "width": 4, "vocab": 5, "classes": [], "clusters": PALETTE})
        )
    return f"tokens:{path}"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIME_FIELDS} for row in lines(run)]


def weights(run: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(run)
    assert newest is not None
    return dict(ImageGPT.from_pretrained(newest).state_dict())


def trainer(options: PretrainOptions) -> Any:
    options.out.mkdir()
    torch.manual_seed(options.seed)
    return loop.Trainer(options, torch.device("cpu"), Signals(), Console(False), Place(options.out), begun=False)
