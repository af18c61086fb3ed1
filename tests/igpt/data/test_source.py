"""Pictures, splits, order and batches."""

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
from igpt.data.folder import FolderSource
from igpt.data.images import crop_and_resize, read_picture
from igpt.data.open import open_source
from igpt.data.orders import _permutation, order, split_indices
from igpt.data.sources import SOURCES, find, has_own_test_split
from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = Image.fromarray(noise(4, 4, seed))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures of several sizes in nested folders, and things that are none."""
    root = tmp_path / "photos"
    for i, (name, size) in enumerate(
        [
            ("b.png", (40, 60)),
            ("a.PNG", (300, 200)),
            ("sub/c.png", (224, 224)),
            ("sub/d.png", (17, 9)),
            ("z/e.png", (1, 30)),
            ("z.png", (500, 260)),
        ]
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(*size, i)).save(root / name, format="PNG")
    (root / "notes.txt").write_text("no picture")
    (root / "._b.png").write_bytes(b"left by another system")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette.uniform(64)


@pytest.fixture(scope="module")
def large_palette() -> Palette:
    return Palette.uniform(512)


def names(source: object) -> list[str]:
    assert isinstance(source, FolderSource)
    return [source.path(i).name for i in range(len(source))]


PINNED_ORDER = [4, 6, 2, 7, 3, 5, 9, 0, 8, 1, 9, 1]
PINNED_SPLIT = [0, 8, 9]


class TestOrder:
    @pytest.mark.parametrize("n", [1, 2, 7, 100])
    def test_every_epoch_is_a_permutation(self, n: int) -> None:
        draws = order(n, 3, 0, 4 * n).reshape(4, n)
        assert draws.dtype == np.int64
        assert (np.sort(draws, axis=1) == np.arange(n)).all()
        if n == 100:
            assert len({row.tobytes() for row in draws}) == 4

    def test_does_not_depend_on_the_cuts(self) -> None:
        whole = order(13, 5, 0, 100)
        cuts = np.random.default_rng(0).integers(0, 101, (200, 2))
        for first, last in np.sort(cuts, axis=1):
            np.testing.assert_array_equal(order(13, 5, first, last - first), whole[first:last])

    def test_seed_and_size_matter(self) -> None:
        assert (order(50, 0, 0, 50) != order(50, 1, 0, 50)).any()
        assert (order(50, 0, 0, 50) != order(51, 0, 0, 50)).any()

    def test_values_are_pinned(self) -> None:
        # Resuming an old run relies on these; a change here is a change of every run.
        assert order(10, 0, 0, 12).tolist() == PINNED_ORDER
        assert split_indices(10, "val", 0.3, 0).tolist() == PINNED_SPLIT

    def test_an_epoch_is_computed_once(self) -> None:
        _permutation.cache_clear()
        for step in range(20):
            order(100_003, 0, step * 128, 128)
            order(50_000, 0, step * 128, 128)
        assert _permutation.cache_info().misses == 2

    def test_answer_is_ours_to_change(self) -> None:
        first = order(10, 0, 0, 10)
        first[:] = 0
        assert order(10, 0, 0, 10).tolist() != [0] * 10

    @pytest.mark.parametrize("arguments", [(0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)])
    def test_refuses(self, arguments: tuple[int, int, int, int]) -> None:
        with pytest.raises(ConfigError, match="order needs"):
            order(*arguments)


class TestSplit:
    @pytest.mark.parametrize(("n", "fraction", "held"), [(1797, 0.1, 180), (10, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2)])
    def test_parts_are_disjoint_and_whole(self, n: int, fraction: float, held: int) -> None:
        train, val = (split_indices(n, part, fraction, 7) for part in ("train", "val"))
        assert len(val) == held
        assert sorted([*train, *val]) == list(range(n))
        assert (np.diff(train) > 0).all()
        np.testing.assert_array_equal(val, split_indices(n, "val", fraction, 7))
        np.testing.assert_array_equal(split_indices(n, "all", fraction, 7), np.arange(n))

    def test_seed_matters(self) -> None:
        assert split_indices(1000, "val", 0.1, 0).tolist() != split_indices(1000, "val", 0.1, 1).tolist()

    def test_one_image_is_for_training(self) -> None:
        assert split_indices(1, "train", 0.5, 0).tolist() == [0]
        with pytest.raises(ConfigError, match="empty"):
            split_indices(1, "val", 0.5, 0)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((5, "test", 0.1, 0), "split"),
            ((5, "val", 1.0, 0), "val_fraction"),
            ((5, "val", -0.1, 0), "val_fraction"),
            ((5, "val", 0.0, 0), "empty"),
            ((5, "val", 0.1, -1), "seed"),
        ],
    )
    def test_refuses(self, arguments: tuple[int, str, float, int], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            split_indices(*arguments)


class TestDigits:
    def test_is_the_real_thing(self) -> None:
        from sklearn.datasets import load_digits

        source = open_source("digits", split="all")
        batch = source.read(np.arange(len(source)))
        assert batch.images.shape == (1797, 8, 8, 3)
        assert batch.images.dtype == np.uint8
        assert (source.height, source.width, source.kind, source.skipped) == (8, 8, "images", 0)
        digits = load_digits()
        np.testing.assert_array_equal(batch.images[..., 0], np.rint(digits.images * 255 / 16))
        assert (batch.images == batch.images[..., :1]).all()
        np.testing.assert_array_equal(batch.labels, digits.target)
        assert source.classes == tuple("0123456789")
        assert len(np.unique(batch.images)) == 17

    def test_labels_follow_the_split(self) -> None:
        whole = open_source("digits", split="all")
        part = open_source("digits", split="val", seed=5)
        chosen = split_indices(1797, "val", 0.1, 5)
        assert len(part) == 180
        np.testing.assert_array_equal(part.labels, whole.labels[chosen])
        np.testing.assert_array_equal(part.images(np.arange(180)), whole.images(chosen))
        batch = part.read([3, 3, 0])
        np.testing.assert_array_equal(batch.labels, part.labels[[3, 3, 0]])
        np.testing.assert_array_equal(batch.indices, [3, 3, 0])

    def test_other_size(self) -> None:
        whole = open_source("digits", height=4, width=4, split="all")
        own = open_source("digits", split="all").images([0, 1]).astype(float)
        means = own.reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
        assert np.abs(whole.images([0, 1]) - means).max() <= 1.0  # Pillow rounds after the rows and again after the columns
        assert open_source("digits", height=16, width=12).images([0]).shape == (1, 16, 12, 3)

    @pytest.mark.parametrize("indices", [[-1], [1797], [0.5], [[0]], "a"])
    def test_wrong_indices(self, indices: object) -> None:
        with pytest.raises(DataError, match="indices"):
            open_source("digits", split="all").images(indices)

    def test_no_indices(self) -> None:
        assert open_source("digits").images([]).shape == (0, 8, 8, 3)


class TestFolders:
    def test_stable_order_of_real_pictures(self, photos: Path) -> None:
        source = open_source(f"photos:{photos}", height=8, width=8, split="all")
        assert names(source) == ["a.PNG", "b.png", "c.png", "d.png", "z.png", "e.png"]
        assert source.labels is None
        images = source.images(np.arange(6))
        assert images.shape == (6, 8, 8, 3)
        for i in range(6):
            np.testing.assert_array_equal(images[i], crop_and_resize(read_picture(source.path(i)), 8, 8))

    def test_classes(self, tmp_path: Path) -> None:
        for i, name in enumerate(["cat/1.png", "cat/deep/2.png", "ant/3.png", "bee/4.png"]):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(8, 8, i)).save(tmp_path / name)
        (tmp_path / "empty").mkdir()
        source = open_source(f"folder:{tmp_path}", split="all")
        assert source.classes == ("ant", "bee", "cat")
        assert source.labels.tolist() == [0, 1, 2, 2]
        assert source.labels.dtype == np.int64
        assert names(source) == ["3.png", "4.png", "1.png", "2.png"]
        assert open_source(f"photos:{tmp_path}", split="all").labels is None
        part = open_source(f"folder:{tmp_path}", split="train", val_fraction=0.5)
        assert [{"1": 2, "2": 2, "3": 0, "4": 1}[name[0]] for name in names(part)] == part.read([0, 1]).labels.tolist()

    def test_picture_beside_classes(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        for name in ("cat/a.png", "b.png"):
            Image.fromarray(noise(8, 8)).save(tmp_path / name)
        with pytest.raises(DataError, match=r"b\.png"):
            open_source(f"folder:{tmp_path}")
        (tmp_path / "cat" / "a.png").unlink()
        assert open_source(f"folder:{tmp_path}").labels is None

    def test_one_picture(self, photos: Path) -> None:
        for spec in (f"photos:{photos / 'b.png'}", str(photos / "b.png")):
            source = open_source(spec, height=4, width=6)
            assert len(source) == 1
            assert source.images([0, 0]).shape == (2, 4, 6, 3)

    def test_own_size(self, tmp_path: Path) -> None:
        pictures = [noise(5, 7, i) for i in range(3)]
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        source = open_source(f"photos:{tmp_path}", split="all")
        np.testing.assert_array_equal(source.images([2, 0, 1]), np.stack(pictures)[[2, 0, 1]])
        Image.fromarray(noise(7, 5)).save(tmp_path / "3.png")
        with pytest.raises(DataError, match=r"3\.png: 7 x 5 pixels, but .*0\.png has 5 x 7"):
            open_source(f"photos:{tmp_path}", split="all").images([3])
        skipping = open_source(f"photos:{tmp_path}", split="all", bad_images="skip")
        assert skipping.read([3]).indices.tolist() == [0]
        for seed in range(20):  # some of them hold out the odd picture alone
            assert open_source(f"photos:{tmp_path}", split="val", val_fraction=0.25, seed=seed).height == 5
        Image.fromarray(noise(7, 300)).save(tmp_path / "0.png")
        with pytest.raises(ConfigError, match="height and width"):
            open_source(f"photos:{tmp_path}", split="all")

    def test_links_in_a_ring(self, photos: Path) -> None:
        (photos / "sub" / "up").symlink_to(photos, target_is_directory=True)
        (photos / "link.png").symlink_to(photos / "b.png")
        source = open_source(f"photos:{photos}", height=4, width=4, split="all")
        assert Counter(names(source)) == Counter(["a.PNG", "b.png", "c.png", "d.png", "z.png", "e.png", "link.png"])

    def test_close_stops_threads_and_can_go_on(self, photos: Path) -> None:
        present = set(threading.enumerate())
        with open_source(f"photos:{photos}", height=4, width=4, split="all") as source:
            before = source.images(np.arange(6))
            assert set(threading.enumerate()) - present
        assert not set(threading.enumerate()) - present
        np.testing.assert_array_equal(source.images(np.arange(6)), before)
        source.close()

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
    def test_refuses_names(self, tmp_path: Path, spec: str, text: str) -> None:
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
    def test_refuses_options(self, options: dict[str, object], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            open_source("digits", **options)


class TestFit:
    def test_own_size_is_left_alone(self) -> None:
        for height, width in ((1, 1), (32, 32), (7, 3), (48, 31), (300, 260)):
            pixels = noise(height, width)
            np.testing.assert_array_equal(crop_and_resize(Image.fromarray(pixels), height, width), pixels)

    def test_paper_recipe(self) -> None:
        # 448 x 672 -> 224 x 336 -> the middle 224 -> 7 x 7 blocks averaged.
        picture = Image.fromarray(smooth(448, 672))
        middle = np.asarray(picture.resize((336, 224), Image.Resampling.BICUBIC))[:, 56:280]
        means = middle.reshape(32, 7, 32, 7, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(crop_and_resize(picture, 32, 32) - means).max() <= 1.0

    def test_small_pictures_are_cut_not_enlarged_first(self) -> None:
        pixels = noise(64, 96)
        means = pixels[:, 16:80].reshape(32, 2, 32, 2, 3).astype(float).mean(axis=(1, 3))
        assert np.abs(crop_and_resize(Image.fromarray(pixels), 32, 32) - means).max() <= 1.0

    def test_shape_of_the_cut(self) -> None:
        # Left and right quarter red, the middle blue: a tall target sees blue alone.
        pixels = np.zeros((200, 400, 3), np.uint8)
        pixels[..., 2] = 255
        pixels[:, :100] = pixels[:, 300:] = (255, 0, 0)
        tall = crop_and_resize(Image.fromarray(pixels), 32, 16)
        assert tall.shape == (32, 16, 3)
        assert (tall == (0, 0, 255)).all()
        wide = crop_and_resize(Image.fromarray(pixels), 16, 32)
        assert (wide[:, :7] == (255, 0, 0)).all()
        assert (wide[:, 9:23] == (0, 0, 255)).all()

    def test_larger_targets_than_224(self) -> None:
        assert crop_and_resize(Image.fromarray(smooth(600, 500)), 256, 256).shape == (256, 256, 3)
        assert crop_and_resize(Image.fromarray(smooth(10, 20)), 256, 300).shape == (256, 300, 3)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000), (225, 223)])
    @pytest.mark.parametrize("target", [(1, 1), (32, 32), (5, 64)])
    @pytest.mark.parametrize("crop", [False, True])
    def test_any_size(self, size: tuple[int, int], target: tuple[int, int], crop: bool) -> None:
        generator = np.random.default_rng(0) if crop else None
        assert crop_and_resize(Image.fromarray(noise(*size)), *target, generator).shape == (*target, 3)

    def test_random_crops_cover_the_recipe(self) -> None:
        # Red grows with x and green with y, so the colours of a crop tell where and how large it was.
        ramp = np.linspace(0, 255, 448).astype(np.uint8)
        pixels = np.zeros((448, 448, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = ramp[None, :], ramp[:, None]
        picture, generator = Image.fromarray(pixels), np.random.default_rng(1)
        shares, lefts, tops = [], [], []
        for _ in range(400):
            crop = crop_and_resize(picture, 16, 16, generator).astype(float)
            share = (crop[0, -1, 0] - crop[0, 0, 0]) / 255 * 16 / 15
            shares.append(share)
            free = 1 - share
            lefts.append((crop[0, 0, 0] / 255 - share / 32) / free)
            tops.append((crop[0, 0, 1] / 255 - share / 32) / free)
        assert 224 / 384 - 0.02 < min(shares) < 0.61
        assert 0.84 < max(shares) < 224 / 256 + 0.02
        for places in (lefts, tops):
            assert min(places) < 0.1
            assert max(places) > 0.9
            assert 0.42 < np.mean(places) < 0.58
        assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.15


class TestAugment:
    def test_pure_function_of_seed_and_position(self, photos: Path) -> None:
        source = open_source(f"photos:{photos}", height=16, width=16, split="all", augment=True)
        a = source.images([0, 2, 0, 5], seed=3, first=10)
        np.testing.assert_array_equal(a, source.images([0, 2, 0, 5], seed=3, first=10))
        np.testing.assert_array_equal(a[2:], source.images([0, 5], seed=3, first=12))
        assert (a[0] != a[2]).any()
        assert (a != source.images([0, 2, 0, 5], seed=4, first=10)).any()
        plain = open_source(f"photos:{photos}", height=16, width=16, split="all")
        np.testing.assert_array_equal(source.images([0, 2]), plain.images([0, 2]))
        np.testing.assert_array_equal(plain.images([0, 2], seed=3), plain.images([0, 2]))
        source.close()
        plain.close()


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


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("digits", "digits"),
        ("digits:x", None),
        ("digits:", None),
        ("photos", None),
        ("photos:", None),
        ("photos:a:b", "photos"),
        ("Photos:a", None),
        ("tokens:x.npy", "tokens"),
        ("", None),
    ],
)
def test_a_name_is_a_source_only_when_it_is_whole(name: str, scheme: str | None) -> None:
    kind = find(name)
    assert (None if kind is None else kind.scheme) == scheme


def test_what_is_special_about_each_source() -> None:
    assert {kind.scheme for kind in SOURCES if kind.crops} == {"photos", "folder"}
    assert {kind.scheme for kind in SOURCES if has_own_test_split(kind.form)} == {"cifar10", "cifar100"}
    assert not has_own_test_split("cifar10"), "no folder is named"
