"""Data: sources of images or tokens by name, safe reading of files, and batches that are pure functions of seed and step."""

from __future__ import annotations

from igpt.data.batches import TokenBatches
from igpt.data.images import MAX_PIXELS, fit, read_picture
from igpt.data.open import open_source
from igpt.data.orders import order, split_indices
from igpt.data.source import ArraySource, Batch, FolderSource, Source
from igpt.data.tokenize import run_tokenize
from igpt.data.tokens import TokenSource

__all__ = [
    "MAX_PIXELS",
    "ArraySource",
    "Batch",
    "FolderSource",
    "Source",
    "TokenBatches",
    "TokenSource",
    "fit",
    "open_source",
    "order",
    "read_picture",
    "run_tokenize",
    "split_indices",
]
