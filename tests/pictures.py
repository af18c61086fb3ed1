"""Pictures for tests: noise, smooth colours, files of them, and the nearest colours."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = Image.fromarray(noise(4, 4, seed))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def picture(height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    """Smooth shapes and some noise: compresses like a photograph."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    shapes = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((shapes + generator.integers(-8, 9, shapes.shape)).clip(0, 255).astype(np.uint8))


def encoded(kind: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def nearest(pixels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """The index of the nearest colour, by brute force in float64: [...,3] and [V,3] -> [...]."""
    delta = pixels.reshape(-1, 1, 3).astype(np.float64) - colors
    return (delta[..., 0] ** 2 + delta[..., 1] ** 2 + delta[..., 2] ** 2).argmin(1).reshape(pixels.shape[:-1])
