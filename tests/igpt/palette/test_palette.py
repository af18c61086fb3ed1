"""Palettes: learning, files, encoding, and what transformers makes of them."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.commands.palette import PaletteOptions, run_palette
from igpt.data.open import open_source
from igpt.data.palettes import parse_palette, sample_pixels
from igpt.errors import CheckpointError, ConfigError, DataError, IgptError
from igpt.palette.palette import Palette


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image("flower.jpg")[100:220, 150:310])


def nearest(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Brute force in float64: [...,3] -> [...]."""
    delta = pixels.reshape(-1, 1, 3).astype(np.float64) - colors
    return (delta[..., 0] ** 2 + delta[..., 1] ** 2 + delta[..., 2] ** 2).argmin(1).reshape(pixels.shape[:-1])


class TestColors:
    def test_are_on_the_grid(self) -> None:
        colors = np.random.default_rng(0).uniform(0, 255, (50, 3))
        palette = Palette(colors)
        assert palette.size == 50
        assert palette.colors.dtype == np.float64
        assert np.abs(palette.colors - colors).max() <= 2**-17
        assert (palette.colors * 65536 == np.rint(palette.colors * 65536)).all()
        with pytest.raises(ValueError, match="read-only"):
            palette.colors[0] = 0

    @pytest.mark.parametrize(
        "colors",
        [
            np.zeros((1, 3)),
            np.zeros((65537, 3)),
            np.zeros((4, 4)),
            np.zeros(6),
            np.zeros((2, 2, 3)),
            [],
            [[0, 0, 0], [math.nan, 0, 0]],
            [[0, 0, 0], [math.inf, 0, 0]],
            [[0, 0, 0], [256, 0, 0]],
            [[0, 0, 0], [-1, 0, 0]],
            [["a", "b", "c"]] * 2,
            [[0, 0, 0], [0, 0]],
            None,
            [[True, False, True]] * 2,
            [[1j, 0, 0]] * 2,
        ],
    )
    def test_refuses(self, colors: object) -> None:
        with pytest.raises(ConfigError, match="colors must"):
            Palette(colors)

    def test_table_is_built_once(self) -> None:
        palette = Palette.uniform(27)
        assert palette.table is palette.table


