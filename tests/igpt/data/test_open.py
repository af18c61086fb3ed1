"""Opening a source by name: wrong names and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from igpt.data.open import open_source
from igpt.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("hf:cifar10", "unknown data source 'hf:cifar10'; known are digits, photos:DIR"),
        ("nonsense", "known are"),
        ("", "known are"),
        ("photos:", "photos:PATH"),
        ("tokens", "tokens:PATH"),
        ("{}", "photos:"),
        ("photos:{}/none", "no such folder"),
        ("folder:{}", "no pictures"),
    ],
)
def test_refuses_names(tmp_path: Path, spec: str, text: str) -> None:
    with pytest.raises((ConfigError, DataError), match=text):
        open_source(spec.format(tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"height": 8}, "both height and width"),
        ({"height": 0, "width": 8}, "height must be"),
        ({"height": 8, "width": 5000}, "width must be"),
        ({"height": "8", "width": 8}, "height must be"),
        ({"height": 8, "width": 8.5}, "width must be"),
        ({"val_fraction": "half"}, "val_fraction must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"bad_images": "drop"}, "bad_images"),
        ({"max_bad": -1}, "max_bad"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"augment": True}, "augment"),
        ({"split": "test"}, "split"),
        ({"val_fraction": 2.0}, "val_fraction"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refuses_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        open_source("digits", **options)
