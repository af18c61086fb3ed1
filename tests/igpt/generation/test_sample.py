"""Drawing and completing: against a slow oracle, the exact distribution, and the promises about seeds and masks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt.commands.complete import CompleteOptions, run_complete
from igpt.commands.sample import SampleOptions, run_sample
from igpt.errors import ConfigError, DataError, IgptError, NonFiniteError
from igpt.generation.sample import complete, keep_mask, sample
from igpt.generation.sampler import exponential_noise, stream
from igpt.model.image_gpt import ImageGPT
from tests.models import greys, random_model


def small(**changes: Any) -> ImageGPT:
    """2 layers, 4 x 6 pixels, 7 colours; every weight random, so that the colours are far from equally likely."""
    values = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 7, "height": 4, "width": 6, **changes}
    return random_model(0.5, seed=3, **values)


def oracle(
    model: ImageGPT, given: torch.Tensor, kept: np.ndarray, key: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    """One image [T] by a whole forward pass for every pixel, and a loop over colours for the first to arrive."""
    tokens = given.clone()
    for position in np.flatnonzero(~kept):
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, position].double().numpy()
        weights = np.exp(logits / temperature)
        times = exponential_noise(torch.tensor([stream(*key)]), int(position), len(weights))[0].tolist()
        tokens[position] = min(range(len(weights)), key=lambda color: times[color] / weights[color])
    return tokens


def test_sample_is_what_a_full_forward_pass_for_each_pixel_draws() -> None:
    model = small()
    drawn = sample(model, 4, seed=5, batch_size=3)
    nothing = np.zeros(24, bool)
    expected = [oracle(model, torch.zeros(24, dtype=torch.int64), nothing, (5, i)) for i in range(4)]
    assert torch.equal(drawn, torch.stack(expected))
    assert drawn.dtype == torch.int64
    assert not drawn.is_inference()  # or training on samples would fail


def test_temperature_divides_the_logits() -> None:
    model, nothing = small(), np.zeros(24, bool)
    expected = oracle(model, torch.zeros(24, dtype=torch.int64), nothing, (1, 0), temperature=2.5)
    assert torch.equal(sample(model, 1, seed=1, temperature=2.5)[0], expected)


def test_images_depend_on_seed_and_index_alone() -> None:
    model = small()
    whole = sample(model, 9, seed=2, batch_size=64)
    for batch_size in (1, 2, 5):
        assert torch.equal(sample(model, 9, seed=2, batch_size=batch_size), whole)
    assert torch.equal(sample(model, 4, seed=2), whole[:4])
    assert not torch.equal(sample(model, 9, seed=3), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 9


def test_completions_depend_on_seed_image_and_number_alone() -> None:
    model = small()
    given = torch.randint(0, 7, (3, 24), generator=torch.Generator().manual_seed(0))
    whole = complete(model, given, n=4, seed=2)
    assert torch.equal(complete(model, given, n=4, seed=2, batch_size=1), whole)
    assert torch.equal(complete(model, given, n=4, seed=2, batch_size=5), whole)
    assert torch.equal(complete(model, given[:2], n=3, seed=2), whole[:2, :3])


def test_greedy_is_the_argmax_of_the_full_forward_pass() -> None:
    model = small()
    drawn = sample(model, 2, temperature=0)
    with torch.no_grad():
        assert torch.equal(model(drawn).logits.argmax(-1), drawn)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(sample(model, 2, temperature=1e-300), drawn)


def test_one_colour_to_choose_from_is_greedy() -> None:
    model = small()
    greedy = sample(model, 3, temperature=0)
    assert torch.equal(sample(model, 3, top_k=1), greedy)
    assert torch.equal(sample(model, 3, top_p=1e-9), greedy)
    fresh = ImageGPT(model.config)  # zero head: all colours tie, and the lowest wins
    assert torch.equal(sample(fresh, 2, top_k=1), torch.zeros(2, 24, dtype=torch.int64))
    assert sample(fresh, 20, top_k=3).unique().tolist() == [0, 1, 2]


def test_images_come_with_the_probability_that_the_model_gives_them() -> None:
    model = small(n_layer=1, vocab_size=3, height=2, width=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.no_grad():
        logs = model(every).logits.double().log_softmax(-1).gather(-1, every[..., None])[..., 0]
    probability = logs.sum(1).exp().numpy()
    assert probability.sum() == pytest.approx(1)
    n = 20_000
    drawn = sample(model, n, seed=0, batch_size=n)
    counts = np.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1).numpy(), minlength=81)
    often = n * probability >= 5
    observed, expected = [*counts[often], counts[~often].sum()], [*n * probability[often], n * probability[~often].sum()]
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(observed) - 1
    assert freedom > 20
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)  # 4 standard deviations of chi-square


MASKS = {
    "top-half": "top-half",
    "rows": "rows:3",
    "pixels": "pixels:7",
    "nothing": "pixels:0",
    "all but the last": "pixels:23",
    "scattered": np.random.default_rng(0).random((4, 6)) < 0.5,
    "flat": np.random.default_rng(1).random(24) < 0.3,
    "bottom": np.arange(24) >= 12,
}


@pytest.mark.parametrize("keep", MASKS.values(), ids=MASKS)
def test_completion_keeps_what_is_kept_and_draws_the_rest_in_order(keep: Any) -> None:
    model = small()
    given = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(4))
    kept = keep_mask(keep, 4, 6)
    done = complete(model, given, keep, n=2, seed=7)
    assert done.shape == (2, 2, 24)
    assert torch.equal(done[:, :, kept], given[:, None, kept].expand(2, 2, -1))
    for i, j in itertools.product(range(2), range(2)):
        assert torch.equal(done[i, j], oracle(model, given[i], kept, (7, i, j)))


def test_kept_beginning_is_fed_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = small(), []
    original = ImageGPT.decode

    def spy(self: ImageGPT, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return original(self, tokens, cache)

    monkeypatch.setattr(ImageGPT, "decode", spy)
    mask = np.zeros(24, bool)
    mask[:12] = mask[15:20] = mask[22:] = True
    complete(model, torch.zeros(24, dtype=torch.int64), mask)
    assert lengths == [12, 1, 1, 6, 1]  # the kept end is never fed


def test_keep_words() -> None:
    assert keep_mask("top-half", 5, 3).sum() == 6
    assert keep_mask("rows:1", 5, 3).tolist() == [True] * 3 + [False] * 12
    assert keep_mask("pixels:4", 5, 3).tolist() == [True] * 4 + [False] * 11
    assert keep_mask("rows:5", 5, 3).all()
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert np.array_equal(keep_mask(mask, 5, 3), mask.flatten().numpy())


def test_everything_kept_comes_back_and_the_input_is_not_touched() -> None:
    model = small()
    given = np.full((2, 24), 3, np.uint8)
    done = complete(model, given, np.ones(24, bool))
    assert (done == 3).all()
    done[:] = 0
    assert (given == 3).all()


def test_images_are_encoded_with_the_palette() -> None:
    model = small()
    model.palette = greys(7)
    tokens = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(0))
    images = model.palette.decode(tokens, 4, 6)
    assert torch.equal(complete(model, images, seed=1), complete(model, tokens, seed=1))
    assert torch.equal(complete(model, images[0], seed=1), complete(model, tokens[0], seed=1))
    assert torch.equal(complete(model, torch.from_numpy(images), seed=1), complete(model, tokens, seed=1))


def test_model_and_global_random_state_are_left_alone() -> None:
    model = small().train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(0)
    np.random.seed(0)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    sample(model, 2)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # type: ignore[index]
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_kernels_draw_the_same_images() -> None:
    model = small()
    plain = sample(model, 4, seed=1)
    with igpt.use_kernels(model):
        assert torch.equal(sample(model, 4, seed=1), plain)


@pytest.mark.parametrize("name", ["wte.weight", "blocks.1.fc.weight", "sos"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_refused_by_name_before_drawing(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = value
    monkeypatch.setattr(ImageGPT, "decode", lambda *_: pytest.fail("drew from a broken model"))
    with pytest.raises(NonFiniteError, match=rf"^{name} holds 1 NaN or infinite"):
        sample(model, 1)


def test_overflowing_logits_are_refused() -> None:
    model = small()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="logits"):
        sample(model, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 2.0}, "n must be an integer"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 8}, "top_k must be from 1 to the model's 7 colours"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(small(), **{"n": 1, **changes})
    with pytest.raises(ConfigError, match=message):
        complete(small(), torch.zeros(1, 24, dtype=torch.int64), **{"n": 1, **changes})


@pytest.mark.parametrize(
    "keep",
    ["bottom", "rows:", "rows:5", "rows:-1", "pixels:25", "rows:x", "rows:²", np.ones(24), np.ones((6, 4), bool)],
    ids=str,
)
def test_wrong_masks_are_named(keep: Any) -> None:
    with pytest.raises(ConfigError, match=r"^keep must be"):
        complete(small(), torch.zeros(1, 24, dtype=torch.int64), keep)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 4, 6, 3), np.uint8), "the model has no palette"),
        (np.zeros((1, 6, 4, 3), np.uint8), r"uint8 \[N, 4, 6, 3\]"),
        (np.zeros((1, 4, 6, 3), np.float32), r"uint8 \[N, 4, 6, 3\]"),
        (np.zeros((0, 4, 6, 3), np.uint8), r"uint8 \[N, 4, 6, 3\]"),
        (np.zeros((1, 23), np.int64), r"integers \[N, 24\]"),
        (np.zeros((1, 24), np.float32), r"integers \[N, 24\]"),
        (np.zeros((0, 24), np.int64), r"integers \[N, 24\]"),
        (np.full((1, 24), 7), "tokens from 0 to 6, got 7..7"),
        (np.full((1, 24), -1), "tokens from 0 to 6"),
    ],
)
def test_wrong_inputs_are_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(small(), given)


@pytest.mark.parametrize("draw", [sample, complete])
def test_what_is_no_model_is_named(draw: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an igpt\.ImageGPT, got str"):
        draw("runs/digits", 1)


def test_bert_models_cannot_draw() -> None:
    model = small(objective="bert")
    with pytest.raises(ConfigError, match="'bert'"):
        sample(model, 1)
    with pytest.raises(ConfigError, match="'bert'"):
        complete(model, torch.zeros(1, 24, dtype=torch.int64))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small(height=8, width=8)
    model.palette = greys(7)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sample_command_writes_grid_tokens_and_settings(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder" / "grid.png"
    options = SampleOptions(model=str(saved), out=out, n=5, seed=4, top_k=3, scale=2, device="cpu")
    assert run_sample(options) == out
    said = capsys.readouterr().out
    assert str(out) in said
    assert "5 images in" in said
    tokens = np.load(out.with_suffix(".npy"), allow_pickle=False)
    assert (tokens.dtype, tokens.shape) == (np.uint8, (5, 64))
    model = ImageGPT.from_pretrained(saved)
    assert np.array_equal(tokens, sample(model, 5, seed=4, top_k=3).numpy())
    with Image.open(out) as picture:
        assert model.palette is not None
        pixels = np.asarray(picture)
        assert np.array_equal(pixels[2:18:2, 2:18:2], model.palette.decode(tokens[0], 8, 8))
        settings = json.loads(picture.text["igpt.settings"])  # type: ignore[attr-defined]
        assert json.loads(picture.text["igpt.model"])["n_embd"] == 16  # type: ignore[attr-defined]
    assert {"seed": 4, "top_k": 3, "n": 5, "model": str(saved), "device": "cpu"}.items() <= settings.items()
    assert settings["versions"]["igpt"] == igpt.__version__


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_complete_command_writes_originals_and_completions(saved: Path, tmp_path: Path, kernels: Any) -> None:
    mask = np.random.default_rng(0).random((8, 8)) < 0.6
    np.save(tmp_path / "mask.npy", mask)
    out = tmp_path / "done.png"
    options = CompleteOptions(
        model=str(saved),
        source="digits",
        out=out,
        images=3,
        n=2,
        keep=str(tmp_path / "mask.npy"),
        scale=10,
        device="cpu",
        kernels=kernels,
    )
    run_complete(options)
    tokens = np.load(out.with_suffix(".npy"), allow_pickle=False)
    assert tokens.shape == (3, 2, 64)
    assert (tokens[:, 0, mask.ravel()] == tokens[:, 1, mask.ravel()]).all()
    with Image.open(out) as picture:
        pixels = np.asarray(picture)
    body = pixels[-(3 * 9 + 1) * 10 :: 10, ::10]  # below the header, one pixel for each image pixel
    palette = greys(7)
    assert np.array_equal(body[1:9, 19:27], palette.decode(tokens[0, 0], 8, 8))
    original = body[1:9, 1:9]
    assert np.array_equal(palette.encode(np.ascontiguousarray(original)).numpy()[mask.ravel()], tokens[0, 0, mask.ravel()])


def test_complete_command_takes_tokens_and_pictures(saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.full((4, 64), 5, np.uint8))
    options = {"model": str(saved), "out": tmp_path / "x.png", "keep": "rows:2", "device": "cpu"}
    run_complete(CompleteOptions(source=f"tokens:{tmp_path / 't.npy'}", **options))  # type: ignore[arg-type]
    assert (np.load(tmp_path / "x.npy")[..., :16] == 5).all()
    Image.new("RGB", (30, 20), "white").save(tmp_path / "white.png")
    run_complete(CompleteOptions(source=str(tmp_path / "white.png"), **options))  # type: ignore[arg-type]
    tokens = np.load(tmp_path / "x.npy")
    assert tokens.shape == (1, 3, 64)
    assert (tokens[..., :16] == 6).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("x.jpg")}, "out must end in .png"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "teapot"}, "device must be auto, cpu, cuda or cuda:N, got 'teapot'"),
        ({"scale": 0}, "scale"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
    ],
    ids=str,
)
def test_sample_command_refuses_before_it_draws(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("igpt.generation.sample.sample", lambda *_, **__: pytest.fail("drew"))
    with pytest.raises(IgptError, match=message):
        run_sample(SampleOptions(**{"model": str(saved), "out": tmp_path / "x.png", **changes}))
    assert not (tmp_path / "x.png").exists()


def test_the_tokens_beside_the_picture_are_checked_too(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igpt.generation.sample.sample", lambda *_, **__: pytest.fail("drew"))
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(ConfigError, match=r"out: .*x\.npy is a folder, a file is wanted"):
        run_sample(SampleOptions(model=str(saved), out=tmp_path / "x.png", device="cpu"))


def test_a_picture_beyond_memory_loses_no_tokens(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 2.73 TiB")

    monkeypatch.setattr("igpt.plots.grids.grid", beyond)
    with pytest.raises(IgptError, match=r"out of memory: .*x\.npy holds the tokens that were drawn"):
        run_sample(SampleOptions(model=str(saved), out=tmp_path / "x.png", n=2, device="cpu"))
    assert np.load(tmp_path / "x.npy").shape == (2, 64)
    assert not (tmp_path / "x.png").exists()


def test_commands_need_a_palette(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="no palette"):
        run_sample(SampleOptions(model=str(tmp_path / "bare"), out=tmp_path / "x.png", device="cpu"))


def test_a_mask_file_must_be_booleans(saved: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.ones((8, 8)))
    with pytest.raises(DataError, match=r"mask\.npy"):
        run_complete(
            CompleteOptions(
                model=str(saved), source="digits", out=tmp_path / "x.png", keep=str(tmp_path / "mask.npy"), device="cpu"
            )
        )
