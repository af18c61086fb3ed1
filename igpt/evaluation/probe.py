"""How well each layer classifies: logistic regression on mean-pooled features (Chen et al. 2020, section 2.4).

Protocol, fixed: features as `ImageGPT.features` gives them, in float32; every feature is standardised with the mean and
deviation of the training part (scikit-learn's StandardScaler); multinomial logistic regression by L-BFGS, at most 1000
iterations, tolerance 1e-4, L2 strength 1/c; accuracy on the test part. The training and test parts of seed s are drawn
with ``numpy.random.default_rng(s)``, each class by itself (stratified); where a test set is given, one fit is made.
The paper states neither its standardisation nor its L2 strength.

A ``bert`` model must see masked pixels in evaluation too (same section): each image is given `igpt.evaluation.features.VOTES`
fixed random masks. The regression learns from the first. Its class probabilities are averaged over all.

Letters: N images, L layers, C width, S splits.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from igpt.checks import Between, check_bool, check_int, check_number
from igpt.console import Console, aligned_table
from igpt.errors import ConfigError, DataError, NonFiniteError, import_extra
from igpt.evaluation.features import extract, vote_masks
from igpt.machine import versions
from igpt.model.inference import check_finite, check_model
from igpt_kernels.messages import shown

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT
from igpt.plots.curves import Floats, spread

Array = npt.NDArray[Any]


Labelled = tuple[Tensor | Array, Tensor | Array]
MAX_ITERATIONS, TOLERANCE = 1000, 1e-4
MAX_SPLITS = 1000
_STRENGTH = Between(1e-12, 1e12)  # beyond, L-BFGS meets numbers that are not finite
_SHARE = Between(0.0, 1.0, low_open=True, high_open=True)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Accuracies (0..1) of a linear probe.

    Attributes:
        normed: [S, L+1], features after each block's ln_1 (l < L) and after ln_f (l = L).
        raw: [S, L+1], the residual stream without the norm; None when not asked for.
        untrained: [S, L+1], as `normed`, of the same model with fresh weights; None when not asked for.
        pixels: [S], the image's own RGB values / 255; None when not asked for.
        chance: share of the commonest class in the test parts: what a constant answer gets.
        settings: everything that the numbers depend on.
        fits: regressions made.
        not_converged: how many of them stopped at the iteration limit.
    """

    normed: Floats
    raw: Floats | None
    untrained: Floats | None
    pixels: Floats | None
    chance: float
    settings: dict[str, Any]
    fits: int
    not_converged: int

    @property
    def best_layer(self) -> int:
        """Layer of the highest mean `normed` accuracy, chosen on the test parts as the paper does; the lowest on a tie."""
        return int(self.normed.mean(axis=0).argmax())

    def table(self) -> str:
        """All accuracies in percent, mean and standard deviation over the splits, as aligned text."""
        columns = {"layer's norm": self.normed, "raw residual": self.raw, "untrained": self.untrained}
        shown = {name: values for name, values in columns.items() if values is not None}
        rows = [["layer", *shown]]
        for layer in range(self.normed.shape[1]):
            star = " *" if layer == self.best_layer else ""
            rows.append([f"{layer}{star}", *(_percent(values[:, layer : layer + 1]) for values in shown.values())])
        if self.pixels is not None:
            rows.append(["raw pixels", _percent(self.pixels[:, None])])
        rows.append(["chance", f"{100 * self.chance:.2f}"])
        lines = aligned_table(rows)
        best = f"best: layer {self.best_layer}, {_percent(self.normed[:, self.best_layer : self.best_layer + 1])} %"
        trouble = f"; {self.not_converged} of {self.fits} fits did not converge" if self.not_converged else ""
        return "\n".join([f"test accuracy in percent, {_splits(len(self.normed))}", *lines, best + trouble])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `probe.json`."""
        best = self.normed[:, self.best_layer : self.best_layer + 1]
        return {
            "best_layer": self.best_layer,
            "best_accuracy": float(best.mean()),
            "best_std": float(spread(best)[0]),
            "accuracy": {
                name: None if values is None else values.tolist()
                for name, values in (
                    ("normed", self.normed),
                    ("raw", self.raw),
                    ("untrained", self.untrained),
                    ("pixels", self.pixels),
                )
            },
            "layout": "normed, raw, untrained: [split][layer 0..L]; pixels: [split]",
            "chance": self.chance,
            "fits": self.fits,
            "not_converged": self.not_converged,
            "settings": self.settings,
        }


def linear_probe(
    model: ImageGPT,
    train: Labelled,
    test: Labelled | None = None,
    *,
    c: float = 1.0,
    raw: bool = True,
    untrained: bool = True,
    pixels: bool = True,
    test_fraction: float = 0.2,
    seeds: int = 3,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> ProbeResult:
    """Classify by every layer's features, and by the baselines, and count how often it is right.

    Args:
        model: trained; its training mode is put back.
        train: (images uint8 [N, h, w, 3] or tokens integer [N, T], labels integer [N]).
        test: the same for testing. When None, each of `seeds` splits takes `test_fraction` of every class in `train`;
            when given, one fit on all of `train` is made, because it would come out the same for every seed.
        c: inverse L2 strength on the standardised features, from 1e-12 to 1e12.
        raw: also probe the residual stream before the norm.
        untrained: also probe the same model with fresh weights (drawn with `seed`).
        pixels: also probe RGB / 255 of the images (of the decoded tokens, when tokens are given).
        test_fraction: share held out, in (0, 1).
        seeds: splits, at most 1,000; split s uses the seed ``seed + s``.
        seed: first seed, 0 or above.
        batch_size: images in a forward pass.
        progress: show bars, on a terminal.

    Returns:
        A `ProbeResult`. Without `test`, it says nothing about images that the model itself has never seen: pretraining
        (without labels) may have used the test part.

    Raises:
        ArgumentTypeError: `model` is no ImageGPT.
        ConfigError: an argument out of range or of the wrong shape; images without a palette; fewer than two classes.
        DataError: a class with a single image, which no split can have on both sides.
        MissingExtra: scikit-learn is not installed.
        NonFiniteError: a weight or a feature is NaN or infinite.

    Cost: one pass of the model over all images (one more for `untrained`; five times that for ``bert``); features take
    ``4 · N · (L+1) · C`` bytes for each of normed, raw, untrained; ``S · (L+1)`` fits for each.
    """
    sklearn = import_extra("sklearn", "eval")
    c, test_fraction = check_number("c", c, _STRENGTH), check_number("test_fraction", test_fraction, _SHARE)
    flags = (("raw", raw), ("untrained", untrained), ("pixels", pixels), ("progress", progress))
    raw, untrained, pixels, progress = (check_bool(name, flag) for name, flag in flags)
    seeds, seed = check_int("seeds", seeds, 1, MAX_SPLITS), check_int("seed", seed, 0, 2**63 - 1)
    batch_size = check_int("batch_size", batch_size, 1, 2**31)
    check_model(model)
    check_finite(model)
    inputs, labels = _labelled("train", model, train)
    count = len(labels)
    if test is not None:
        test_inputs, test_labels = _labelled("test", model, test)
        if (inputs.ndim == 4) != (test_inputs.ndim == 4):
            raise ConfigError("train and test must both be images or both be tokens")
        unknown = sorted(set(test_labels.tolist()) - set(labels.tolist()))
        if unknown:
            raise ConfigError(f"test has classes that train has not: {unknown[:10]}")
        splits = [(np.arange(count), count + np.arange(len(test_labels)))]
        inputs, labels = np.concatenate([inputs, test_inputs]), np.concatenate([labels, test_labels])
    else:
        try:
            splits = [split(labels, test_fraction, seed + s) for s in range(seeds)]
        except DataError as error:
            raise DataError(f"train {error}") from None
    if len(np.unique(labels)) < 2:
        raise ConfigError(f"train must have labels of at least two classes, got only {np.unique(labels).tolist()}")
    tokens, rgb = _both_forms(model, inputs, need_rgb=pixels)
    masks = vote_masks(model, len(labels), seed)

    fits = len(splits) * ((model.config.n_layer + 1) * (1 + raw + untrained) + pixels)
    fitter = _Fitter(c, fits, progress)
    found: dict[str, Floats] = {}
    with fitter.bar:
        features = extract(model, tokens, raw=raw, batch_size=batch_size, masks=masks, progress=progress)
        for name, values in features.items():
            if not np.isfinite(values).all():
                raise NonFiniteError(f"model gives NaN or infinite features ({name}); its weights are finite, but too large")
            found[name] = fitter.layers(values, labels, splits)
        if untrained:
            fresh = extract(_fresh(model, seed), tokens, batch_size=batch_size, masks=masks, progress=progress)
            found["untrained"] = fitter.layers(fresh["normed"], labels, splits)
        if rgb is not None:
            flat = rgb.reshape(1, 1, len(rgb), -1).astype(np.float32) / np.float32(255)
            found["pixels"] = fitter.layers(flat, labels, splits)[:, 0]

    settings = {
        "images": len(labels),
        "train_images": len(splits[0][0]),
        "test_images": len(splits[0][1]),
        "classes": len(np.unique(labels)),
        "own_test_set": test is not None,
        "test_fraction": None if test is not None else test_fraction,
        "splits": len(splits),
        "first_seed": seed,
        "c": c,
        "max_iter": MAX_ITERATIONS,
        "tol": TOLERANCE,
        "solver": "lbfgs, multinomial, L2, on features standardised by the training part",
        "votes": len(masks),
        "model": dataclasses.asdict(model.config),
        "versions": {**versions(), "scikit-learn": sklearn.__version__},
    }
    return ProbeResult(
        normed=found["normed"],
        raw=found.get("raw"),
        untrained=found.get("untrained"),
        pixels=found.get("pixels"),
        chance=float(np.mean([np.bincount(_ranks(labels)[part]).max() / len(part) for _, part in splits])),
        settings=settings,
        fits=fitter.fits,
        not_converged=fitter.not_converged,
    )


def split(
    labels: npt.NDArray[np.int64], test_fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices (train, test), each ascending and disjoint: of every class the share `test_fraction` is tested, at least 1.

    Raises:
        DataError: a class with a single image.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[Array], list[Array]] = ([], [])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise DataError(
                f"labels: class {int(label)} has a single image; at least two are needed to train on one and test on another"
            )
        cut = min(max(round(len(members) * test_fraction), 1), len(members) - 1)
        parts[1].append(members[:cut])
        parts[0].append(members[cut:])
    return np.sort(np.concatenate(parts[0])), np.sort(np.concatenate(parts[1]))


class _Fitter:
    """Fits and tests regressions, and counts them."""

    def __init__(self, c: float, total: int, progress: bool) -> None:
        linear = import_extra("sklearn.linear_model", "eval")
        self._regression: Callable[[], Any] = lambda: linear.LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
        self._scaler: Callable[[], Any] = import_extra("sklearn.preprocessing", "eval").StandardScaler
        self._limit: Callable[[int], Any] = import_extra("threadpoolctl", "eval").threadpool_limits
        self._not_converged: type[Warning] = import_extra("sklearn.exceptions", "eval").ConvergenceWarning
        self.fits = 0
        self.not_converged = 0
        self.bar = Console(progress).progress(total, 0, "probing", "fit")

    def layers(self, features: npt.NDArray[np.float32], labels: Array, splits: Sequence[tuple[Array, Array]]) -> Floats:
        """Accuracy [S, layers] of features [votes, layers, N, C]."""
        # One BLAS thread: on 2 cores, a fit of 1,437 x 128 took 2.1 s with two threads (they spin) and 0.2 s with one, and
        # 20,000 x 1,536 were 1.5 times faster too. It also makes the fits independent of the number of cores.
        with self._limit(1):
            return np.array([[self._accuracy(part, labels, *parts) for part in features.swapaxes(0, 1)] for parts in splits])

    def _accuracy(self, features: npt.NDArray[np.float32], labels: Array, train: Array, test: Array) -> float:
        # float64: L-BFGS's line search gives up early on float32 losses.
        scaler, regression = self._scaler(), self._regression()
        x = scaler.fit_transform(features[0, train].astype(np.float64))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", self._not_converged)
            regression.fit(x, labels[train])
        self.fits += 1
        self.not_converged += any(issubclass(warning.category, self._not_converged) for warning in caught)
        votes = [regression.predict_proba(scaler.transform(part[test].astype(np.float64))) for part in features]
        answers = regression.classes_[np.mean(votes, axis=0).argmax(axis=1)]
        self.bar.update()
        return float(np.mean(answers == labels[test]))


def _labelled(name: str, model: ImageGPT, given: Labelled) -> tuple[Array, npt.NDArray[np.int64]]:
    """Check (images or tokens, labels) and give them as numpy arrays."""
    config = model.config
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(f"{name} must be (images or tokens, labels), got {type(given).__name__}")
    inputs, labels = _array(f"{name}[0], images or tokens,", given[0]), _array(f"{name}[1], labels,", given[1])
    images = inputs.ndim == 4 and inputs.dtype == np.uint8 and inputs.shape[1:] == (config.height, config.width, 3)
    tokens = inputs.ndim == 2 and np.issubdtype(inputs.dtype, np.integer) and inputs.shape[1] == config.n_ctx
    if not (images or tokens):
        size = f"{config.height}, {config.width}"
        raise ConfigError(
            f"{name} must be uint8 images [N, {size}, 3] or integer tokens [N, {config.n_ctx}] for this model, "
            f"got {inputs.dtype} {list(inputs.shape)}"
        )
    if tokens and inputs.size and not 0 <= inputs.min() <= inputs.max() < config.vocab_size:
        raise ConfigError(f"{name} must hold tokens from 0 to {config.vocab_size - 1}, got {inputs.min()}..{inputs.max()}")
    if labels.shape != (len(inputs),) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise ConfigError(
            f"{name} labels must be integers [{len(inputs)}], at least one, got {labels.dtype} {list(labels.shape)}"
        )
    if labels.max() > np.iinfo(np.int64).max:
        raise ConfigError(f"{name} labels must fit into int64, got {labels.max()}")
    return inputs, labels.astype(np.int64)


def _array(name: str, value: Any) -> Array:
    """What a user gave, as an array of the CPU."""
    try:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except Exception as error:  # sparse, nested and meta tensors; rows of several lengths; objects with an opinion
        raise ConfigError(f"{name} must be an array, got {shown(value)}") from error


def _both_forms(model: ImageGPT, inputs: Array, *, need_rgb: bool) -> tuple[Tensor, Array | None]:
    """Tokens int64 [N, T], and images uint8 [N, h, w, 3] where the pixel baseline needs them."""
    palette = model.palette
    if inputs.ndim == 4:
        if palette is None:
            raise ConfigError("train holds images, but the model has no palette: set model.palette, or give tokens")
        return palette.encode(inputs).cpu(), inputs if need_rgb else None
    if need_rgb and palette is None:
        raise ConfigError("pixels=True needs colours, but the model has no palette: set model.palette, or pass pixels=False")
    tokens = torch.from_numpy(inputs.astype(np.int64))
    return tokens, palette.decode(tokens, model.config.height, model.config.width) if need_rgb and palette is not None else None


def _fresh(model: ImageGPT, seed: int) -> ImageGPT:
    """The same model with the weights it had before training began, drawn with `seed`; torch's own state is put back."""
    from igpt.model.image_gpt import ImageGPT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ImageGPT(model.config)
    for old, new in zip(model.modules(), fresh.modules(), strict=True):
        if hasattr(old, "kernels"):
            new.kernels = old.kernels
    return fresh.to(model.device, model.wpe.weight.dtype)


def _ranks(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _percent(values: Floats) -> str:
    """`values` [S, 1] as ``97.22 ± 0.45``, or without the deviation for a single split."""
    mean = f"{100 * values.mean():.2f}"
    return mean if len(values) < 2 else f"{mean} \N{PLUS-MINUS SIGN} {100 * spread(values)[0]:.2f}"


def _splits(count: int) -> str:
    return "one fit" if count == 1 else f"mean \N{PLUS-MINUS SIGN} standard deviation of {count} splits"
