"""Images in memory as a source."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from igpt.data.images import crop_and_resize
from igpt.data.source import Batch, Source


class ArraySource(Source):
    """Images that are in memory already: uint8 [n,h,w,3], resized as they are asked for when another size is wanted."""

    def __init__(
        self,
        name: str,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        height: int | None,
        width: int | None,
    ) -> None:
        own_height, own_width = pixels.shape[1:3]
        super().__init__(
            name,
            "images",
            own_height if height is None else height,
            own_width if width is None else width,
            labels,
            classes,
        )
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, indices: ArrayLike, *, seed: int | None = None, first: int = 0) -> Batch:
        used = self.check_indices(indices)
        self.check_draws(seed, first)
        pixels = self._pixels[used]
        if pixels.shape[1:3] != (self.height, self.width):
            sized = np.empty((len(used), self.height, self.width, 3), dtype=np.uint8)
            for i, image in enumerate(pixels):
                sized[i] = crop_and_resize(Image.fromarray(image), self.height, self.width)
            pixels = sized
        return Batch(np.ascontiguousarray(pixels), self._labels_of(used), used)
