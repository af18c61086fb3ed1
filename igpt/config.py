"""Every setting of the project, as frozen dataclasses: the model's, and one class for each command.

Importing this module costs nothing (no torch, no numpy), so the command line can print its help at once. Field
docstrings are the help texts. A class checks itself when it is made: a wrong value raises `ConfigError`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from igpt.errors import ConfigError
from igpt_kernels import layouts

T = TypeVar("T")
Objective = Literal["ar", "bert"]
Precision = Literal["fp32", "bf16"]
Kernels = Literal["auto", "off"]
BadImages = Literal["raise", "skip"]


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{name} must be a number above 0, got {value!r}")


def _fraction(owner: object, name: str, *, low: float = 0.0, high: float = 1.0) -> None:
    value = getattr(owner, name)
    if not isinstance(value, (int, float)) or not low <= value < high:
        raise ConfigError(f"{name} must be in [{low:g}, {high:g}), got {value!r}")


def _one_of(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class ImageGPTConfig:
    """The shape of an Image GPT.

    Raises:
        ConfigError: a size below 1, a width that the heads do not divide, an unknown objective or pattern.
    """

    n_layer: int
    """Blocks."""
    n_head: int
    """Attention heads; n_embd must be a multiple."""
    n_embd: int
    """Width of the residual stream (C)."""
    vocab_size: int = 512
    """Palette colours (V). The start symbol is not one of them."""
    height: int = 32
    """Rows of the image in tokens."""
    width: int = 32
    """Columns of the image in tokens."""
    attention: str | tuple[str, ...] = "dense"
    """Attention pattern, or patterns cycled over the layers: dense, or what `igpt_kernels.layouts.parse` reads."""
    objective: Objective = "ar"
    """ar: predict each pixel from those before it. bert: predict masked pixels from all others."""
    mask_rate: float = 0.15
    """Share of pixels hidden by the bert objective."""
    bias: bool = False
    """Biases in the linear layers. Image GPT has none; fine-tuned Hugging Face checkpoints can."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int) or not 2 <= self.vocab_size <= 65536:
            raise ConfigError(f"vocab_size must be an integer from 2 to 65536, got {self.vocab_size!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        _one_of(self, "objective", ("ar", "bert"))
        if not isinstance(self.bias, bool):
            raise ConfigError(f"bias must be true or false, got {self.bias!r}")
        if not isinstance(self.mask_rate, (int, float)) or not 0.0 < self.mask_rate < 1.0:
            raise ConfigError(f"mask_rate must lie between 0 and 1, got {self.mask_rate!r}")
        patterns = (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)
        if not patterns:
            raise ConfigError(f"attention must name a pattern, got {self.attention!r}")
        for pattern in patterns:
            try:
                layouts.parse(pattern, self.height, self.width)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"attention: {error}") from error
        if not isinstance(self.attention, str):
            object.__setattr__(self, "attention", patterns)

    def pattern(self, layer: int) -> str:
        """The attention pattern of a layer."""
        patterns = (self.attention,) if isinstance(self.attention, str) else self.attention
        return patterns[layer % len(patterns)]

    @property
    def n_ctx(self) -> int:
        """Tokens of one image: T = height x width."""
        return self.height * self.width

    @property
    def head_dim(self) -> int:
        """Width of one head: D = n_embd / n_head."""
        return self.n_embd // self.n_head

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageGPTConfig:
        """Build from a mapping; an unknown or missing key raises `ConfigError` naming it."""
        return from_mapping(cls, values)


# Layers, heads, width of the released models (github.com/openai/image-gpt README and paper table 1). The head count of
# XL was never published; 16 heads of 192 is this project's choice. "tiny" learns 8x8 digits on two CPU cores in minutes.
PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (6, 4, 128),
    "igpt-s": (24, 8, 512),
    "igpt-m": (36, 8, 1024),
    "igpt-l": (48, 16, 1536),
    "igpt-xl": (60, 16, 3072),
}


def preset(name: str, **changes: Any) -> ImageGPTConfig:
    """The configuration of a named model: `igpt-s`, `igpt-m`, `igpt-l`, `igpt-xl` or `tiny`.

    Args:
        name: one of the names above.
        **changes: fields of `ImageGPTConfig` to set differently, for example ``height=64, width=64``.

    Raises:
        ConfigError: unknown name, or a field that does not exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    n_layer, n_head, n_embd = PRESETS[name]
    return from_mapping(ImageGPTConfig, {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **changes})


def from_mapping(cls: type[T], values: dict[str, Any]) -> T:
    """Build a settings class from a mapping, refusing keys it does not have.

    Lists become tuples and strings become paths where the field says so, because JSON and TOML know neither.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{cls.__name__} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(fields)}")
    ready = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "Path" in str(fields[name].type):
            value = Path(value)
        ready[name] = value
    try:
        return cls(**ready)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {str(error).partition('() ')[2] or error}") from error


