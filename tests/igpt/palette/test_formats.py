"""Palette files: ours, the original centers, transformers', and damaged ones."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.errors import CheckpointError, ConfigError, DataError
from igpt.palette.palette import Palette
from tests.hostile import SECONDS, at_most
from tests.pictures import encoded, picture


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


GOOD = [[-1.0, 0.0, 1.0], [0.5, 0.5, 0.5], [0.25, -0.25, 0.0]]


BAD_PALETTES: dict[str, bytes] = {
    "empty": b"",
    "no json": b"clusters = 3",
    "cut": json.dumps({"clusters": GOOD}).encode()[:-3],
    "two values": b'{"clusters": [[0,0,0],[1,1,1]]} {}',
    "not text": b"\xff\xfe\xff",
    "pickle": pickle.dumps({"clusters": GOOD}),
    "picture": encoded("PNG", picture(4, 4)),
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "long number": b'{"clusters": [[' + b"9" * 10_000 + b",0,0],[0,0,0]]}",
    "large number": b'{"clusters": [[' + b"9" * 400 + b",0,0],[0,0,0]]}",
    "nan": b'{"clusters": [[NaN,0,0],[0,0,0]]}',
    "infinity": b'{"clusters": [[Infinity,0,0],[0,0,0]]}',
    "minus infinity": b'{"clusters": [[-Infinity,0,0],[0,0,0]]}',
    "overflow": b'{"clusters": [[1e999,0,0],[0,0,0]]}',
    "huge": b'{"clusters": [[0,0,0],[1,1,1]], "x": "' + b"x" * (33 * 2**20) + b'"}',
    **{
        f"top level {value!r:.20}": json.dumps(value).encode()
        for value in (None, 3, "text", [], [GOOD], GOOD, True, {}, {"clusters": None}, {"Clusters": GOOD}, {"size": 32})
    },
    **{
        f"clusters {value!r:.40}": json.dumps({"clusters": value}).encode()
        for value in (
            3,
            "text",
            True,
            {"0": [0, 0, 0]},
            [],
            [[]],
            [[], []],
            [[0, 0, 0]],
            [0, 0, 0],
            [[0, 0], [0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0], [0, 0]],
            [[0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0], None],
            [[0, 0, 0], "abc"],
            [[0, 0, 0], {"r": 0, "g": 0, "b": 0}],
            [[0, 0, 0], ["0", "0", "0"]],
            [[0, 0, 0], [None, 0, 0]],
            [[0, 0, 0], [True, False, True]],
            [[0, 0, 0], [[0], 0, 0]],
            [[[0, 0, 0]], [[1, 1, 1]]],
            [[0, 0, 0], 5],
            [[0, 0, 0], [0, 0, 255]],
            [[0, 0, 0], [0, -1.01, 0]],
            [[128, 128, 128], [0, 0, 0]],
            [[0, 0, 0], [1e308, 0, 0]],
            [[0, 0, 0]] * 65537,
        )
    },
    "other mean": json.dumps({"clusters": GOOD, "image_mean": [0.4, 0.5, 0.5]}).encode(),
    "other deviation": json.dumps({"clusters": GOOD, "image_std": 0.25}).encode(),
}


BAD_CENTERS = {
    "two columns": np.zeros((4, 2)),
    "four columns": np.zeros((4, 4)),
    "transposed": np.zeros((3, 512)),
    "one colour": np.zeros((1, 3)),
    "no colour": np.zeros((0, 3)),
    "too many": np.zeros((65537, 3)),
    "whole numbers": np.zeros((4, 3), np.uint8),
    "nan": np.full((4, 3), np.nan),
    "one infinity": np.array([[0.0, 0, 0], [np.inf, 0, 0]]),
    "0..255": np.full((4, 3), 100.0),
    "one dimension": np.zeros(12),
}


@pytest.mark.parametrize("name", BAD_PALETTES)
def test_malformed_palettes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(BAD_PALETTES[name])
    with at_most(SECONDS), pytest.raises(CheckpointError) as caught:
        Palette.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", BAD_CENTERS)
def test_malformed_centers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kmeans_centers.npy"
    np.save(path, BAD_CENTERS[name])
    with pytest.raises(CheckpointError) as caught:
        Palette.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_palette_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no palette"):
        Palette.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"clusters": GOOD, "image_mean": [0.5] * 3, "image_std": 0.5}))
    assert Palette.from_pretrained(tmp_path).size == 3
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a plain file"):
        Palette.from_pretrained(tmp_path)