class TestFit:
    def test_few_colours_come_back_exactly(self) -> None:
        pixels = open_source("digits", split="all").images(np.arange(1797))
        palette = Palette.fit(pixels, 17, progress=False)
        np.testing.assert_array_equal(palette.colors, np.repeat(np.rint(np.arange(17) * 255 / 16)[:, None], 3, axis=1))
        assert palette.error(pixels) == (0.0, math.inf)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "sklearn.cluster", None)  # nothing to learn, nothing needed
            assert Palette.fit(pixels, 17).size == 17
        with pytest.raises(ConfigError, match="only 17 different colours; ask for at most 17"):
            Palette.fit(pixels, 512)

    def test_finds_the_clusters(self) -> None:
        generator = np.random.default_rng(0)
        centers = np.array([[20, 30, 40], [200, 40, 40], [60, 220, 90], [240, 240, 30], [30, 30, 230]])
        sizes = [5000, 50, 700, 300, 1000]
        pixels = np.concatenate([c + generator.integers(-6, 7, (n, 3)) for c, n in zip(centers, sizes, strict=True)]).astype(
            np.uint8
        )
        palette = Palette.fit(generator.permutation(pixels)[:, None], 5, progress=False)
        near = nearest(pixels, centers.astype(float))
        wanted = np.stack([pixels[near == i].mean(axis=0) for i in range(5)])
        light = wanted @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(palette.colors, wanted[np.argsort(light)], atol=1e-4)

    def test_sorted_from_dark_to_bright(self, photo: np.ndarray) -> None:
        palette = Palette.fit(photo, 40, progress=False)
        assert (np.diff(palette.colors @ [299, 587, 114]) >= 0).all()
        mirrored = Palette.fit(np.array([[0, 0, 0], [114, 0, 0], [0, 0, 255], [100, 50, 25], [100, 50, 25]], np.uint8), 4)
        assert mirrored.colors.tolist() == [[0, 0, 0], [0, 0, 255], [114, 0, 0], [100, 50, 25]]

    def test_is_a_function_of_its_arguments(self, photo: np.ndarray) -> None:
        one = Palette.fit(photo, 64, seed=1, progress=False)
        np.testing.assert_array_equal(one.colors, Palette.fit(photo, 64, seed=1, progress=False).colors)
        assert (one.colors != Palette.fit(photo, 64, seed=2, progress=False).colors).any()
        few = Palette.fit(photo, 64, seed=1, max_pixels=3000, progress=False)
        np.testing.assert_array_equal(few.colors, Palette.fit(photo, 64, seed=1, max_pixels=3000, progress=False).colors)
        assert (one.colors != few.colors).any()

    @pytest.mark.parametrize("repeats", [1, 50])
    def test_is_near_a_minimum(self, photo: np.ndarray, repeats: int) -> None:
        # Repeated, some colours weigh much more than others: the minimum is another one.
        pixels = np.concatenate([photo.reshape(-1, 3), *[photo[:30, :40].reshape(-1, 3)] * (repeats - 1)])
        palette = Palette.fit(pixels, 64, progress=False)
        token = nearest(pixels, palette.colors)
        means = np.stack([pixels[token == v].mean(axis=0) for v in range(64)])  # every colour is used
        before = ((pixels - palette.colors[token]) ** 2).sum(1).mean()
        after = ((pixels - means[token]) ** 2).sum(1).mean()
        assert after <= before < after * 1.005
        grid = Palette.uniform(64)
        assert palette.error(photo).psnr > grid.error(photo).psnr + 6

    def test_many_colours_are_sampled(self, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        full = Palette.fit(photo, 32, progress=False)
        monkeypatch.setattr("igpt.palette.kmeans._MAX_POINTS", 4000)
        part = Palette.fit(photo, 32, progress=False)
        assert (part.colors != full.colors).any()
        assert part.error(photo).psnr > full.error(photo).psnr - 0.5

    @pytest.mark.parametrize(
        ("images", "options", "error"),
        [
            (np.zeros((4, 3)), {}, DataError),
            (np.zeros((4, 4), np.uint8), {}, DataError),
            (np.zeros((0, 3), np.uint8), {}, DataError),
            (np.zeros((4, 3), np.uint8), {"k": 1}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"k": 65537}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"max_pixels": 0}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"seed": -1}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"k": "4"}, ConfigError),
            (np.zeros((4, 3), np.uint8), {"max_pixels": "9"}, ConfigError),
        ],
    )
    def test_refuses(self, images: np.ndarray, options: dict[str, int], error: type[Exception]) -> None:
        with pytest.raises(error):
            Palette.fit(images, **options)


class TestUniform:
    def test_512(self) -> None:
        palette = Palette.uniform(512)
        assert palette.size == 512
        levels = np.linspace(0, 255, 8)
        for r, g, b in ((0, 0, 0), (7, 7, 7), (1, 2, 3), (5, 0, 6)):
            np.testing.assert_allclose(palette.colors[(r * 8 + g) * 8 + b], [levels[r], levels[g], levels[b]], atol=2**-17)

    @pytest.mark.parametrize(
        ("k", "levels"), [(8, (2, 2, 2)), (12, (2, 3, 2)), (256, (8, 8, 4)), (24, (3, 4, 2)), (65536, (32, 64, 32))]
    )
    def test_most_even(self, k: int, levels: tuple[int, int, int]) -> None:
        palette = Palette.uniform(k)
        assert palette.size == k
        assert tuple(len(np.unique(palette.colors[:, channel])) for channel in range(3)) == levels

    @pytest.mark.parametrize(
        ("k", "near"),
        [(7, "8 and 12"), (2, "8 and 12"), (511, "510 and 512"), (-3, "8"), (65537, "65536"), ("8", "k must be an integer")],
    )
    def test_refuses(self, k: object, near: str) -> None:
        with pytest.raises(ConfigError, match=near):
            Palette.uniform(k)  # type: ignore[arg-type]


