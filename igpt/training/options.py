"""Settings of a pretraining run, as `igpt pretrain` takes them and a run folder keeps them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from igpt.checks import AtLeast, Between, Count, Device, Natural, Options, Side
from igpt.errors import ConfigError
from igpt.model.config import Objective, PresetName

Precision = Literal["fp32", "bf16"]
Kernels = Literal["auto", "off"]
BadImages = Literal["raise", "skip"]


@dataclass(frozen=True)
class PretrainOptions(Options):
    """Options of `igpt pretrain`. The defaults follow the paper (Adam 0.9 / 0.95, no decay, no dropout, cosine to 0)."""

    source: str
    """Images or tokens, see the sources."""
    out: Path
    """Run folder: config.toml, metrics.jsonl, samples/, checkpoints/."""
    preset: PresetName = "tiny"
    """Model: tiny, igpt-s, igpt-m, igpt-l, igpt-xl."""
    n_layer: Count | None = None
    """Blocks, instead of the preset's."""
    n_head: Count | None = None
    """Heads, instead of the preset's."""
    n_embd: Count | None = None
    """Width, instead of the preset's."""
    height: Side | None = None
    """Rows in tokens; the source's own size when left out."""
    width: Side | None = None
    """Columns in tokens."""
    palette: str = "auto"
    """auto: 512 colours learned from the training images (all of them where they have fewer). fit:K learns K, uniform:K
    spaces them evenly, anything else is a palette folder."""
    attention: tuple[str, ...] = ("dense",)
    """Attention pattern(s), cycled over the layers, for example local2d:7 column; igpt layouts --help lists the forms."""
    objective: Objective = "ar"
    """ar: next pixel. bert: masked pixels."""
    steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 128
    """Images in a step, over all accumulated parts."""
    accumulate: Count = 1
    """Parts that a batch is cut into, to save memory; the gradient stays that of the whole batch."""
    lr: Annotated[float, Between(0, 1e30, low_open=True)] = 0.003
    """Peak learning rate."""
    warmup: Natural | None = None
    """Steps of linear warm-up; one epoch (at most a tenth of the run) when left out."""
    final_lr: Annotated[float, Between(0, 1)] = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    beta1: Annotated[float, Between(0, 1, high_open=True)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, Between(0, 1, high_open=True)] = 0.95
    """Adam's second moment decay; 0.999 gave loss spikes in the paper."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """AdamW decay of matrices (gains, positions and the start vector are left alone)."""
    clip: Annotated[float, AtLeast(0)] = 0.0
    """Largest gradient norm; 0 does not clip."""
    precision: Precision = "fp32"
    """fp32, or bf16 autocast with fp32 weights."""
    augment: bool = False
    """Random crops of photographs (paper: shorter side 256..384, crop 224, reduce) instead of the centre crop."""
    val_fraction: Annotated[float, Between(0, 1, high_open=True)] = 0.1
    """Share of images held out, chosen by the seed; sources with a test split of their own hold that out instead."""
    val_every: Count = 500
    """Steps between validations."""
    val_images: Count = 2048
    """Images in a validation, at most."""
    sample_every: Natural = 1000
    """Steps between sample grids; 0 draws none."""
    samples: Count = 16
    """Images in a sample grid."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints kept."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    seed: Natural = 0
    """Seed of weights, sample order, masks and samples."""
    device: Device = "auto"
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
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}")
        if self.warmup is not None and self.warmup > self.steps:
            raise ConfigError(f"warmup must be from 0 to steps ({self.steps}), got {self.warmup}")
