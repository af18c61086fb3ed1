"""Plans of block-sparse attention by torch: tiles of queries in batches that see equally many tiles of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from igpt_kernels import layouts
from igpt_kernels.block_lists import FULL, BlockLists
from igpt_kernels.caches import kept

BLOCK = 64
"""Tokens in a tile."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Tiles of queries that see equally many tiles of keys.

    Attributes:
        tiles: where the batch lies in the order of the plan.
        keys: [n, s·BLOCK] tokens of the keys of each tile.
        key_tiles: [n, s] numbers of their tiles.
        masks: [n, s] mask numbers, or [1, s] where all n tiles have the same.
    """

    tiles: slice
    keys: Tensor
    key_tiles: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """One part of a pattern as batches: queries in an order of tiles, and the way back to raster order."""

    queries: Tensor
    """[tiles·BLOCK] tokens, tile by tile."""
    query_place: Tensor
    """[T] where each token lies in `queries`."""
    key_place: Tensor
    """[T] where each token lies in the tiles of keys."""
    key_tiles: int
    batches: tuple[Batch, ...]
    bias: Tensor
    """[masks + 2, BLOCK, BLOCK] float32: 0 or -inf; the last but one hides all, the last hides nothing."""


def _tokens(first: np.ndarray, tile: tuple[int, int], lists: BlockLists) -> np.ndarray:
    """Tokens of the tiles that begin at `first`; those beyond the image, which no mask shows, become a token inside it."""
    i = np.arange(tile[0] * tile[1])
    return np.minimum(first[:, None] + i // tile[1] * lists.pitch + i % tile[1], lists.tokens - 1)


def _places(tile: tuple[int, int], lists: BlockLists, position: np.ndarray) -> np.ndarray:
    """Where each token lies, when tile number t stands at ``position[t]``."""
    token = np.arange(lists.tokens)
    y, x = token // lists.pitch, token % lists.pitch
    number = y // tile[0] * -(-lists.pitch // tile[1]) + x // tile[1]
    return position[number] * (tile[0] * tile[1]) + y % tile[0] * tile[1] + x % tile[1]


def _first_tokens(tile: tuple[int, int], lists: BlockLists, count: int) -> np.ndarray:
    across = -(-lists.pitch // tile[1])
    number = np.arange(count)
    return number // across * tile[0] * lists.pitch + number % across * tile[1]


def _groups(lists: BlockLists) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Tiles of queries that run together: their numbers, how many tiles of keys each gets, whether all have equal masks.

    Tiles with equal masks share one; the rest are padded to 1, 2, 3, 4, 6, 8, 12, ... tiles of keys, a third too many at most.
    """
    pointer = lists.q_ptr.numpy()
    masks = lists.q_masks.numpy()
    alike: dict[bytes, list[int]] = {}
    for tile in range(len(pointer) - 1):
        alike.setdefault(masks[pointer[tile] : pointer[tile + 1]].tobytes(), []).append(tile)
    others: dict[int, list[int]] = {}
    for members in alike.values():
        count = int(pointer[members[0] + 1] - pointer[members[0]])
        if len(members) >= 4 or count == 0:
            yield np.array(members), count, True
            continue
        half = 1 << max(count - 1, 0).bit_length() >> 1
        padded = count if count <= 4 else half + half // 2 if count <= half + half // 2 else 2 * half
        others.setdefault(padded, []).extend(members)
    for padded, members in others.items():
        yield np.array(members), padded, False


@kept
def plan(key: str, part: int) -> Plan:
    """The batches of one part of a registered layout."""
    lists = layouts.lists_of(key, BLOCK, BLOCK)[part]
    pointer, places, masks = (x.numpy() for x in (lists.q_ptr, lists.q_keys, lists.q_masks))
    firsts = lists.first_tokens
    hidden, full = len(lists.masks), len(lists.masks) + 1
    rows, cols = lists.k_tile
    numbers = places[:, 0] // rows * -(-lists.pitch // cols) + places[:, 1] // cols
    batches = []
    order: list[int] = []
    for members, width, same in _groups(lists):
        entries = pointer[members][:, None] + np.arange(width)
        inside = entries < pointer[members + 1][:, None]
        entries = np.where(inside, entries, 0)
        ids = np.where(inside, np.where(masks[entries] == FULL, full, masks[entries]), hidden) if width else entries
        first = np.where(inside, firsts[entries], 0) if width else entries
        tokens = _tokens(first.reshape(-1), lists.k_tile, lists).reshape(len(members), width * BLOCK)
        batches.append(
            Batch(
                tiles=slice(len(order), len(order) + len(members)),
                keys=torch.from_numpy(tokens.astype(np.int32)),
                key_tiles=torch.from_numpy(np.where(inside, numbers[entries], 0) if width else entries),
                masks=torch.from_numpy(ids[:1] if same else ids),
            )
        )
        order.extend(members.tolist())
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    queries = _tokens(_first_tokens(lists.q_tile, lists, len(order))[order], lists.q_tile, lists)
    bits = torch.cat(
        [lists.bits(), torch.zeros(1, BLOCK, BLOCK, dtype=torch.bool), torch.ones(1, BLOCK, BLOCK, dtype=torch.bool)]
    )
    key_tiles = len(lists.k_ptr) - 1
    return Plan(
        queries=torch.from_numpy(queries.reshape(-1)),
        query_place=torch.from_numpy(_places(lists.q_tile, lists, position)),
        key_place=torch.from_numpy(_places(lists.k_tile, lists, np.arange(key_tiles))),
        key_tiles=key_tiles,
        batches=tuple(batches),
        bias=torch.zeros(bits.shape).masked_fill(~bits, -torch.inf),
    )