class TestEncode:
    @pytest.mark.parametrize("shape", [(5, 7, 3), (2, 4, 4, 3), (2, 3, 4, 5, 3), (0, 4, 4, 3), (1, 1, 3)])
    def test_is_the_nearest_colour(self, shape: tuple[int, ...]) -> None:
        generator = np.random.default_rng(1)
        palette = Palette(generator.uniform(0, 255, (100, 3)))
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        tokens = palette.encode(images)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (*shape[:-3], shape[-3] * shape[-2])
        if images.size:
            np.testing.assert_array_equal(tokens.numpy().reshape(shape[:-1]), nearest(images, palette.colors))
        assert torch.equal(palette.encode(torch.from_numpy(images)), tokens)

    def test_any_memory(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        palette = Palette.uniform(64)
        torch.set_warn_always(True)
        images = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
        wanted = palette.encode(images[::-1, ::2, ::-1].copy())
        assert torch.equal(palette.encode(images[::-1, ::2, ::-1]), wanted)
        np.save(tmp_path / "x.npy", images)
        assert torch.equal(palette.encode(np.load(tmp_path / "x.npy", mmap_mode="r")[::-1, ::2, ::-1]), wanted)
        assert torch.equal(palette.encode(np.load(tmp_path / "x.npy", mmap_mode="r")), palette.encode(images))
        planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        assert torch.equal(palette.encode(planes.permute(0, 2, 3, 1)), palette.encode(images))
        torch.set_warn_always(False)
        assert not recwarn

    def test_ties_take_the_lowest(self) -> None:
        palette = Palette([[9, 9, 9], [10, 0, 0], [0, 0, 0], [10, 0, 0], [0, 0, 0]])
        assert palette.encode(np.array([[[5, 0, 0], [0, 0, 0], [11, 0, 0]]], np.uint8)).tolist() == [1, 2, 1]

    @pytest.mark.parametrize(
        "images",
        [
            np.zeros((4, 4, 3)),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4, 3), np.uint8),
            torch.zeros(4, 4, 3),
            torch.zeros(4, 3).byte(),
            "x",
            None,
        ],
    )
    def test_refuses(self, images: object) -> None:
        with pytest.raises(DataError, match="images must be uint8"):
            Palette.uniform(8).encode(images)


class TestDecode:
    def test_round_trip(self) -> None:
        palette = Palette(np.random.default_rng(0).uniform(0, 255, (300, 3)))
        tokens = torch.arange(300).reshape(3, 100)
        images = palette.decode(tokens)
        assert images.shape == (3, 10, 10, 3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images.reshape(300, 3), np.rint(palette.colors))
        np.testing.assert_array_equal(palette.decode(tokens.numpy().astype(np.uint16), 20, 5), images.reshape(3, 20, 5, 3))
        exact = Palette(np.unique(np.rint(palette.colors), axis=0))
        assert torch.equal(
            exact.encode(exact.decode(torch.arange(exact.size)[None], 1, exact.size)), torch.arange(exact.size)[None]
        )

    def test_refuses(self) -> None:
        palette = Palette.uniform(8)
        for tokens, sides, error in (
            ([[0.0]], (), DataError),
            ([[8]], (), DataError),
            ([[-1]], (), DataError),
            (3, (), DataError),
            ([[0, 1]], (), ConfigError),
            ([[0, 1, 2, 3]], (3, 1), ConfigError),
            ([[0, 1, 2, 3]], (2, None), ConfigError),
            ([[0, 1, 2, 3]], (-2, -2), ConfigError),
            ([[0, 1, 2, 3]], (2.0, 2), ConfigError),
        ):
            with pytest.raises(error):
                palette.decode(np.array(tokens), *sides)


