"""The linear probe: features by layer, splits, fits, baselines, and what it refuses."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.commands.probe import ProbeOptions, run_probe
from igpt.errors import ConfigError, DataError, IgptError, NonFiniteError
from igpt.evaluation import features, probe
from igpt.evaluation.probe import ProbeResult, linear_probe
from igpt.model.image_gpt import ImageGPT
from tests.fuzz import check_refusal, hostile_values
from tests.models import greys, random_model


def small(**changes: Any) -> ImageGPT:
    """2 layers, 4 x 4 pixels, 6 colours; every weight random."""
    values = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 6, "height": 4, "width": 4, **changes}
    return random_model(0.3, seed=3, **values)


def separable(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [count, 16] of three classes that use different colours, and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    return 2 * labels[:, None] + rng.integers(0, 2, (count, 16)), labels


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_features_are_those_of_the_model(batch_size: int) -> None:
    model, (tokens, _) = small(), separable(12)
    given = torch.from_numpy(tokens)
    found = features.extract(model, given, raw=True, batch_size=batch_size)
    assert found["normed"].dtype == np.float32
    assert found["normed"].shape == found["raw"].shape == (1, 3, 12, 16)
    with torch.no_grad():
        for layer in range(3):
            for name, normed in (("normed", True), ("raw", False)):
                expected = model.features(given, layer, normed=normed).numpy()
                np.testing.assert_allclose(found[name][0, layer], expected, rtol=1e-5, atol=1e-6)
    assert "raw" not in features.extract(model, given)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_after_an_error() -> None:
    model = small()
    with pytest.raises(ValueError, match="tokens"):
        features.extract(model, torch.full((2, 16), 9), raw=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not() -> None:
    model, (tokens, labels) = small(), separable(240)
    model.palette = greys(6)
    found = linear_probe(model, (tokens, labels))
    for values in (found.normed, found.raw, found.untrained):
        assert values is not None
        assert values.shape == (3, 3)
        assert values.mean() > 0.97
    assert found.pixels is not None
    assert found.pixels.mean() > 0.97
    assert found.chance == pytest.approx(1 / 3)
    assert (found.fits, found.not_converged) == (30, 0)
    shuffled = linear_probe(model, (tokens, np.random.default_rng(1).permutation(labels)), raw=False, untrained=False)
    assert abs(shuffled.normed.mean() - 1 / 3) < 0.15
    assert shuffled.pixels is not None
    assert abs(shuffled.pixels.mean() - 1 / 3) < 0.15


def test_the_answer_is_a_pure_function_of_its_arguments() -> None:
    model, (tokens, labels) = small(), separable()
    model.train()
    noisy = np.where(
        np.random.default_rng(5).random(tokens.shape) < 0.8, np.random.default_rng(6).integers(0, 6, tokens.shape), tokens
    )
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = linear_probe(model, (noisy, labels), pixels=False, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.manual_seed(2)
    again = linear_probe(model, (torch.from_numpy(noisy), torch.from_numpy(labels)), pixels=False, seed=3, batch_size=7)
    for a, b in ((first.normed, again.normed), (first.raw, again.raw), (first.untrained, again.untrained)):
        assert np.array_equal(a, b)  # type: ignore[arg-type]
    assert not np.array_equal(first.normed, first.untrained)  # type: ignore[arg-type]
    other = linear_probe(model, (noisy, labels), pixels=False, seed=30)
    assert not np.array_equal(first.normed, other.normed)
    shifted = linear_probe(model, (noisy, labels), pixels=False, seed=4, untrained=False, raw=False)
    assert np.array_equal(shifted.normed[:2], first.normed[1:])  # split s uses seed + s
    weak = linear_probe(model, (noisy, labels), pixels=False, seed=3, c=1e-6, untrained=False, raw=False)
    assert not np.array_equal(weak.normed, first.normed)


def test_untrained_baseline_has_the_weights_of_its_seed() -> None:
    model = small()
    torch.manual_seed(11)
    expected = ImageGPT(model.config).state_dict()
    fresh = probe._fresh(model, 11)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
    assert not torch.equal(fresh.wte.weight, model.wte.weight)


def test_splits_are_disjoint_complete_stratified_and_seeded() -> None:
    labels = np.repeat([0, 1, 7], [50, 31, 3])
    parts = [probe.split(labels, 0.2, seed) for seed in range(5)]
    for train, test in parts:
        assert not set(train) & set(test)
        assert sorted([*train, *test]) == list(range(84))
        assert [int((labels[test] == label).sum()) for label in (0, 1, 7)] == [10, 6, 1]
    assert len({tuple(test) for _, test in parts}) == 5
    assert np.array_equal(probe.split(labels, 0.2, 3)[1], parts[3][1])
    assert len(probe.split(labels, 0.99, 0)[0]) >= 3
    with pytest.raises(DataError, match="class 7 has a single image"):
        probe.split(np.array([0, 0, 7]), 0.5, 0)


def test_only_the_training_part_is_looked_at_before_testing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.linear_model
    import sklearn.preprocessing

    scaled: list[int] = []
    fitted: list[int] = []

    class Scaler(sklearn.preprocessing.StandardScaler):  # type: ignore[misc]
        def fit(self, x: Any, *rest: Any, **named: Any) -> Any:
            scaled.append(len(x))
            return super().fit(x, *rest, **named)

    class Regression(sklearn.linear_model.LogisticRegression):  # type: ignore[misc]
        def fit(self, x: Any, y: Any, *rest: Any) -> Any:
            fitted.append(len(x))
            return super().fit(x, y, *rest)

    monkeypatch.setattr(sklearn.preprocessing, "StandardScaler", Scaler)
    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Regression)
    found = linear_probe(small(), separable(60), pixels=False, raw=False, untrained=False, seeds=2, test_fraction=0.25)
    assert scaled == fitted == [45] * 6
    assert (found.settings["train_images"], found.settings["test_images"]) == (45, 15)


def test_a_test_set_of_its_own_is_used_once() -> None:
    model, (tokens, labels) = small(), separable(60)
    found = linear_probe(model, (tokens, labels), (tokens[:10], (labels[:10] + 1) % 3), pixels=False, seeds=5)
    assert found.normed.shape == (1, 3)
    assert found.normed.max() == 0  # the labels of the test set are all wrong on purpose
    assert (found.settings["train_images"], found.settings["test_images"], found.settings["splits"]) == (60, 10, 1)
    assert found.chance == 0.4
    with pytest.raises(ConfigError, match=r"classes that train has not: \[5\]"):
        linear_probe(model, (tokens, labels), (tokens[:2], np.array([0, 5])), pixels=False)


def test_images_and_their_tokens_give_the_same() -> None:
    model, (tokens, labels) = small(), separable(30)
    model.palette = greys(6)
    images = model.palette.decode(tokens, 4, 4)
    by_images, by_tokens = linear_probe(model, (images, labels)), linear_probe(model, (tokens, labels))
    assert np.array_equal(by_images.normed, by_tokens.normed)
    assert np.array_equal(by_images.pixels, by_tokens.pixels)  # type: ignore[arg-type]


def test_fits_that_stop_early_are_counted_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = linear_probe(small(), separable(30), pixels=False, raw=False, untrained=False)
    assert found.not_converged == found.fits == 9
    assert "9 of 9 fits did not converge" in found.table()
    assert found.as_dict()["not_converged"] == 9


def test_bert_votes_over_masks() -> None:
    model, (tokens, labels) = small(objective="bert"), separable(30)
    found = linear_probe(model, (tokens, labels), pixels=False, untrained=False)
    assert found.settings["votes"] == 5
    masks = features.vote_masks(model, 30, 0)
    assert len({mask.numpy().tobytes() for mask in masks if mask is not None}) == 5
    extracted = features.extract(model, torch.from_numpy(tokens), masks=masks)["normed"]
    with torch.no_grad():
        expected = model.features(torch.from_numpy(tokens), 1, mask=masks[3]).numpy()
    np.testing.assert_allclose(extracted[3, 1], expected, rtol=1e-5, atol=1e-6)


def test_votes_are_averaged() -> None:
    labels = np.array([0, 1] * 20 + [0, 0, 1])
    feature = np.where(labels, 1.0, -1.0).astype(np.float32)[:, None]
    votes = np.stack([feature, feature, feature])
    votes[1:, -3:] *= -0.1  # two weak votes for the wrong class lose against a sure one
    fitter = probe._Fitter(1.0, 1, False)
    train, test = np.arange(40), np.arange(40, 43)
    assert fitter._accuracy(votes, labels, train, test) == 1.0
    votes[1:, -3:] *= 9  # now they are sure
    assert fitter._accuracy(votes, labels, train, test) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": 0.0}, "^c must be"),
        ({"c": float("inf")}, "^c must be"),
        ({"test_fraction": 0.0}, "^test_fraction"),
        ({"test_fraction": 1.0}, "^test_fraction"),
        ({"seeds": 0}, "^seeds"),
        ({"seed": -1}, "^seed"),
        ({"batch_size": 0}, "^batch_size"),
        ({"pixels": True}, "pixels=True needs colours"),
        ({"train": (np.zeros((4, 4, 4, 3), np.uint8), np.arange(4) % 2)}, "has no palette"),
        (
            {"train": (np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2)},
            r"^train must be uint8 images \[N, 4, 4, 3\].*got uint8 \[4, 8",
        ),
        ({"train": (np.zeros((4, 15), np.int64), np.arange(4) % 2)}, r"integer tokens \[N, 16\]"),
        ({"train": (np.full((4, 16), 6), np.arange(4) % 2)}, "tokens from 0 to 5, got 6..6"),
        ({"train": (np.zeros((4, 16), np.int64), np.zeros(4, np.int64))}, r"at least two classes, got only \[0\]"),
        ({"train": (np.zeros((4, 16), np.int64), np.zeros(3, np.int64))}, r"labels must be integers \[4\]"),
        ({"train": (np.zeros((4, 16), np.int64), np.zeros(4))}, r"labels must be integers \[4\]"),
        ({"train": (np.zeros((4, 16), np.int64), None)}, "labels"),
        ({"train": np.zeros((4, 16), np.int64)}, "^train must be"),
        ({"test": (np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64))}, "both be images or both be tokens"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linear_probe(small(), **{"train": separable(12), "pixels": False, **changes})


def test_wrong_values_are_refused_by_name() -> None:
    """Each argument with hostile values, and pairs of them; ``seeds=2**70`` never ended."""
    tokens, labels = separable(12)
    model = small(n_layer=1)
    good: dict[str, Any] = {"model": model, "train": (tokens, labels), "test": None, "c": 1.0, "raw": False, "untrained": False}
    good |= {"pixels": False, "test_fraction": 0.3, "seeds": 1, "seed": 0, "batch_size": 64, "progress": False}
    assert check_refusal(linear_probe, good) is not None
    rng = random.Random(0)
    for name in good:
        for value in [2**70, *rng.sample(hostile_values(rng), 40)]:
            for wrong in [(value, labels), (tokens, value), value] if name in ("train", "test") else [value]:
                check_refusal(linear_probe, {**good, name: wrong})
    for _ in range(60):
        wrong = {name: rng.choice(hostile_values(rng)) for name in rng.sample(list(good), 2)}
        check_refusal(linear_probe, {**good, **wrong})


def test_features_that_are_not_finite() -> None:
    model = small()
    with torch.no_grad():
        model.wte.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="model gives NaN or infinite features"):
        linear_probe(model, separable(30), pixels=False, untrained=False)


def test_a_broken_model_is_refused() -> None:
    model = small()
    with torch.no_grad():
        model.wpe.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"wpe\.weight"):
        linear_probe(model, separable(12), pixels=False)


def test_table_and_json() -> None:
    found = ProbeResult(
        normed=np.array([[0.5, 0.75], [0.5, 0.77]]),
        raw=None,
        untrained=np.array([[0.25, 0.25], [0.25, 0.25]]),
        pixels=np.array([0.6, 0.6]),
        chance=0.125,
        settings={"c": 1.0},
        fits=10,
        not_converged=0,
    )
    assert found.best_layer == 1
    assert found.table().splitlines() == [
        "test accuracy in percent, mean ± standard deviation of 2 splits",
        "layer       layer's norm  untrained",
        "0           50.00 ± 0.00  25.00 ± 0.00",
        "1 *         76.00 ± 1.41  25.00 ± 0.00",
        "raw pixels  60.00 ± 0.00",
        "chance      12.50",
        "best: layer 1, 76.00 ± 1.41 %",
    ]
    values = json.loads(json.dumps(found.as_dict()))
    assert values["accuracy"] == {
        "normed": [[0.5, 0.75], [0.5, 0.77]],
        "raw": None,
        "untrained": [[0.25] * 2] * 2,
        "pixels": [0.6, 0.6],
    }
    assert (values["best_layer"], values["best_accuracy"]) == (1, pytest.approx(0.76))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = small(height=8, width=8)
    model.palette = greys(6)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_probe_command_on_real_digits(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "probe"
    found = run_probe(ProbeOptions(model=str(saved), source="digits", out=out, max_images=300, seeds=2, device="cpu"))
    said = capsys.readouterr().out
    assert found.table() in said
    assert "digits: 240 images to learn from, 60 to test on, 10 classes" in said
    values = json.loads((out / "probe.json").read_text())
    assert values["accuracy"]["normed"] == found.normed.tolist()
    assert values["options"]["model"] == str(saved)
    assert values["settings"]["versions"]["torch"] == torch.__version__
    assert (values["settings"]["images"], values["settings"]["first_seed"], values["settings"]["c"]) == (300, 0, 1.0)
    assert found.pixels is not None
    assert found.pixels.mean() > 0.8  # raw pixels of digits classify well, which a scrambled label order would not
    with Image.open(out / "probe.png") as picture:
        assert picture.size == (960, 600)


def test_probe_command_names_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no labels"):
        run_probe(ProbeOptions(model=str(saved), source=f"photos:{tmp_path}", out=tmp_path / "out", device="cpu"))
    (tmp_path / "file").touch()
    with pytest.raises(IgptError, match=r"out: .*file is a file, a folder is wanted"):
        run_probe(ProbeOptions(model=str(saved), source="digits", out=tmp_path / "file" / "x", device="cpu"))
