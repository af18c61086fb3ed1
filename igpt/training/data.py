"""What a training run reads: batches of training tokens, held-out tokens, the palette, and the baseline made of counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igpt.console import Console
from igpt.data.batches import TokenBatches
from igpt.data.histogram import histogram_baseline
from igpt.data.open import open_source
from igpt.data.orders import order
from igpt.data.source import Source
from igpt.data.tokens import TokenSource
from igpt.errors import ConfigError
from igpt.training.options import PretrainOptions

if TYPE_CHECKING:
    from igpt.palette.palette import Palette


_PIXELS = 1 << 22
"""That are read at once, at most, where no batch is asked for: 12 MB, and 32 MB as tokens."""


class TrainingData:
    """The data of a run, opened.

    Args:
        options: settings of the run.
        checkpoint: where the palette is taken from when the run is continued; None makes it anew.
        console: where progress is shown.
        check: called with height, width and colours (512 where that is not known yet) before the long part begins.

    Attributes:
        train: batches of training tokens.
        val_tokens: int32 [N,T], the held-out images; N = 0 without any.
        palette: None for token files that do not hold theirs.
        vocab: V.

    Raises:
        ConfigError, DataError: as `igpt.data.open_source` and `igpt.data.palettes.parse_palette`.
    """

    train: TokenBatches
    val_tokens: Tensor
    palette: Palette | None
    vocab: int

    def __init__(
        self,
        options: PretrainOptions,
        checkpoint: Path | None,
        console: Console,
        check: Callable[[int, int, int], None] | None = None,
    ) -> None:
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
        self.console, self.seed = console, options.seed
        if check is not None:
            check(source.height, source.width, _colours(options.palette, source))
        self.palette = _palette(options, source, checkpoint, console.is_interactive)
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
        """The first `count` images of the first epoch's order, in their evaluation form, as int64 [n,T] of at most 256."""
        indices = order(len(batches.source), self.seed, 0, count)
        size = _at_once(batches.source)
        with self.console.progress(count, 0, what, "img") as bar:
            for start in range(0, count, size):
                yield batches.at(indices[start : start + size])
                bar.update(min(size, count - start))

    def describe(self) -> list[str]:
        """What there is, in a line or two."""
        source, size = self.train.source, self.train.batch_size
        lines = [
            f"data: {source.name}, {len(source):,} training and {len(self.val_tokens):,} validation images; "
            f"batches of {size}, {len(source) / size:.1f} steps an epoch"
        ]
        if self.palette is not None and source.kind == "images":
            error = self.palette.error(source.images(range(min(len(source), _at_once(source)))))
            lines.append(f"palette: {self.palette.size} colours, mean |ΔRGB| {error.mean_delta:.2f}, PSNR {error.psnr:.1f} dB")
        return lines

    def baseline(self, options: PretrainOptions, mask: Tensor | None) -> float | None:
        """The histogram baseline; counted over four times `val_images` training images at most, because each must be read."""
        if not len(self.val_tokens):
            return None
        count = min(len(self.train.source), 4 * options.val_images)
        return histogram_baseline(self._parts(self.train, count, "counting colours"), self.val_tokens, self.vocab, mask=mask)


def _at_once(source: Source) -> int:
    """Images to read at once: 256, or fewer where they are large."""
    return max(1, min(256, _PIXELS // (source.height * source.width)))


def _colours(palette: str, source: Source) -> int:
    """How many colours there will be, as far as that is known before a palette is learned or read."""
    if isinstance(source, TokenSource):
        return source.vocab_size
    named = re.fullmatch(r"(?:fit|uniform):([0-9]{1,6})", palette)
    return min(max(int(named[1]), 2), 65536) if named else 512


def _palette(options: PretrainOptions, source: Source, checkpoint: Path | None, progress: bool) -> Palette | None:
    from igpt.data.palettes import parse_palette
    from igpt.palette.palette import Palette

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
