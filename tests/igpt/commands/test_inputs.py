"""Which images the commands are given: held-out ones, each once, in the model's size and colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igpt.commands import inputs
from igpt.commands.complete import CompleteOptions
from igpt.commands.probe import ProbeOptions
from igpt.commands.tokenize import TokenizeOptions, run_tokenize
from igpt.data.open import open_source
from igpt.errors import ConfigError, DataError
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from igpt.palette.palette import Palette
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import write_config


def model(side: int = 8) -> ImageGPT:
    made = ImageGPT(ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8, height=side, width=side))
    made.palette = Palette.uniform(8)
    return made


def rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("below", [".", "checkpoints/step-10"])
def test_completions_of_a_run_use_what_it_held_out(tmp_path: Path, below: str) -> None:
    write_config(tmp_path, PretrainOptions(source="digits", out=tmp_path, seed=3, val_fraction=0.05))
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    given = inputs.images_to_complete(CompleteOptions(model=str(tmp_path / below), source="digits", images=500), model())
    held_out = open_source("digits", split="val", val_fraction=0.05, seed=3)
    assert len(given) == len(held_out) == 90
    assert rows(given) == rows(held_out.images(np.arange(90)))


def test_completions_of_any_other_model_use_the_whole_source(tmp_path: Path) -> None:
    write_config(tmp_path, PretrainOptions(source="photos:elsewhere", out=tmp_path))
    for name in (str(tmp_path), "some/hub-id"):
        assert len(inputs.images_to_complete(CompleteOptions(model=name, source="digits", images=5000), model())) == 1797
    few = [
        inputs.images_to_complete(CompleteOptions(model="x", source="digits", images=6, seed=seed), model())
        for seed in (0, 0, 1)
    ]
    assert few[0].shape == (6, 8, 8, 3)
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])


def test_tokens_of_another_palette_are_refused(tmp_path: Path) -> None:
    for name, palette in (("same", Palette.uniform(8)), ("other", Palette(np.arange(24).reshape(8, 3)))):
        palette.save(tmp_path / name)
        run_tokenize(TokenizeOptions(source="digits", palette=str(tmp_path / name), out=tmp_path / f"{name}.npy"))
    options: Any = {"model": "x", "images": 2}
    tokens = inputs.images_to_complete(CompleteOptions(source=f"tokens:{tmp_path / 'same.npy'}", **options), model())
    assert (tokens.dtype, tokens.shape) == (np.int64, (2, 64))
    with pytest.raises(ConfigError, match="another palette"):
        inputs.images_to_complete(CompleteOptions(source=f"tokens:{tmp_path / 'other.npy'}", **options), model())


def folder(root: Path, good: int = 6) -> None:
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i in range(good):
            pixels = np.random.default_rng([i, len(name), ord(name[0])]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
        (root / name / "5.png").write_bytes(b"damaged")  # the next readable picture is in the other class


def test_no_image_is_probed_twice_where_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    folder(tmp_path)
    options = ProbeOptions(model="x", source=f"folder:{tmp_path}", bad_images="skip")
    (images, labels), test = inputs.images_to_probe(options, model())
    assert test is None
    assert len(images) == len(rows(images)) == len(labels) == 10
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5
    cats = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "cats").glob("[!5].png")}
    assert rows(images[labels == 0]) == cats
    with pytest.raises(DataError, match=r"5\.png"):
        inputs.images_to_probe(ProbeOptions(model="x", source=f"folder:{tmp_path}"), model())


def cifar10(root: Path) -> None:
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = np.random.default_rng(len(name) + int(name[-5]) if name[-5].isdigit() else 99).integers(
            0, 256, (10_000, 3073), dtype=np.uint8
        )
        records[:, 0] = np.arange(10_000) % 10
        records.tofile(root / name)


def test_a_source_with_a_test_part_is_tested_on_it(tmp_path: Path) -> None:
    cifar10(tmp_path)
    options = ProbeOptions(model="x", source=f"cifar10:{tmp_path}", max_images=50)
    (images, labels), test = inputs.images_to_probe(options, model(32))
    assert test is not None
    assert images.shape == (40, 32, 32, 3)
    assert test[0].shape == (10, 32, 32, 3)
    own = open_source(options.source, split="val")
    every = {image.tobytes(): int(label) for image, label in zip(own.images(np.arange(10_000)), own.labels, strict=True)}  # type: ignore[arg-type]
    assert all(every[image.tobytes()] == label for image, label in zip(*test, strict=True))
    assert not rows(images) & every.keys()
    assert labels.shape == (40,)


def test_a_source_without_labels_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((4, 64), np.uint8))
    with pytest.raises(DataError, match="has no labels"):
        inputs.images_to_probe(ProbeOptions(model="x", source=f"tokens:{tmp_path / 't.npy'}"), model())
