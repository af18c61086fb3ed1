"""What only a GPU can show: the same answers there. `make gpu` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import igpt
from igpt.training.options import PretrainOptions
from igpt_kernels import PaletteTable, palette_lookup

pytestmark = pytest.mark.gpu


def test_palette_agrees_with_the_cpu_on_every_colour() -> None:
    table = PaletteTable(torch.rand(512, 3, generator=torch.Generator().manual_seed(0)) * 255)
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = torch.cartesian_prod(levels, levels, levels)
    assert torch.equal(palette_lookup(pixels.cuda(), table).cpu(), palette_lookup(pixels, table))
    assert torch.equal(palette_lookup(pixels.cuda(), table, backend="torch").cpu(), palette_lookup(pixels, table))


def test_model_trains_and_samples_as_on_the_cpu(tmp_path: Path) -> None:
    from igpt.training.pretrain import pretrain

    losses = {}
    for device in ("cpu", "cuda"):
        options = PretrainOptions(
            source="digits", out=tmp_path / device, palette="fit:17", steps=20, device=device, n_embd=64, batch_size=16
        )
        losses[device] = pretrain(options, progress=False).val_loss
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    model = igpt.ImageGPT.from_pretrained(tmp_path / "cuda" / "checkpoints" / "step-20", device="cuda")
    drawn = {}
    for kernels in ("off", "auto"):
        with igpt.use_kernels(model, attention=kernels):
            drawn[kernels] = igpt.sample(model, 8, temperature=0)
    assert torch.equal(drawn["off"], drawn["auto"])
    halves = igpt.complete(model, drawn["off"], keep="rows:3")
    assert torch.equal(halves[:, 0, :24], drawn["off"][:, :24])


def test_pretraining_in_bf16(tmp_path: Path) -> None:
    from igpt.training.pretrain import pretrain

    options = PretrainOptions(
        source="digits", out=tmp_path / "run", palette="fit:17", steps=30, precision="bf16", device="cuda"
    )
    result = pretrain(options, progress=False)
    assert result.val_loss is not None
    assert result.val_loss < 2.5
