"""Opening a source by name: wrong names and options."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data.batches import TokenBatches
from igpt.data.images import crop_and_resize, read_picture
from igpt.data.open import open_source
from igpt.data.orders import split_indices
from igpt.errors import ConfigError, DataError
from tests.fuzz import check_refusal, hostile_values
from tests.pictures import noise


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


@pytest.mark.parametrize("spec", ["photos:a\0b", "photos:~no-user-of-that-name/x", "x" * 5000, "photos:" + "x" * 5000])
def test_refuses_paths_that_are_none(spec: str) -> None:
    with pytest.raises((ConfigError, DataError), match=r"spec|xxx") as caught:
        open_source(spec)
    assert str(caught.value).isprintable()


def test_wrong_values_are_refused_by_name(tmp_path: Path) -> None:
    """Each argument with each hostile value, and pairs of them."""
    Image.fromarray(noise(9, 9)).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", np.zeros((4, 16), np.uint8))
    options: dict[str, object] = {"height": 8, "width": 8, "split": "all", "val_fraction": 0.1, "seed": 0, "augment": False}
    options |= {"bad_images": "raise", "max_bad": 3, "max_pixels": 1000}
    with open_source(f"photos:{tmp_path}", height=8, width=8, split="all") as pictures:
        tokens = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        calls: list[tuple[Callable[..., object], dict[str, object]]] = [
            (open_source, {"spec": "digits", **options}),
            (open_source, {"spec": f"photos:{tmp_path}", **options}),
            (pictures.read, {"indices": [0, 0], "seed": 1, "first": 0}),
            (open_source("digits").read, {"indices": [0, 0], "seed": 1, "first": 0}),
            (tokens.tokens, {"indices": [0, 3]}),
            (split_indices, {"n": 9, "split": "val", "val_fraction": 0.2, "seed": 0}),
            (TokenBatches, {"source": tokens, "palette": None, "batch_size": 2, "seed": 0}),
            (TokenBatches(tokens, None, 2).batch, {"step": 1}),
            (TokenBatches(tokens, None, 2).at, {"indices": [1]}),
            (read_picture, {"path": tmp_path / "x.png", "max_pixels": 100}),
            (crop_and_resize, {"picture": Image.new("RGB", (9, 9)), "height": 4, "width": 4, "crop": None}),
        ]
        rng = random.Random(0)
        for function, good in calls:
            assert check_refusal(function, good) is not None
            for name in good:
                for value in rng.sample(hostile_values(rng), 25):
                    check_refusal(function, {**good, name: value})
            for _ in range(8):
                wrong = {name: rng.choice(hostile_values(rng)) for name in rng.sample(list(good), min(2, len(good)))}
                check_refusal(function, {**good, **wrong})


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
