"""The source ``digits``: scikit-learn's 1,797 real digits of 8 x 8 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from igpt.data.array import ArraySource
from igpt.errors import import_extra

if TYPE_CHECKING:
    from igpt.data.open import Request


def open_digits(request: Request) -> ArraySource:
    """The digits, grey 0..255 as RGB, with their classes."""
    digits = import_extra("sklearn.datasets", "eval").load_digits()
    grey = np.rint(np.asarray(digits.images) * (255.0 / 16.0)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    labels = np.asarray(digits.target, dtype=np.int64)
    chosen = request.chosen(len(pixels))
    classes = tuple(str(name) for name in digits.target_names)
    return ArraySource(request.spec, pixels[chosen], labels[chosen], classes, request.height, request.width)
