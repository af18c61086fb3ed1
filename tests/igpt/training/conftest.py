"""The short run that tests of training change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from igpt.training.options import PretrainOptions
from tests.runs import Options, write_tokens


@pytest.fixture
def options(tmp_path: Path) -> Options:
    source = write_tokens(tmp_path)

    def build(name: str = "run", **changes: Any) -> PretrainOptions:
        settings: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "steps": 6, "batch_size": 8, "log_every": 1}
        settings |= {"val_every": 3, "sample_every": 0, "checkpoint_every": 3, "lr": 0.01, "warmup": 2}
        return PretrainOptions(**({"source": source, "out": tmp_path / name} | settings | changes))

    return build
