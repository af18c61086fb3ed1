"""Palettes: the colours that tokens stand for. Learned by k-means, evenly spaced, or read from a pretrained model.

A palette file is the `preprocessor_config.json` of a Hugging Face ImageGPT, its "clusters" in [-1, 1]: c / 127.5 - 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from igpt.checks import check_bool, check_int, check_path
from igpt.errors import CheckpointError, ConfigError, DataError, IgptError
from igpt.files import write_json
from igpt.kernels import state
from igpt.palette.arrays import as_array, check_pixels, is_dense
from igpt.palette.formats import SLACK, palette_file, read_clusters
from igpt.palette.kmeans import learn_colors
from igpt_kernels.palette import Backend, PaletteTable, palette_lookup

# Colours are multiples of 2^-16: then every squared distance to a uint8 pixel fits into the 53 bits of a float64, and the form
# on disk comes back bit for bit. The change to a colour, at most 2^-17 of 255, is that of a float32 in [-1, 1].
_GRID = 65536.0
_CHUNK = 4_000_000  # pixels compared at a time by `Palette.error`


class QuantizationError(NamedTuple):
    """What a palette loses. mean_delta: mean |ΔRGB| over pixels and channels, of 255. psnr: in dB, inf for no loss."""

    mean_delta: float
    psnr: float

    def __str__(self) -> str:
        return f"mean error {self.mean_delta:.2f} of 255, PSNR {self.psnr:.1f} dB"


class ErrorMeter:
    """Adds up the difference between images and their decoded tokens, exactly (integer sums)."""

    def __init__(self) -> None:
        self._count = self._sum = self._squares = 0

    def add(self, images: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> None:
        """Two uint8 arrays of one shape."""
        delta = np.abs(images.astype(np.int32) - decoded)
        self._count += delta.size
        self._sum += int(delta.sum(dtype=np.int64))
        self._squares += int((delta * delta).sum(dtype=np.int64))

    def result(self) -> QuantizationError:
        """The error so far. Raises `DataError` before any image."""
        if self._count == 0:
            raise DataError("images hold no pixels to measure the palette on")
        psnr = math.inf if self._squares == 0 else 10.0 * math.log10(255.0**2 * self._count / self._squares)
        return QuantizationError(self._sum / self._count, psnr)


class Palette(state.Swappable):
    """V colours. Token v stands for colour v; a pixel becomes the nearest colour, ties the lowest token.

    Args:
        colors: [V,3], RGB on the 0..255 scale, fractions allowed, 2 <= V <= 65536; rounded to multiples of 2^-16.
        height, width: size of the images it was made for, or None; only written to and read from files.

    Attributes:
        colors: float64 [V,3], read-only.
        size: V.

    Raises:
        ConfigError: another shape, too few or many colours, values that are not numbers in 0..255.
    """

    def __init__(self, colors: ArrayLike, *, height: int | None = None, width: int | None = None) -> None:
        try:
            given = as_array("colors", colors)
        except DataError as error:
            raise ConfigError(str(error)) from error
        if given.dtype.kind not in "iuf" or given.ndim != 2 or given.shape[1] != 3:
            raise ConfigError(f"colors must be numbers [V,3], got shape {given.shape} of {given.dtype}")
        array = given.astype(np.float64)
        if not 2 <= len(array) <= 65536:
            raise ConfigError(f"colors must be 2 to 65536, got {len(array)}")
        if not np.isfinite(array).all():
            raise ConfigError(f"colors must be finite, got {array[~np.isfinite(array).all(axis=1)][0].tolist()}")
        if array.min() < -SLACK or array.max() > 255.0 + SLACK:
            raise ConfigError(f"colors must lie in 0..255, got {array.min():g}..{array.max():g}")
        self.colors: NDArray[np.float64] = np.rint(array.clip(0.0, 255.0) * _GRID) / _GRID
        self.colors.setflags(write=False)
        self.height = _side("height", height)
        self.width = _side("width", width)
        self._bytes = np.rint(self.colors).astype(np.uint8)
        self._table: PaletteTable | None = None
        self._lock = threading.Lock()
        state.prepare(self)

    def __repr__(self) -> str:
        return f"Palette({self.size} colours)"

    @property
    def size(self) -> int:
        """V."""
        return len(self.colors)

    @property
    def table(self) -> PaletteTable:
        """The lookup table, made at the first `encode` (0.03 s compiled, 0.4 s without) and kept; 32 MB."""
        with self._lock:
            if self._table is None:
                self._table = PaletteTable(self.colors.copy())  # torch warns about read-only memory
            return self._table

    def _backend(self) -> Backend:
        """What `use_kernels` said; before that the library's own choice, and "off" is plain PyTorch."""
        settings = state.settings_of(self)
        if not settings["swap_id"]:
            return "auto"
        backend = settings["palette"]
        if backend is not None:
            state.count(settings, "palette")
        return cast(Backend, backend or "torch")

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.colors, self.height, self.width)

    @classmethod
    def fit(
        cls, images: ArrayLike, k: int = 512, *, max_pixels: int = 2_000_000, seed: int = 0, progress: bool = True
    ) -> Palette:
        """Learn k colours by k-means (scikit-learn) from the pixels of images.

        The different colours, weighted by how often they occur, are clustered. k-means++ and Lloyd iterations find a start on
        64 pixels a colour (5,000 at least); for 32 colours or fewer the better of two. Lloyd iterations over all pixels
        follow, until ten of them lower the squared error by less than 0.1 %, at most 101. One step in exact arithmetic ends
        it: each colour is the mean of its pixels. Of exactly k different colours, those are the palette. Sorted from dark to
        bright by 0.299 R + 0.587 G + 0.114 B, then by R, G, B. The same arguments give the same palette on one machine.
        k-means uses two threads at most: the partial sums of more would be added in any order.

        Args:
            images: uint8 [...,3].
            k: colours, 2..65536.
            max_pixels: of more pixels, this many are drawn, evenly over all.
            seed: of the drawing and of k-means.
            progress: show a bar on stderr.

        Raises:
            ConfigError: k or max_pixels out of range, or fewer than k different colours in the images; says how many.
            DataError: not uint8 [...,3], or empty.
            MissingExtra: scikit-learn is not installed.

        Cost: 2 million pixels of photographs, k = 512: about 5 s on 2 idle cores.
        """
        pixels = check_pixels(images).reshape(-1, 3)
        k, seed = check_int("k", k, 2, 65536), check_int("seed", seed, 0)
        max_pixels, progress = check_int("max_pixels", max_pixels, 1), check_bool("progress", progress)
        if len(pixels) == 0:
            raise DataError("images hold no pixels to learn a palette from")
        return cls(learn_colors(pixels, k, max_pixels=max_pixels, seed=seed, progress=progress))

    @classmethod
    def uniform(cls, k: int = 512) -> Palette:
        """The most even grid of r x g x b = k colours, each channel from 0 to 255: 8 x 8 x 8 for 512, 8 x 8 x 4 for 256.

        Of levels that differ, green gets most and blue fewest, as the eye has it. Token = (r · G + g) · B + b.

        Raises:
            ConfigError: k has no grid with 2 levels a channel or more; names the nearest numbers that have.
        """
        k = check_int("k", k, 2, 65536)
        levels = _grid_levels(k) if k >= 8 else None
        if levels is None:
            near = sorted(range(8, 65537), key=lambda other: (abs(other - k), other))
            have = [str(other) for other in _first_with_grid(near, 2)]
            raise ConfigError(f"k = {k} colours make no grid of r x g x b with 2 levels or more each; {' and '.join(have)} do")
        axes = [np.linspace(0.0, 255.0, n) for n in levels]
        return cls(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Palette:
        """Read a palette.

        Args:
            path: a folder with `preprocessor_config.json` or `kmeans_centers.npy`; such a file itself (any .json with
                "clusters", any .npy); or a Hugging Face id such as ``openai/imagegpt-small`` (needs huggingface_hub). Values
                are [V,3] in [-1, 1].

        Raises:
            CheckpointError: missing, or malformed; names the file and what is wrong with it.
        """
        check_path("path", path)
        file = palette_file(path)
        try:
            colors, height, width = read_clusters(file)
            return cls(colors, height=height, width=width)
        except CheckpointError:
            raise
        except IgptError as error:
            text = str(error)
            raise CheckpointError(text if str(file) in text else f"{file}: {text}") from error

    def save(self, folder: str | Path, *, height: int | None = None, width: int | None = None) -> None:
        """Write `preprocessor_config.json` into a folder (made if missing), replacing it in one step.

        transformers' ImageGPT image processor reads it and then makes the same tokens. Its "size" is height x width, here
        or as the palette was read; with neither known, do_resize is false: the processor's own 256 x 256 would be more tokens
        than most models have positions.

        Raises:
            DataError: the file cannot be written.
            ConfigError: only one of height and width.
        """
        folder = check_path("folder", folder)
        height, width = _side("height", height), _side("width", width)
        if (height is None) != (width is None):
            raise ConfigError(f"give both height and width or neither, got {height} and {width}")
        if height is None:
            height, width = self.height, self.width
        write_json(folder / "preprocessor_config.json", self.as_dict(height, width))

    def as_dict(self, height: int | None = None, width: int | None = None) -> dict[str, Any]:
        """The content of `preprocessor_config.json`; its "size" where both height and width are given."""
        height, width = _side("height", height), _side("width", width)
        known = height is not None and width is not None
        return {
            "clusters": (self.colors / 127.5 - 1.0).tolist(),
            "do_color_quantize": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": known,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "ImageGPTImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "rescale_factor": 1 / 255,
            **({"size": {"height": height, "width": width}} if known else {}),
        }

    def encode(self, images: ArrayLike | torch.Tensor) -> torch.Tensor:
        """Nearest colours: uint8 [...,h,w,3] -> int64 tokens [..., h·w], row by row, on the images' device.

        Raises:
            DataError: another dtype or shape.
        """
        if isinstance(images, torch.Tensor) and is_dense(images):
            if images.dtype != torch.uint8 or images.dim() < 3 or images.shape[-1] != 3:
                raise DataError(f"images must be uint8 [...,h,w,3], got {list(images.shape)} of {images.dtype}")
            pixels = images
        else:
            # torch warns about memory that it may not write, such as a memory map; that is copied.
            array = np.require(check_pixels(images), requirements=["C", "W"])
            if array.ndim < 3:
                raise DataError(f"images must be uint8 [...,h,w,3], got {list(array.shape)}")
            pixels = torch.from_numpy(array)
        backend = self._backend()
        tokens: torch.Tensor = palette_lookup(pixels, self.table, backend=backend).flatten(-2)
        return tokens

    def decode(
        self, tokens: ArrayLike | torch.Tensor, height: int | None = None, width: int | None = None
    ) -> NDArray[np.uint8]:
        """Colours of tokens: integers [...,T] -> uint8 [...,h,w,3], rounded to whole values.

        Args:
            tokens: 0 .. V-1.
            height, width: h · w = T; both or neither. Neither takes T as a square.

        Raises:
            ConfigError: T is not h x w.
            DataError: not integers, or a token outside the palette.
        """
        array = as_array("tokens", tokens)
        if array.dtype.kind not in "iu" or array.ndim < 1:
            raise DataError(f"tokens must be integers [...,T], got shape {array.shape} of {array.dtype}")
        if array.size and (array.min() < 0 or array.max() >= self.size):
            raise DataError(f"tokens must lie in 0..{self.size - 1}, got {array.min()}..{array.max()}")
        length = array.shape[-1]
        if height is None and width is None:
            height = width = max(math.isqrt(length), 1)
        height, width = _side("height", height), _side("width", width)
        if height is None or width is None or height * width != length:
            raise ConfigError(f"{length} tokens are not an image of {height} x {width}; give its height and width")
        pixels: NDArray[np.uint8] = self._bytes[array].reshape(*array.shape[:-1], height, width, 3)
        return pixels

    def error(self, images: ArrayLike | torch.Tensor) -> QuantizationError:
        """What encoding and decoding changes: uint8 [...,3] -> `QuantizationError`. Raises `DataError` as `encode`."""
        pixels = check_pixels(images).reshape(-1, 3)
        meter = ErrorMeter()
        for start in range(0, len(pixels), _CHUNK):
            part = pixels[start : start + _CHUNK]
            meter.add(part, self._bytes[self.encode(part[None]).numpy()])
        return meter.result()


def _again(colors: NDArray[np.float64], height: int | None, width: int | None) -> Palette:
    """A copy or pickle of a palette: its colours are on the grid already."""
    return Palette(colors, height=height, width=width)


def _side(name: str, value: int | None) -> int | None:
    """Rows or columns of an image, or None."""
    return None if value is None else check_int(name, value, 1, 65536)


def _grid_levels(k: int) -> tuple[int, int, int] | None:
    best: tuple[float, tuple[int, int, int]] | None = None
    for blue in range(2, round(k ** (1 / 3)) + 1):
        for red in range(blue, math.isqrt(k // blue) + 1):
            if k % (blue * red) == 0 and k // (blue * red) <= 256:
                green = k // (blue * red)
                if best is None or green / blue < best[0]:
                    best = (green / blue, (red, green, blue))
    return None if best is None else best[1]


def _first_with_grid(numbers: Sequence[int], count: int) -> list[int]:
    found: list[int] = []
    for number in numbers:
        if _grid_levels(number) is not None:
            found.append(number)
            if len(found) == count:
                break
    return sorted(found)
