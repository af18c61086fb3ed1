"""Batches of tokens for training: batch number `step` is a pure function of the source, the palette, the seed and the step."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from igpt.checks import check_int
from igpt.data.folder import FolderSource
from igpt.data.orders import order
from igpt.data.source import Source
from igpt.data.threads import Threads
from igpt.data.tokens import check_tokens
from igpt.errors import ArgumentTypeError, ConfigError
from igpt_kernels.messages import shown

if TYPE_CHECKING:
    from igpt.palette.palette import Palette

# Tokens of all images are kept once computed when they need no more than this: 524,288 images of 32 x 32 at one byte.
CACHE_BYTES = 512 * 1024 * 1024


class TokenBatches:
    """Draws batches of tokens from a source, epoch after epoch (`order`), without state.

    ``batch(step)`` holds draws step x B .. step x B + B - 1, so a run that continues sees what it would have seen.
    With a source opened for augmentation the crop of each draw is a pure function of (seed, draw).

    Images are decoded and encoded when first needed. Their tokens are kept (up to 512 MB in all, not with augmentation). For
    picture files the next batch is prepared by one thread while the present one is used; the batches are the same.

    Args:
        source: images or tokens.
        palette: needed for images. For tokens it only bounds them; None leaves that to the source.
        batch_size: B.
        seed: at least 0.

    Raises:
        ConfigError: batch_size below 1, negative seed, images without a palette.
    """

    def __init__(self, source: Source, palette: Palette | None, batch_size: int, seed: int = 0) -> None:
        if not isinstance(source, Source):
            raise ArgumentTypeError(f"source must be made by open_source, got {shown(source)}")
        batch_size, seed = check_int("batch_size", batch_size, 1, 2**31), check_int("seed", seed, 0)
        if palette is None and source.kind == "images":
            raise ConfigError(f"{source.name} holds images: batches of tokens need a palette")
        self.source = source
        self.palette = palette
        self.batch_size = batch_size
        self.seed = seed
        self._threads = Threads(1, "igpt-ahead")
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None
        self._cache: NDArray[Any] | None = None
        length = source.height * source.width
        if palette is not None and source.kind == "images":
            kind = np.dtype(np.uint8 if palette.size <= 256 else np.uint16)
            if len(source) * length * kind.itemsize <= CACHE_BYTES:
                self._cache = np.zeros((len(source), length), dtype=kind)
                self._cached = np.zeros(len(source), dtype=np.bool_)

    def __enter__(self) -> TokenBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def batch(self, step: int) -> torch.Tensor:
        """Tokens of one step: int64 [B,T] on the CPU.

        Raises:
            DataError: a damaged image or a token outside the palette; names the file and the row.
        """
        step = check_int("step", step, 0)
        # What a parent's thread prepares never comes in a forked process.
        ahead, self._ahead = None if self._threads.is_inherited else self._ahead, None
        tokens = ahead[1].result() if ahead is not None and ahead[0] == step else self._compute(step)
        if isinstance(self.source, FolderSource) and not self._complete():
            self._ahead = (step + 1, self._threads.pool.submit(self._compute, step + 1))
        return tokens

    def at(self, indices: ArrayLike) -> torch.Tensor:
        """Tokens of given images in their evaluation form (middle crop): int64 [n,T] on the CPU. Raises as `batch`."""
        with self._threads.lock:
            return self._tokens(self.source.check_indices(indices), None, 0)

    def close(self) -> None:
        """Wait for the preparing thread and stop it, and the source's threads. The object can still be used."""
        self._ahead = None
        self._threads.close()
        self.source.close()

    def _complete(self) -> bool:
        return self._cache is not None and not self.source.augment and bool(self._cached.all())

    def _compute(self, step: int) -> torch.Tensor:
        first = step * self.batch_size
        indices = order(len(self.source), self.seed, first, self.batch_size)
        with self._threads.lock:
            return self._tokens(indices, self.seed if self.source.augment else None, first)

    def _tokens(self, indices: NDArray[np.int64], seed: int | None, first: int) -> torch.Tensor:
        if self.source.kind == "tokens":
            tokens = self.source.tokens(indices)
            if self.palette is not None:
                check_tokens(tokens, indices, self.palette.size, self.source.name)
            return torch.from_numpy(tokens)
        assert self.palette is not None
        if self._cache is None or seed is not None:
            return self.palette.encode(self.source.images(indices, seed=seed, first=first))
        missing = np.unique(indices[~self._cached[indices]])
        if missing.size:
            self._cache[missing] = self.palette.encode(self.source.images(missing)).numpy()
            self._cached[missing] = True
        return torch.from_numpy(self._cache[indices].astype(np.int64))
