"""Batches of tokens."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.data.array import ArraySource
from igpt.data.batches import TokenBatches
from igpt.data.images import read_picture
from igpt.data.open import open_source
from igpt.data.orders import order
from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette
from tests.pictures import noise


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette.uniform(64)


@pytest.fixture(scope="module")
def large_palette() -> Palette:
    return Palette.uniform(512)


class TestTokenBatches:
    @pytest.mark.parametrize("augment", [False, True])
    def test_same_batches_when_made_again_in_the_middle(self, photos: Path, palette: Palette, augment: bool) -> None:
        def opened() -> TokenBatches:
            source = open_source(f"photos:{photos}", height=6, width=6, split="all", augment=augment)
            return TokenBatches(source, palette, 4, seed=2)

        with opened() as whole:
            first = [whole.batch(step) for step in range(12)]
            again = [whole.batch(step) for step in (3, 4, 0, 11)]
        assert all(batch.dtype == torch.int64 and batch.shape == (4, 36) for batch in first)
        for step, batch in zip((3, 4, 0, 11), again, strict=True):
            assert torch.equal(batch, first[step])
        with opened() as resumed:
            for step in range(5, 12):
                assert torch.equal(resumed.batch(step), first[step])
        if augment:
            with open_source(f"photos:{photos}", height=6, width=6, split="all", augment=True) as source:
                crops = source.images(order(6, 2, 20, 4), seed=2, first=20)
            assert torch.equal(first[5], palette.encode(crops))
            draws = order(6, 2, 0, 48)
            rows = torch.cat(first)
            assert any(not torch.equal(rows[i], rows[j]) for i in range(24) for j in range(i) if draws[i] == draws[j])

    def test_are_the_encoded_images(self, palette: Palette) -> None:
        source = open_source("digits")
        batches = TokenBatches(source, palette, 100, seed=1)
        for step in (0, 15, 16, 40):
            indices = order(len(source), 1, step * 100, 100)
            for _ in range(2):
                assert torch.equal(batches.batch(step), palette.encode(source.images(indices)))
        assert torch.equal(batches.at([5, 5, 1616]), palette.encode(source.images([5, 5, 1616])))
        assert batches.at([]).shape == (0, 64)
        with pytest.raises(DataError, match="indices"):
            batches.at([-1])

    def test_seed_matters(self, palette: Palette) -> None:
        source = open_source("digits")
        assert not torch.equal(TokenBatches(source, palette, 8, 0).batch(0), TokenBatches(source, palette, 8, 1).batch(0))

    def test_more_than_an_epoch_in_a_batch(self, palette: Palette) -> None:
        source = ArraySource("three", np.stack([noise(2, 2, i) for i in range(3)]), None, (), None, None)
        rows = TokenBatches(source, palette, 9, 0).batch(0)
        assert torch.equal(rows[:3].sort(0).values, rows[3:6].sort(0).values)

    @pytest.mark.parametrize("limit", [0, 10**9])
    def test_kept_tokens_change_nothing(
        self, photos: Path, large_palette: Palette, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        palette = large_palette  # needs two bytes a token
        monkeypatch.setattr("igpt.data.batches.CACHE_BYTES", limit)
        with (
            open_source(f"photos:{photos}", height=6, width=6, split="all") as source,
            TokenBatches(source, palette, 4) as batches,
        ):
            assert (batches._cache is None) == (limit == 0)
            for step in range(5):
                assert torch.equal(batches.batch(step), palette.encode(source.images(order(6, 0, 4 * step, 4))))

    def test_decodes_each_picture_once(self, photos: Path, palette: Palette, monkeypatch: pytest.MonkeyPatch) -> None:
        read: Counter[str] = Counter()

        def counting(path: Path, **options: int) -> Image.Image:
            read[path.name] += 1
            return read_picture(path, **options)

        monkeypatch.setattr("igpt.data.folder.read_picture", counting)
        with (
            open_source(f"photos:{photos}", height=6, width=6, split="all") as source,
            TokenBatches(source, palette, 4) as batches,
        ):
            for step in range(10):
                batches.batch(step)
        assert set(read.values()) == {1}
        assert len(read) == 6

    def test_threads_end(self, photos: Path, palette: Palette) -> None:
        present = set(threading.enumerate())
        source = open_source(f"photos:{photos}", height=6, width=6, split="all", augment=True)
        with TokenBatches(source, palette, 4) as batches:
            batches.batch(0)
            assert [t for t in set(threading.enumerate()) - present if t.name.startswith("igpt-ahead")]
        assert not set(threading.enumerate()) - present

    def test_damage_is_reported_at_its_own_step(self, photos: Path, palette: Palette) -> None:
        (photos / "b.png").write_bytes(b"damaged")
        bad = 1  # b.png
        with (
            open_source(f"photos:{photos}", height=6, width=6, split="all") as source,
            TokenBatches(source, palette, 1) as batches,
        ):
            for step in range(6):
                if order(6, 0, step, 1)[0] == bad:
                    with pytest.raises(DataError, match=r"b\.png"):
                        batches.batch(step)
                else:
                    batches.batch(step)

    def test_refuses(self, palette: Palette) -> None:
        source = open_source("digits")
        with pytest.raises(ConfigError, match="palette"):
            TokenBatches(source, None, 4)
        with pytest.raises(ConfigError, match="batch_size"):
            TokenBatches(source, palette, 0)
        with pytest.raises(ConfigError, match="seed"):
            TokenBatches(source, palette, 1, -1)
        with pytest.raises(ConfigError, match="holds images"):
            source.tokens([0])
        with pytest.raises(ConfigError, match="holds images"):
            _ = source.vocab_size
