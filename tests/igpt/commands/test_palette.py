"""`igpt palette`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.commands.palette import PaletteOptions, run_palette
from igpt.errors import DataError
from igpt.palette.palette import Palette


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