class TestError:
    def test_by_hand(self) -> None:
        palette = Palette([[0, 0, 0], [100.4, 100, 100]])
        error = palette.error(np.array([[0, 0, 3], [100, 90, 100]], np.uint8))
        assert error.mean_delta == pytest.approx(13 / 6)
        assert error.psnr == pytest.approx(10 * math.log10(255**2 / (109 / 6)))
        assert str(error) == "mean error 2.17 of 255, PSNR 35.5 dB"
        with pytest.raises(DataError):
            palette.error(np.zeros((0, 3), np.uint8))

    def test_in_parts(self, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        palette = Palette.uniform(64)
        whole = palette.error(photo)
        decoded = palette.decode(palette.encode(photo), *photo.shape[:2]).astype(float)
        assert whole.mean_delta == pytest.approx(np.abs(decoded - photo).mean())
        monkeypatch.setattr("igpt.palette.palette._CHUNK", 777)
        assert palette.error(photo) == whole
        assert palette.error(torch.from_numpy(photo)) == whole


class TestFiles:
    def test_round_trip_bit_for_bit(self, tmp_path: Path) -> None:
        for seed in range(20):
            palette = Palette(np.random.default_rng(seed).uniform(0, 255, (512, 3)))
            palette.save(tmp_path, height=24, width=32)
            for path in (tmp_path, tmp_path / "preprocessor_config.json", str(tmp_path)):
                found = Palette.from_pretrained(path)
                np.testing.assert_array_equal(found.colors, palette.colors)
                assert (found.height, found.width) == (24, 32)
        assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
        found.save(tmp_path / "new" / "deep")
        assert json.loads((tmp_path / "new" / "deep" / "preprocessor_config.json").read_text())["size"] == {
            "height": 24,
            "width": 32,
        }

    def test_size_is_optional(self, tmp_path: Path) -> None:
        Palette.uniform(8).save(tmp_path)
        values = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert values["do_resize"] is False
        assert "size" not in values
        found = Palette.from_pretrained(tmp_path)
        assert (found.height, found.width) == (None, None)
        with pytest.raises(ConfigError, match="height and width"):
            found.save(tmp_path, height=3)

    def test_original_centers(self, tmp_path: Path) -> None:
        centers = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
        np.save(tmp_path / "kmeans_centers.npy", centers)
        palette = Palette.from_pretrained(tmp_path)
        assert np.abs(palette.colors - (centers.astype(float) + 1) * 127.5).max() <= 2**-17
        np.testing.assert_array_equal(
            palette.decode(np.arange(512), 512, 1)[:, 0], np.rint(127.5 * (centers.astype(float) + 1))
        )
        np.testing.assert_array_equal(Palette.from_pretrained(tmp_path / "kmeans_centers.npy").colors, palette.colors)

    def test_old_size(self, tmp_path: Path) -> None:
        clusters = [[-1, -1.0, 0], [1, 1, 1]]
        path = tmp_path / "preprocessor_config.json"
        for size, wanted in (
            (32, (32, 32)),
            ({"height": 4, "width": 8}, (4, 8)),
            ({"shortest_edge": 4}, (None, None)),
            ("x", (None, None)),
        ):
            path.write_text(json.dumps({"clusters": clusters, "size": size}))
            palette = Palette.from_pretrained(tmp_path)
            assert (palette.height, palette.width) == wanted
        np.testing.assert_array_equal(palette.colors, [[0, 0, 127.5], [255, 255, 255]])

    def test_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Palette.uniform(8).save(tmp_path)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(DataError, match=r"preprocessor_config\.json: cannot be written .*No space left"):
            Palette.uniform(27).save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
        assert Palette.from_pretrained(tmp_path).size == 8

    def test_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Palette.uniform(27).save(tmp_path)
        asked = []

        def download(repo_id: str, filename: str) -> str:
            asked.append((repo_id, filename))
            if repo_id == "openai/gone":
                raise ConnectionError("no network")
            return str(tmp_path / filename)

        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
        assert Palette.from_pretrained("openai/imagegpt-small").size == 27
        assert asked == [("openai/imagegpt-small", "preprocessor_config.json")]
        with pytest.raises(CheckpointError, match=r"openai/gone.*no network"):
            Palette.from_pretrained("openai/gone")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match=r"pip install 'igpt-kernels\[hf\]'"):
            Palette.from_pretrained("openai/imagegpt-small")
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
        asked.clear()
        for path in ("nowhere", "./a/b", "/no/where", "a/b.json", "a/b.npy", tmp_path / "gone" / "x", ""):
            with pytest.raises(CheckpointError):
                Palette.from_pretrained(path)
        assert not asked

    def test_transformers_makes_the_same_tokens(self, tmp_path: Path, photo: np.ndarray) -> None:
        from transformers import ImageGPTImageProcessorPil

        images = photo[:96, :128].reshape(3, 32, 4, 32, 3).transpose(0, 2, 1, 3, 4).reshape(12, 32, 32, 3)
        for name, palette in (("fit", Palette.fit(photo, 200, progress=False)), ("grid", Palette.uniform(512))):
            palette.save(tmp_path / name, height=32, width=32)
            processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path / name)
            assert processor.size == {"height": 32, "width": 32}
            theirs = np.stack(processor([Image.fromarray(image) for image in images])["input_ids"])
            ours = palette.encode(images).numpy()
            pixels = images.reshape(12, 1024, 3).astype(float)
            farther = ((pixels - palette.colors[theirs]) ** 2).sum(-1) - ((pixels - palette.colors[ours]) ** 2).sum(-1)
            assert (farther >= 0).all()  # never nearer than ours
            # Theirs rounds x / 127.5 - 1 to float32: 6e-8 of 1, so squared distances of 255 ** 2 may swap within 0.02.
            assert farther.max() < 0.02
            assert (theirs != ours).mean() < 0.001
            larger = processor(Image.fromarray(photo))["input_ids"]
            assert np.asarray(larger).shape == (1, 1024)


