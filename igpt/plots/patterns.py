"""A sparse attention pattern as a picture: what one pixel sees, and the tiles that are touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from igpt.errors import import_extra
from igpt.plots.curves import BLUE, GREY, ORANGE, new_figure
from igpt_kernels.block_lists import FULL, BlockLists

if TYPE_CHECKING:
    from igpt_kernels.layouts import SparseLayout


PARTIAL = "#9dbbe0"
FUTURE = "#ececec"
NOTHING = "white"
FINEST = 1024
"""Dots along the picture of tiles, at most: it is some 500 pixels wide."""
LARGEST_REACH = 64 * 64  # tokens: the product of two such masks takes a second or two


def pixel_view(layout: SparseLayout, query: int) -> npt.NDArray[np.uint8]:
    """What one pixel sees, [h,w]: 0 nothing there, 1 not allowed by the order, 2 seen, 3 the pixel itself."""
    view = np.zeros(layout.height * layout.width, dtype=np.uint8)
    if layout.causal:
        view[query + 1 :] = 1
    view[layout.keys_of(query).numpy()] = 2
    view[query] = 3
    return view.reshape(layout.height, layout.width)


def block_view(lists: BlockLists) -> npt.NDArray[np.uint8]:
    """The tiles of one part, [query tiles, key tiles]: 0 not touched, 1 touched with a mask, 2 full.

    Beyond `FINEST` tiles along a side, a dot stands for several and shows the fullest.
    """
    pointer = lists.q_ptr.numpy()
    rows, cols = lists.k_tile
    place = lists.q_keys.numpy()
    tiles = place[:, 0] // rows * -(-lists.pitch // cols) + place[:, 1] // cols
    sides = len(pointer) - 1, len(lists.k_ptr) - 1
    dots = [-(-side // FINEST) for side in sides]
    owner = np.repeat(np.arange(sides[0]), np.diff(pointer))
    view = np.zeros((-(-sides[0] // dots[0]), -(-sides[1] // dots[1])), dtype=np.uint8)
    full = lists.q_masks.numpy() == FULL
    for value, which in ((1, ~full), (2, full)):
        view[owner[which] // dots[0], tiles[which] // dots[1]] = value
    return view


def reach(first: SparseLayout, second: SparseLayout) -> float:
    """The share of the causal triangle that is seen through two layers: pairs (i, k) with a pixel j: i sees j in the second
    layer, and j sees k in the first. Costs a product of two T x T matrices.
    """
    both = second.dense_mask().float() @ first.dense_mask().float()
    return float(both.count_nonzero()) / (first.tokens * (first.tokens + 1) / 2)


def plot_layout(layout: SparseLayout, query: int, path: Path | str) -> None:
    """A PNG: the image as one pixel sees it, and beside it the tiles of each part of the pattern.

    Args:
        layout: the pattern.
        query: raster position of the pixel.
        path: the PNG to write; its folder must exist.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    colors = import_extra("matplotlib.colors", "eval")
    patches = import_extra("matplotlib.patches", "eval")
    parts = layout.block_lists()
    figure = new_figure(4.6 * (1 + len(parts)), 5.4)
    axes = figure.subplots(1, 1 + len(parts))
    y, x = divmod(query, layout.width)
    palette = colors.ListedColormap([NOTHING, FUTURE, BLUE, ORANGE])
    axes[0].imshow(pixel_view(layout, query), cmap=palette, vmin=0, vmax=3, interpolation="nearest")
    axes[0].set_title(f"pixel (row {y}, column {x}) sees {len(layout.keys_of(query)):,} pixels", fontsize=11)
    axes[0].set_xlabel("column")
    axes[0].set_ylabel("row")
    keys = [("the pixel", ORANGE), ("seen", BLUE)] + ([("later in raster order", FUTURE)] if layout.causal else [])
    handles = [patches.Patch(facecolor=color, edgecolor=GREY, linewidth=0.5, label=label) for label, color in keys]
    axes[0].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    palette = colors.ListedColormap([NOTHING, PARTIAL, BLUE])
    for axis, lists in zip(axes[1:], parts, strict=True):
        axis.imshow(block_view(lists), cmap=palette, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
        tile = f"{lists.q_tile[0]} × {lists.q_tile[1]}"
        axis.set_title(f"{lists.blocks:,} blocks of {tile} pixels", fontsize=11)
        axis.set_xlabel("tile of keys")
        axis.set_ylabel("tile of queries")
        handles = [
            patches.Patch(facecolor=color, edgecolor=GREY, linewidth=0.5, label=label)
            for label, color in (("full", BLUE), ("with a mask", PARTIAL))
        ]
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=9)
    share, held = (f"{100 * density:.2g} %" for density in (layout.density, layout.tile_density))
    size = f"{layout.pattern.spec} on {layout.height} × {layout.width}"
    figure.suptitle(f"{size}: {share} of the pairs of dense causal attention, its blocks hold {held}", fontsize=12)
    figure.savefig(path, format="png")
