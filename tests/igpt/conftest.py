"""What tests of several packages share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:220, 150:310])
