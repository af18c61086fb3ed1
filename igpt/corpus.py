"""What a training run reads: batches of training tokens, held-out tokens, the palette, and the baseline made of counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igpt.config import PretrainOptions
from igpt.data import Source, TokenBatches, TokenSource, open_source, order
from igpt.errors import ConfigError
from igpt.run import Voice

if TYPE_CHECKING:
    from igpt.palette import Palette


class Corpus:
    """The data of a run, opened.

    Args:
        options: settings of the run.
        checkpoint: where the palette is taken from when the run is continued; None makes it anew.
        say: where progress is shown.

    Attributes:
        train: batches of training tokens.
        val_tokens: int32 [N,T], the held-out images; N = 0 without any.
        palette: None for token files that do not hold theirs.
        vocab: V.

    Raises:
        ConfigError, DataError: as `igpt.data.open_source` and `igpt.palette.parse_palette`.
    """

    train: TokenBatches
    val_tokens: Tensor
    palette: Palette | None
    vocab: int

    def __init__(self, options: PretrainOptions, checkpoint: Path | None, say: Voice) -> None:
        common: dict[str, Any] = {"height": options.height, "width": options.width, "val_fraction": options.val_fraction}
        common |= {"seed": options.seed, "bad_images": options.bad_images}
        source = open_source(options.source, split="train", augment=options.augment, **common)
        common |= {"height": source.height, "width": source.width}  # the first held-out picture could have another size
        held_out = None
        try:
            held_out = open_source(options.source, split="val", **common)
        except ConfigError:
            if options.val_fraction > 0:
                raise
        self.say, self.seed = say, options.seed
        self.palette = _palette(options, source, checkpoint, say.live)
        if self.palette is not None:
            self.vocab = self.palette.size
        else:
            assert isinstance(source, TokenSource)
            self.vocab = source.vocab_size
        self.train = TokenBatches(source, self.palette, options.batch_size, options.seed)
        self.val_tokens = torch.empty(0, source.height * source.width, dtype=torch.int32)
        if held_out is not None:
            count = min(options.val_images, len(held_out))
            with TokenBatches(held_out, self.palette, options.batch_size, options.seed) as batches:
                self.val_tokens = torch.cat([part.int() for part in self._parts(batches, count, "reading validation images")])
        self._held_out = held_out

    @property
    def skipped(self) -> int:
        """Damaged images met so far, in the place of which others were taken."""
        return self.train.source.skipped + (0 if self._held_out is None else self._held_out.skipped)

    def _parts(self, batches: TokenBatches, count: int, what: str) -> Iterator[Tensor]:
        """The first `count` images of the first epoch's order, in their evaluation form, as int64 [<=256,T]."""
        indices = order(len(batches.source), self.seed, 0, count)
        with self.say.bar(count, 0, what, "img") as bar:
            for start in range(0, count, 256):
                yield batches.at(indices[start : start + 256])
                bar.update(min(256, count - start))

    def describe(self) -> list[str]:
        """What there is, in a line or two."""
        source, size = self.train.source, self.train.batch_size
        lines = [
            f"data: {source.name}, {len(source):,} training and {len(self.val_tokens):,} validation images; "
            f"batches of {size}, {len(source) / size:.1f} steps an epoch"
        ]
        if self.palette is not None and source.kind == "images":
            error = self.palette.error(source.images(range(min(len(source), 256))))
            lines.append(f"palette: {self.palette.size} colours, mean |ΔRGB| {error.mean_delta:.2f}, PSNR {error.psnr:.1f} dB")
        return lines

    def baseline(self, options: PretrainOptions, mask: Tensor | None) -> float | None:
        """The histogram baseline; counted over four times `val_images` training images at most, because each must be read."""
        if not len(self.val_tokens):
            return None
        count = min(len(self.train.source), 4 * options.val_images)
        return histogram_baseline(self._parts(self.train, count, "counting colours"), self.val_tokens, self.vocab, mask=mask)


def histogram_baseline(
    train_tokens: Tensor | Iterable[Tensor], val_tokens: Tensor, vocab: int, *, mask: Tensor | None = None
) -> float:
    """What a model would reach that knows only how often each colour stands at each position: nats per pixel.

    ``-mean log((count[t, v] + 1) / (n + V))``: counts over the training images, add-one smoothing, the mean over all
    pixels of the validation images.

    Args:
        train_tokens: int [n,T], or batches of them.
        val_tokens: int [N,T].
        vocab: V.
        mask: bool [N,T]; only these pixels are counted, first over each image, then over images that have any: the loss of
            the bert objective.

    Raises:
        ConfigError: no images, or other numbers of positions.

    Cost: ``8 · T · V`` bytes.
    """
    positions = val_tokens.shape[1]
    offsets = torch.arange(positions) * vocab
    counts = torch.zeros(positions * vocab, dtype=torch.float64)
    images = 0
    for batch in [train_tokens] if isinstance(train_tokens, Tensor) else train_tokens:
        if batch.dim() != 2 or batch.shape[1] != positions:
            raise ConfigError(f"train_tokens must be [n,{positions}] like val_tokens, got {tuple(batch.shape)}")
        counts += torch.bincount((batch.long() + offsets).flatten(), minlength=positions * vocab)
        images += len(batch)
    if images == 0 or len(val_tokens) == 0:
        raise ConfigError(f"a histogram needs images on both sides, got {images} and {len(val_tokens)}")
    nats = math.log(images + vocab) - torch.log1p(counts)
    total = weight = 0.0
    for start in range(0, len(val_tokens), 256):  # [256,T] float64 at a time
        found = nats[val_tokens[start : start + 256].long() + offsets]
        hidden = None if mask is None else mask[start : start + 256]
        if hidden is None:
            total, weight = total + float(found.mean(1).sum()), weight + len(found)
        else:
            seen = hidden.sum(1)
            total += float(((found * hidden).sum(1) / seen.clamp(min=1)).sum())
            weight += int((seen > 0).sum())
    return total / max(weight, 1.0)


def _palette(options: PretrainOptions, source: Source, checkpoint: Path | None, progress: bool) -> Palette | None:
    from igpt.palette import Palette, parse_palette

    if checkpoint is not None:
        return Palette.from_pretrained(checkpoint) if (checkpoint / "preprocessor_config.json").exists() else None
    if not isinstance(source, TokenSource):
        return parse_palette(options.palette, source, seed=options.seed, progress=progress)
    if options.palette == "auto" or options.palette.startswith("fit:"):
        return source.palette  # None is enough to train on; only pictures cannot be drawn then
    palette = parse_palette(options.palette, source)
    if palette.size < source.vocab_size:
        raise ConfigError(f"palette: {options.palette} has {palette.size} colours, {source.name} uses {source.vocab_size}")
    return palette
