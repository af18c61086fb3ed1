"""The oracles: each operator written out as it is defined, in eager PyTorch. For reading and for tests, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor


def palette_lookup_reference(pixels: Tensor, colors: Tensor) -> Tensor:
    """The nearest palette colour of each pixel, by trying them all.

    The distance of the pixel (r, g, b) to the colour (R, G, B) is (r-R)² + (g-G)² + (b-B)², evaluated in float64 in that
    order; of equal distances the lowest index wins.

    Args:
        pixels: uint8 [..., 3].
        colors: float64 [V, 3], on the device of `pixels`.

    Returns:
        int64 [...]. Costs 20 bytes a pixel and about V nanoseconds a pixel and core.
    """
    red, green, blue = pixels.to(torch.float64).unbind(-1)
    least = torch.full_like(red, torch.inf)
    winner = torch.zeros_like(red, dtype=torch.int64)
    for index, color in enumerate(colors):
        distance = (red - color[0]) ** 2 + (green - color[1]) ** 2 + (blue - color[2]) ** 2
        winner = torch.where(distance < least, index, winner)
        least = torch.minimum(distance, least)
    return winner


def palette_table_reference(colors: Tensor) -> Tensor:
    """`palette_lookup_reference` of all 2²⁴ colours (r, g, b), in the order of r·2¹⁶ + g·2⁸ + b: the same sums, term by term.

    Args:
        colors: float64 [V, 3].

    Returns:
        int64 [2²⁴] on the device of `colors`. Costs about V / 100 seconds on two cores.
    """
    levels = torch.arange(256, dtype=torch.float64, device=colors.device)
    red, green, blue = ((levels[None, :] - colors[:, channel, None]) ** 2 for channel in range(3))  # each [V, 256]
    rows = []
    for r in range(256):
        least = torch.full((256, 256), torch.inf, dtype=torch.float64, device=colors.device)
        winner = torch.zeros((256, 256), dtype=torch.int32, device=colors.device)
        for index in range(colors.shape[0]):
            distance = (red[index, r] + green[index])[:, None] + blue[index]
            winner.masked_fill_(distance < least, index)
            torch.minimum(distance, least, out=least)
        rows.append(winner.flatten())
    return torch.cat(rows).to(torch.int64)