class _Options:
    """What the options of all commands share: paths may be given as strings."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if "Path" in str(field.type) and isinstance(value, str):
                object.__setattr__(self, field.name, Path(value))


@dataclass(frozen=True)
class PaletteOptions(_Options):
    """Options of `igpt palette`: learn a palette from images, or write a uniform one."""

    source: str = ""
    """Images to learn from (digits, photos:DIR, folder:DIR, cifar10:DIR, cifar100:DIR); empty with --uniform."""
    out: Path = Path("palette")
    """Folder for preprocessor_config.json and the picture palette.png."""
    k: int = 512
    """Colours."""
    uniform: bool = False
    """Evenly spaced colours instead of k-means."""
    height: int | None = None
    """Rows to resize images to; the source's own size when left out."""
    width: int | None = None
    """Columns to resize images to."""
    max_pixels: int = 2_000_000
    """Pixels drawn at random for k-means; all are used when there are fewer."""
    seed: int = 0
    """Seed of the pixel sample and of k-means."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "k", "max_pixels")
        if not self.uniform and not self.source:
            raise ConfigError("source is empty: name the images to learn from, for example photos:DIR, or pass --uniform")


@dataclass(frozen=True)
class TokenizeOptions(_Options):
    """Options of `igpt tokenize`: write a data set as palette tokens, one row an image, readable as tokens:FILE."""

    source: str
    """Images to read (digits, photos:DIR, folder:DIR, cifar10:DIR, cifar100:DIR)."""
    palette: str
    """Folder or file of a palette."""
    out: Path
    """The .npy file to write: uint8 up to 256 colours, else uint16, [images, height x width]."""
    height: int | None = None
    """Rows; the source's own size when left out."""
    width: int | None = None
    """Columns."""
    split: Literal["train", "val", "all"] = "all"
    """Which part of the source."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


@dataclass(frozen=True)
class PretrainOptions(_Options):
    """Options of `igpt pretrain`. The defaults follow the paper (Adam 0.9 / 0.95, no decay, no dropout, cosine to 0)."""

    source: str
    """Images: digits, photos:DIR, folder:DIR, cifar10:DIR, cifar100:DIR or tokens:FILE.npy."""
    out: Path
    """Run folder: config.toml, metrics.jsonl, samples/, checkpoints/."""
    preset: str = "tiny"
    """Model: tiny, igpt-s, igpt-m, igpt-l, igpt-xl."""
    n_layer: int | None = None
    """Blocks, instead of the preset's."""
    n_head: int | None = None
    """Heads, instead of the preset's."""
    n_embd: int | None = None
    """Width, instead of the preset's."""
    height: int | None = None
    """Rows in tokens; the source's own size when left out."""
    width: int | None = None
    """Columns in tokens."""
    palette: str = "auto"
    """auto: 512 colours learned from the training images (all of them where they have fewer). fit:K learns K, uniform:K
    spaces them evenly, anything else is a palette folder."""
    attention: tuple[str, ...] = ("dense",)
    """Attention pattern(s), cycled over the layers: dense, local2d:7, row, column, row_column, strided, fixed; a+b."""
    objective: Objective = "ar"
    """ar: next pixel. bert: masked pixels."""
    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 128
    """Images in a step, over all accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is cut into, to save memory; the gradient stays that of the whole batch."""
    lr: float = 0.003
    """Peak learning rate."""
    warmup: int | None = None
    """Steps of linear warm-up; one epoch (at most a tenth of the run) when left out."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.95
    """Adam's second moment decay; 0.999 gave loss spikes in the paper."""
    weight_decay: float = 0.0
    """AdamW decay of matrices (gains, positions and the start vector are left alone)."""
    clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    precision: Precision = "fp32"
    """fp32, or bf16 autocast with fp32 weights."""
    augment: bool = False
    """Random crops of photographs (paper: shorter side 256..384, crop 224, reduce) instead of the centre crop."""
    val_fraction: float = 0.1
    """Share of images held out, chosen by the seed; sources with a test split of their own hold that out instead."""
    val_every: int = 500
    """Steps between validations."""
    val_images: int = 2048
    """Images in a validation, at most."""
    sample_every: int = 1000
    """Steps between sample grids; 0 draws none."""
    samples: int = 16
    """Images in a sample grid."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of weights, sample order, masks and samples."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""
    deterministic: bool = True
    """Bit-for-bit repeatable on one machine."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""
    resume: bool = False
    """Continue the newest complete checkpoint in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(
            self,
            "steps",
            "batch_size",
            "accumulate",
            "lr",
            "val_every",
            "val_images",
            "samples",
            "checkpoint_every",
            "keep",
            "log_every",
        )
        for name in ("sample_every", "clip", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)!r}")
        _fraction(self, "beta1")
        _fraction(self, "beta2")
        _fraction(self, "val_fraction")
        _fraction(self, "final_lr", high=1.0 + 1e-9)
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"warmup must be from 0 to steps ({self.steps}), got {self.warmup}")


@dataclass(frozen=True)
class SampleOptions(_Options):
    """Options of `igpt sample`: draw new images from a model."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    out: Path = Path("samples.png")
    """PNG grid to write; tokens go beside it as .npy."""
    n: int = 16
    """Images."""
    temperature: float = 1.0
    """Divides the logits; 1 is the model's own distribution, near 0 is greedy."""
    top_k: int | None = None
    """Keep the k most likely colours of each pixel."""
    top_p: float | None = None
    """Keep the most likely colours up to this probability."""
    batch_size: int = 64
    """Images drawn at once."""
    seed: int = 0
    """Seed; the same seed draws the same images, whatever the batch size."""
    scale: int | None = None
    """Enlargement of the pixels in the PNG; chosen by size when left out."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""


@dataclass(frozen=True)
class CompleteOptions(_Options):
    """Options of `igpt complete`: keep a part of real images, and let the model draw the rest."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    source: str
    """Images: a picture file, or digits, photos:DIR, folder:DIR, cifar10:DIR, tokens:FILE.npy."""
    out: Path = Path("completions.png")
    """PNG to write: each row is original, kept part, completions."""
    images: int = 8
    """How many images of the source."""
    n: int = 3
    """Completions of each."""
    keep: str = "top-half"
    """top-half, rows:N (N rows), pixels:N (N pixels in raster order), or a .npy file of booleans [height, width]."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Keep the k most likely colours of each pixel."""
    top_p: float | None = None
    """Keep the most likely colours up to this probability."""
    batch_size: int = 64
    """Images drawn at once."""
    seed: int = 0
    """Seed of the choice of images and of the drawing."""
    scale: int | None = None
    """Enlargement of the pixels in the PNG; chosen by size when left out."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


@dataclass(frozen=True)
class ProbeOptions(_Options):
    """Options of `igpt probe`: how well does each layer classify? Logistic regression on mean-pooled features."""

    model: str
    """Run folder, checkpoint folder, or Hugging Face id of an ImageGPT."""
    source: str
    """Labelled images: digits, folder:DIR, cifar10:DIR, cifar100:DIR."""
    out: Path = Path("probe")
    """Folder for probe.json and probe.png."""
    test_fraction: float = 0.2
    """Share held out for testing; sources with a test split of their own use that."""
    max_images: int | None = None
    """Images used, at most; all when left out."""
    seeds: int = 3
    """Train/test splits (or subsamples) to average over."""
    c: float = 1.0
    """Inverse L2 strength of the regression on standardised features; the paper does not state its own."""
    raw: bool = True
    """Also probe the residual stream before the norm."""
    untrained: bool = True
    """Also probe the same model before training, as a baseline."""
    batch_size: int = 64
    """Images in a forward pass."""
    seed: int = 0
    """First seed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kernels: Kernels = "auto"
    """auto calls igpt.use_kernels(); off stays plain PyTorch."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


@dataclass(frozen=True)
class DemoOptions(_Options):
    """Options of `igpt demo`: the whole main job on real data, and one page that shows it."""

    out: Path = Path("runs/demo")
    """Folder for the run and report.html."""
    steps: int = 1200
    """Pretraining steps."""
    fresh: bool = True
    """Start over; --no-fresh continues an interrupted demo."""
    seed: int = 0
    """Seed of everything."""


@dataclass(frozen=True)
class LayoutsOptions(_Options):
    """Options of `igpt layouts`: draw a sparse attention pattern, and say what it costs."""

    pattern: str
    """dense, local2d:R, row, column, row_column, strided[:STRIDE] or fixed[:STRIDE[,C]]; a+b is either, a&b both."""
    then: str = ""
    """Pattern of the layer above, for what two layers reach (up to 64 x 64); the same when left out."""
    size: int = 64
    """Rows and columns of the image."""
    height: int | None = None
    """Rows, where they differ from the columns."""
    width: int | None = None
    """Columns."""
    pixel: str = ""
    """ROW,COLUMN of the pixel whose view is drawn; one in the lower middle when left out."""
    causal: bool = True
    """Only pixels before it in raster order; --no-causal draws what the bert objective sees."""
    out: Path = Path("layout.png")
    """The PNG to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "size")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _positive(self, name)


@dataclass(frozen=True)
class BenchOptions(_Options):
    """Options of `igpt bench`: those of `python -m benchmarks`, handed on as they are."""

    arguments: tuple[str, ...] = ()
    """For example --quick, or --suite attention --shape 2 12 4096 64."""


@dataclass(frozen=True)
class InfoOptions(_Options):
    """Options of `igpt info`: versions, devices, the compiled extension, and which kernels would be chosen."""

    build: bool = False
    """Build the compiled extension first, where it is missing and a compiler is there."""
    json: bool = False
    """Print JSON instead of text."""
