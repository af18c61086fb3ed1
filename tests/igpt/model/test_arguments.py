"""Every refusal of the public functions of models, palettes and drawing names an argument; what is right in kind is taken."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from torch import Tensor

import igpt
from igpt.errors import IgptError
from igpt.generation.sample import keep_mask
from igpt.model.image_gpt import ImageGPT, ImageGPTOutput
from igpt.palette.palette import Palette, QuantizationError
from tests.fuzz import check_refusal, hostile_values
from tests.models import greys, random_model

CALLS = int(os.environ.get("IGPT_FUZZ_CALLS", "400"))
SIZES: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 5, "height": 2, "width": 3}
TOKENS = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 3), dtype=np.uint8)


def small(**changes: Any) -> ImageGPT:
    model = random_model(0.3, **{**SIZES, **changes})
    model.palette = greys(5)
    return model


def has(kind: type, *shape: int | None) -> Callable[[Any], bool]:
    """Whether a result is of a kind, and of a shape where one is given (None: any size)."""

    def holds(result: Any) -> bool:
        fits = not shape or all(
            wanted in (None, size) for wanted, size in zip(shape, result.shape, strict=len(shape) == result.ndim)
        )
        return isinstance(result, kind) and fits

    return holds


def functions() -> list[tuple[Callable[..., Any], dict[str, Any], Callable[[Any], bool]]]:
    """Public functions, arguments that are right, and whether a result is right."""
    model, bert, palette = small(), small(objective="bert"), greys(5)
    mask = TOKENS > 2
    drawing = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0, "batch_size": 4, "progress": False}
    forward = {"tokens": TOKENS, "targets": TOKENS, "mask": None, "generator": None}
    fit = {"images": IMAGES, "k": 3, "max_pixels": 100, "seed": 0, "progress": False}
    return [
        (model.forward, forward, has(ImageGPTOutput)),
        (model.forward, forward, has(ImageGPTOutput)),
        (bert.forward, forward | {"mask": mask, "generator": torch.Generator()}, has(ImageGPTOutput)),
        (model.features, {"tokens": TOKENS, "layer": 1, "normed": True, "mask": None}, has(Tensor)),
        (bert.features, {"tokens": TOKENS, "layer": None, "normed": False, "mask": mask}, has(Tensor)),
        (model.new_cache, {"batch_size": 2, "max_length": 3}, lambda cache: len(cache.keys) == 1),
        (lambda_decode(model), {"tokens": TOKENS[:, :2], "cache": model.new_cache(2)}, has(Tensor, None, 5)),
        (bert.draw_mask, {"batch_size": 2, "generator": None}, has(Tensor, None, 6)),
        (model.save_pretrained, {"folder": "saved"}, lambda result: result is None),
        (ImageGPT.from_pretrained, {"source": "model", "device": "cpu"}, has(ImageGPT)),
        (ImageGPT, {"config": model.config}, has(ImageGPT)),
        (igpt.ImageGPTConfig, dict(vars(model.config)), has(igpt.ImageGPTConfig)),
        (igpt.ImageGPTConfig, dict(vars(model.config)), has(igpt.ImageGPTConfig)),
        (igpt.ImageGPTConfig.from_dict, {"values": dict(vars(model.config))}, has(igpt.ImageGPTConfig)),
        (igpt.preset, {"name": "tiny", "height": 4, "bias": True}, has(igpt.ImageGPTConfig)),
        (igpt.sample, {"model": model, "n": 2, **drawing}, has(Tensor, None, 6)),
        (igpt.sample, {"model": model, "n": 2, **drawing}, has(Tensor, None, 6)),
        (igpt.complete, {"model": model, "images_or_tokens": TOKENS, "keep": "rows:1", "n": 1, **drawing}, has(Tensor)),
        (igpt.complete, {"model": model, "images_or_tokens": IMAGES, "keep": "top-half", "n": 1, **drawing}, has(Tensor)),
        (keep_mask, {"keep": "rows:1", "height": 2, "width": 3}, has(np.ndarray, None)),
        (Palette, {"colors": palette.colors, "height": 2, "width": 3}, has(Palette)),
        (Palette.fit, fit, has(Palette)),
        (Palette.fit, fit, has(Palette)),
        (Palette.uniform, {"k": 8}, has(Palette)),
        (Palette.from_pretrained, {"path": "model"}, has(Palette)),
        (palette.save, {"folder": "saved", "height": 2, "width": 3}, lambda result: result is None),
        (palette.as_dict, {"height": 2, "width": 3}, has(dict)),
        (palette.encode, {"images": IMAGES}, has(Tensor)),
        (palette.decode, {"tokens": TOKENS, "height": 2, "width": 3}, has(np.ndarray)),
        (palette.error, {"images": IMAGES}, has(QuantizationError)),
    ]


def lambda_decode(model: ImageGPT) -> Callable[..., Any]:
    """`model.decode` with a cache that is empty again before each call."""

    def decode(tokens: Any, cache: Any) -> Any:
        if hasattr(cache, "length"):
            cache.length = 0
        return model.decode(tokens, cache)

    decode.__module__ = "igpt.model.image_gpt"
    return decode


def test_refusals_name_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    small().save_pretrained("model")
    rng = random.Random(0)
    known = functions()
    taken, trouble = 0, []
    for number in range(CALLS):
        function, valid, right = known[number % len(known)]
        values = hostile_values(rng)
        changed = rng.sample(sorted(valid), min(len(valid), rng.choice((1, 1, 1, 2))))
        arguments = {**valid, **{name: rng.choice(values) for name in changed}}
        try:
            result = check_refusal(function, arguments)
        except AssertionError as error:
            trouble.append(f"call {number}: {error}")
            continue
        if result is not None:
            taken += 1
            if not right(result):
                trouble.append(f"call {number}: {function.__qualname__} gave {type(result).__name__} for {changed}")
    assert not trouble, f"{len(trouble)} of {CALLS} calls:\n" + "\n".join(trouble[:40])
    assert 0 < taken < CALLS / 2


def test_right_arguments_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small().save_pretrained("model")
    for function, valid, right in functions():
        assert right(check_refusal(function, valid)), function


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint32])
def test_integers_of_any_dtype_are_tokens(dtype: torch.dtype) -> None:
    model, bert, mask = small(), small(objective="bert"), TOKENS > 2
    tokens = TOKENS.to(dtype)
    for kernels in ("off", "torch"):
        with igpt.use_kernels(loss=kernels):
            assert torch.equal(model(tokens).logits, model(TOKENS).logits)
            assert torch.equal(model(tokens, tokens).loss, model(TOKENS, TOKENS).loss)
            assert torch.equal(model(TOKENS, tokens).loss, model(TOKENS, TOKENS.clone()).loss)
            assert torch.equal(bert(tokens, tokens, mask=mask).loss, bert(TOKENS, TOKENS, mask=mask).loss)
    assert torch.equal(model.features(tokens), model.features(TOKENS))
    decoded = model.decode(tokens[:, :5], model.new_cache(2))
    assert torch.equal(decoded, model.decode(TOKENS[:, :5], model.new_cache(2)))
    assert (model.palette.decode(tokens, 2, 3) == model.palette.decode(TOKENS, 2, 3)).all()


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor, np.array])
def test_numbers_of_other_libraries_are_numbers(kind: Callable[[int], Any]) -> None:
    model = small()
    config = igpt.ImageGPTConfig(**{name: kind(value) for name, value in SIZES.items()})
    assert config == model.config
    assert all(type(getattr(config, name)) is int for name in SIZES)
    drawn = igpt.sample(model, kind(2), seed=kind(3), top_k=kind(2), batch_size=kind(1))
    assert torch.equal(drawn, igpt.sample(model, 2, seed=3, top_k=2))
    assert torch.equal(model.features(TOKENS, kind(1)), model.features(TOKENS, 1))
    assert model.new_cache(kind(2), kind(3)).max_length == 3
    assert model.palette.decode(TOKENS, kind(2), kind(3)).shape == (2, 2, 3, 3)
    assert Palette.fit(IMAGES, kind(3), seed=kind(0), max_pixels=kind(9), progress=False).size == 3
    assert Palette.uniform(kind(8)).size == 8
    palette = Palette(model.palette.colors, height=kind(2), width=kind(3))
    assert (type(palette.height), palette.height, palette.width) == (int, 2, 3)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, torch.tensor])
def test_fractions_of_other_libraries_are_numbers(kind: Callable[[float], Any]) -> None:
    config = igpt.ImageGPTConfig(**SIZES, mask_rate=kind(0.25))
    assert type(config.mask_rate) is float
    assert config.mask_rate == 0.25
    model = small()
    drawn = igpt.sample(model, 1, temperature=kind(0.5), top_p=kind(0.5))
    assert torch.equal(drawn, igpt.sample(model, 1, temperature=0.5, top_p=0.5))


def test_tokens_whose_memory_was_freed_are_refused() -> None:
    tokens = TOKENS.clone()
    tokens.untyped_storage().resize_(0)
    for call in (small().forward, small().features):
        with pytest.raises(IgptError, match=r"tokens must hold values, got .* whose memory was freed"):
            call(tokens)
