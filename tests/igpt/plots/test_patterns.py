"""Models with sparse patterns, and the command that draws a pattern."""

from __future__ import annotations

import copy
import json
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt.commands.main import main
from igpt.commands.probe import ProbeOptions, run_probe
from igpt.errors import ConfigError
from igpt.model.config import ImageGPTConfig
from igpt.plots import patterns
from igpt.plots.patterns import block_view, pixel_view, reach
from igpt.training.options import PretrainOptions
from igpt.training.pretrain import pretrain
from igpt_kernels import layouts

PATTERNS: list[str | tuple[str, ...]] = [
    ("local2d:2", "column"),
    ("strided", "dense"),
    ("fixed:4,2",),
    "row_column",
    ("local2d:1+column&row_column",),
]


def model_of(attention: str | tuple[str, ...], objective: str = "ar") -> igpt.ImageGPT:
    torch.manual_seed(0)
    config = ImageGPTConfig(3, 2, 32, 16, height=6, width=8, attention=attention, objective=objective)  # type: ignore[arg-type]
    model = igpt.ImageGPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("attention", PATTERNS, ids=str)
def test_kernels_agree_with_the_dense_mask(attention: str | tuple[str, ...], objective: str) -> None:
    model = model_of(attention, objective)
    tokens = torch.randint(0, 16, (2, 48), generator=torch.Generator().manual_seed(1))
    more = {} if objective == "ar" else {"mask": torch.rand(2, 48, generator=torch.Generator().manual_seed(2)) < 0.2}
    plain = model(tokens, tokens, **more).loss
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    for backend in ("torch", "reference", "auto"):
        with igpt.use_kernels(model, attention=backend) as report:
            loss = model(tokens, tokens, **more).loss
            found = torch.autograd.grad(loss, list(model.parameters()))
            assert report.calls("attention") == 3
        torch.testing.assert_close(loss, plain)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("attention", PATTERNS, ids=str)
def test_decoding_with_a_cache_is_the_whole_model(attention: str | tuple[str, ...], kernels: str) -> None:
    model = model_of(attention)
    tokens = torch.randint(0, 16, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), igpt.use_kernels(model, attention=kernels):
        whole = model(tokens).logits
        assert whole is not None
        cache = model.new_cache(2)
        torch.testing.assert_close(model.decode(tokens[:, :10], cache), whole[:, 10], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.decode(tokens[:, 10:14], cache), whole[:, 14], atol=1e-5, rtol=1e-4)
        for i in range(14, 47):
            logits = model.decode(tokens[:, i : i + 1], cache)
            torch.testing.assert_close(logits, whole[:, i + 1], atol=1e-5, rtol=1e-4)
        short = model(tokens[:, :20]).logits
        torch.testing.assert_close(short, whole[:, :20], atol=1e-5, rtol=1e-4)


def test_a_layer_has_the_pattern_of_its_turn() -> None:
    found = [block.attn.layout for block in model_of(("local2d:2", "dense")).blocks]  # type: ignore[union-attr]
    assert found == [layouts.local2d(6, 8, 2), None, layouts.local2d(6, 8, 2)]
    assert model_of("column", "bert").blocks[0].attn.layout == layouts.column(6, 8, causal=False)  # type: ignore[union-attr]


