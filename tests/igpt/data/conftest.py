"""What tests of several data modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.pictures import smooth


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
