"""`igpt tokenize`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.commands.tokenize import TokenizeOptions, run_tokenize
from igpt.data.open import open_source
from igpt.data.tokens import TokenSource
from igpt.errors import ConfigError, DataError
from igpt.palette.palette import Palette


class TestTokenize:
    def test_round_trip(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "digits.npy"
        assert run_tokenize(TokenizeOptions("digits", "fit:17", out)) == out
        assert "1,797 images of 8 x 8 in 17 colours, 0.1 MB; mean error 0.00 of 255, PSNR inf dB" in capsys.readouterr().out
        assert sorted(path.name for path in out.parent.iterdir()) == ["digits.json", "digits.labels.npy", "digits.npy"]
        stored, pixels = open_source(f"tokens:{out}", split="all"), open_source("digits", split="all")
        assert isinstance(stored, TokenSource)
        assert np.load(out).dtype == np.uint8
        assert (stored.height, stored.width, stored.vocab_size, stored.classes) == (8, 8, 17, pixels.classes)
        np.testing.assert_array_equal(stored.labels, pixels.labels)
        palette = stored.palette
        assert palette is not None
        everything = np.arange(1797)
        np.testing.assert_array_equal(palette.decode(stored.tokens(everything)), pixels.images(everything))
        np.testing.assert_array_equal(Palette.from_pretrained(tmp_path / "new" / "digits.json").colors, palette.colors)
        part = open_source(f"tokens:{out}", split="val", seed=4)
        np.testing.assert_array_equal(part.labels, open_source("digits", split="val", seed=4).labels)

    def test_damaged_images_have_no_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = tmp_path / "in"
        for i in range(12):
            (root / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), 20 * i, np.uint8)).save(root / f"{i % 2}" / f"{i:02}.png")
        (root / "0" / "04.png").write_bytes(b"damaged")
        (root / "1" / "11.png").write_bytes(b"damaged")
        Palette.uniform(512).save(tmp_path / "palette")
        options = TokenizeOptions(f"folder:{root}", str(tmp_path / "palette"), tmp_path / "x.npy", height=4, width=4)
        np.save(tmp_path / "x.npy", np.zeros((1, 1), int))
        with pytest.raises(DataError, match=r"04\.png"):
            run_tokenize(options)
        assert np.load(tmp_path / "x.npy").shape == (1, 1)
        assert not list(tmp_path.glob(".*"))
        run_tokenize(TokenizeOptions(**{**vars(options), "bad_images": "skip"}))
        assert "2 damaged skipped" in capsys.readouterr().out
        stored = np.load(tmp_path / "x.npy")
        assert stored.shape == (10, 16)
        assert stored.dtype == np.uint16
        source = open_source(f"tokens:{tmp_path / 'x.npy'}", split="all")
        assert source.labels.tolist() == [0] * 5 + [1] * 5
        greys = np.array([20 * i for i in (0, 2, 6, 8, 10, 1, 3, 5, 7, 9)])
        np.testing.assert_array_equal(stored[:, 0], np.rint(greys * 7 / 255) * 73)

    def test_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="out must end"):
            run_tokenize(TokenizeOptions("digits", "uniform:8", tmp_path / "x.bin"))
        np.save(tmp_path / "x.npy", np.zeros((3, 4), int))
        with pytest.raises(ConfigError, match="tokens already"):
            run_tokenize(TokenizeOptions(f"tokens:{tmp_path / 'x.npy'}", "uniform:8", tmp_path / "y.npy"))
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="file is a file, a folder is wanted"):
            run_tokenize(TokenizeOptions("digits", "uniform:8", tmp_path / "file" / "x.npy"))
