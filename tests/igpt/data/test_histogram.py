"""The loss of a histogram of each position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from igpt.data.histogram import histogram_baseline
from igpt.errors import ConfigError


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