def test_a_pixel_that_is_not_seen_changes_nothing() -> None:
    model = model_of("row")
    tokens = torch.randint(0, 16, (1, 48), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 16  # the input of position 4, in the first row
    with torch.no_grad():
        change = (model(tokens).logits - model(other).logits).abs().sum(-1)[0]
    assert (change > 0).nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.slow
def test_models_with_patterns_can_be_copied_compiled_and_saved(tmp_path: Path) -> None:
    model = model_of(("local2d:2", "strided"))
    tokens = torch.randint(0, 16, (2, 48))
    wanted = model(tokens).logits
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(tokens).logits, wanted)
    model.save_pretrained(tmp_path)
    again = igpt.ImageGPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens).logits, wanted)
    with igpt.use_kernels(model):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(tokens).logits, wanted, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_bad_patterns_are_named() -> None:
    for attention, words in (
        ("sparkle", "attention: .*sparkle"),
        ("fixed:4,9", "attention: .*c must be at most"),
        (("dense", 3), r"attention must be .*got \('dense', 3\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            ImageGPTConfig(2, 2, 32, 16, height=6, width=8, attention=attention)  # type: ignore[arg-type]


@pytest.mark.slow
def test_training_sampling_and_probing(tmp_path: Path) -> None:
    """The whole job on real digits with patterns, with kernels and without: the same losses."""
    curves = []
    for kernels in ("auto", "off"):
        options = PretrainOptions(
            source="digits", out=tmp_path / kernels, n_layer=2, n_head=2, n_embd=32, steps=30, batch_size=16, sample_every=0,
            attention=("local2d:2", "row_column"), kernels=kernels,  # type: ignore[arg-type]
        )  # fmt: skip
        pretrain(options, progress=False)
        rows = [json.loads(line) for line in (tmp_path / kernels / "metrics.jsonl").read_text().splitlines()]
        curves.append([row["loss"] for row in rows if "loss" in row])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    assert curves[0][-1] < curves[0][0]
    model = igpt.ImageGPT.from_pretrained(tmp_path / "auto" / "checkpoints" / "step-30")
    assert model.config.attention == ("local2d:2", "row_column")
    with igpt.use_kernels(model):
        fast = igpt.sample(model, 4, seed=3)
    assert torch.equal(fast, igpt.sample(model, 4, seed=3))
    probe = ProbeOptions(
        model=str(tmp_path / "auto"), source="digits", out=tmp_path / "probe", max_images=200, seeds=1, untrained=False
    )
    assert run_probe(probe).normed.shape[1] == 3


def test_views_of_a_pattern() -> None:
    layout = layouts.local2d(6, 8, 1)
    view = pixel_view(layout, 3 * 8 + 4)
    assert view[3].tolist() == [0, 0, 0, 2, 3, 1, 1, 1]
    assert view[2].tolist() == [0, 0, 0, 2, 2, 2, 0, 0]
    assert (view[4:] == 1).all()
    (lists,) = layouts.dense(32, 8).block_lists(64, 64)
    assert block_view(lists).tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]


def test_a_dot_of_a_large_image_shows_the_fullest_of_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    (lists,) = layouts.dense(40, 8).block_lists(64, 64)  # 5 x 5 tiles
    monkeypatch.setattr(patterns, "FINEST", 3)
    assert block_view(lists).tolist() == [[2, 0, 0], [2, 2, 0], [2, 2, 1]]
    monkeypatch.undo()
    (lists,) = layouts.parse("local2d:1", 2048, 2048).block_lists()  # 65,536 x 65,536 tiles took 32 GiB
    view = block_view(lists)
    assert view.shape == (1024, 1024)
    assert view.any(1).all()


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        ("local2d:7", "local2d:7", 48.3),
        ("row", "column", 53.1),
        ("row_column", "row_column", 53.1),
        ("strided", "strided", 100.0),
        ("fixed", "fixed", 100.0),
        ("row", "fixed", 100.0),
        ("column", "strided", 100.0),
        ("local2d:7", "row_column", 54.5),
        ("local2d:7", "strided", 67.1),
    ],
)
def test_what_two_layers_reach_as_the_documentation_says(first: str, second: str, share: float) -> None:
    found = reach(layouts.parse(first, 32, 32), layouts.parse(second, 32, 32))
    assert round(100 * found, 1) == share
    text = (Path(__file__).resolve().parents[3] / "docs" / "patterns.md").read_text(encoding="utf-8")
    assert f"| `{first}` | `{second}` | {share} % |" in text


@pytest.mark.slow
def test_the_command_draws_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "picture.png"
    assert main(["layouts", "local2d:3+column", "--size", "24", "--out", str(out)]) == 0
    text = capsys.readouterr()
    printed = text.out + text.err
    layout = layouts.parse("local2d:3+column", 24, 24)
    assert f"{layout.pairs:,} visible pairs" in printed
    assert f"{layout.density:.4f}" in printed
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 4
    assert main(["layouts", "row", "--height", "8", "--width", "16", "--no-causal", "--pixel", "2,3", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sparkle"], "pattern must be of dense"),
        (["row", "--pixel", "99,1"], "pixel must lie in the 64 x 64 image"),
        (["row", "--pixel", "middle"], "pixel must be ROW,COLUMN"),
        (["row", "--size", "0"], "size"),
        (["row", "--then", "sparkle"], "sparkle"),
    ],
)
def test_the_command_names_what_is_wrong(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    out.write_bytes(b"mine")
    assert main(["layouts", *arguments, "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


def test_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four million tokens: before, the picture of the tiles alone took 34 GB."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    main(["layouts", "local2d:7", "--size", "2048"])
    assert Image.open("layout.png").size[0] > 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # KiB


@pytest.mark.parametrize("text", ["dense", "local2d:400", "strided:1", "fixed:1,1"])
def test_what_is_too_large_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"layout of 4,194,304 tokens: for .* pairs of tiles must be looked at"):
        layouts.parse(text, 2048, 2048).block_lists()
