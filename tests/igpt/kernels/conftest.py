"""A model of transformers, and tokens for it. test_use.py has models of igpt under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.huggingface import make


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 16, (2, 20), generator=torch.Generator().manual_seed(0))