class TestCommand:
    def test_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run_palette(PaletteOptions(source="digits", out=tmp_path / "p", k=5))
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / 'p'}: 5 colours, learned from digits; on 115,008 of its pixels: mean error ")
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["palette.png", "preprocessor_config.json"]
        assert Image.open(tmp_path / "p" / "palette.png").size[0] > 0
        palette = Palette.from_pretrained(tmp_path / "p")
        assert (palette.size, palette.height, palette.width) == (5, 8, 8)

    def test_uniform(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run_palette(PaletteOptions(uniform=True, out=tmp_path / "p", k=27, height=32, width=32))
        assert capsys.readouterr().out == f"{tmp_path / 'p'}: 27 colours, evenly spaced\n"
        assert Palette.from_pretrained(tmp_path / "p").height == 32
        run_palette(PaletteOptions(source="digits", uniform=True, out=tmp_path / "p", k=8))
        assert "evenly spaced; on 115,008 of its pixels: mean error" in capsys.readouterr().out

    def test_damaged_picture(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for i in range(4):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / "2.png").write_bytes(b"damaged")
        options = {"source": f"photos:{tmp_path}", "out": tmp_path / "p", "k": 9}
        with pytest.raises(DataError, match=r"2\.png"):
            run_palette(PaletteOptions(**options))
        assert not (tmp_path / "p").exists()
        run_palette(PaletteOptions(**options, bad_images="skip"))
        assert "1 damaged picture(s) skipped" in capsys.readouterr().out


class TestParse:
    def test_names(self, tmp_path: Path, photo: np.ndarray) -> None:
        np.testing.assert_array_equal(parse_palette("uniform:27", photo).colors, Palette.uniform(27).colors)
        fitted = Palette.fit(photo, 20, seed=3, progress=False)
        np.testing.assert_array_equal(parse_palette("fit:20", photo, seed=3, progress=False).colors, fitted.colors)
        fitted.save(tmp_path)
        np.testing.assert_array_equal(parse_palette(str(tmp_path), photo).colors, fitted.colors)
        assert parse_palette("fit:17", open_source("digits"), progress=False).size == 17

    def test_tokens_bring_their_own(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((3, 4), np.uint8))
        spec = f"tokens:{tmp_path / 'x.npy'}"
        with pytest.raises(ConfigError, match="no palette beside it"):
            parse_palette("fit:512", open_source(spec))
        about = {"height": 2, "width": 2, "vocab": 8, **Palette.uniform(8).as_dict()}
        (tmp_path / "x.json").write_text(json.dumps(about))
        assert parse_palette("fit:512", open_source(spec)).size == 8

    @pytest.mark.parametrize(
        "text",
        [
            "fit:",
            "fit:x",
            "fit:-3",
            "fit:1",
            "fit:1e3",
            "fit:99999999",
            "uniform:",
            "uniform:7",
            "fit",
            "",
            "kmeans:512",
            "fit:٣",
        ],
    )
    def test_refuses(self, text: str, photo: np.ndarray) -> None:
        with pytest.raises(IgptError):
            parse_palette(text, photo, progress=False)


class TestSamplePixels:
    def test_all_or_some(self) -> None:
        source = open_source("digits", split="all")
        assert sample_pixels(source, 10**6).shape == (1797 * 64, 3)
        some = sample_pixels(source, 20_000, seed=1)
        assert 1797 * 8 < len(some) <= 20_000
        np.testing.assert_array_equal(some, sample_pixels(source, 20_000, seed=1))
        assert (some != sample_pixels(source, 20_000, seed=2)).any()
        share = np.bincount(some[:, 0] // 16, minlength=16) / len(some)
        whole = sample_pixels(source, 10**6)[:, 0]
        np.testing.assert_allclose(share, np.bincount(whole // 16, minlength=16) / len(whole), atol=0.02)

    def test_large_sources_are_not_read_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_source("digits", split="all", height=64, width=64)
        asked: list[int] = []
        read = source.images
        monkeypatch.setattr(source, "images", lambda indices: asked.extend(indices.tolist()) or read(indices))
        monkeypatch.setattr("igpt.data.palettes._MIN_IMAGES", 16)
        assert len(sample_pixels(source, 100_000)) == 100_000
        assert len(asked) == len(set(asked)) == 25


def test_auto_takes_what_colours_there_are() -> None:
    """512, or every colour of images that have fewer."""
    few = np.array([[0, 0, 0], [9, 9, 9], [9, 9, 9], [200, 1, 7]], dtype=np.uint8)
    assert parse_palette("auto", few).size == 3
    many = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)
    assert parse_palette("auto", many, progress=False).size == 512
