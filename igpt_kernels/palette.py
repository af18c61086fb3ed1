"""Exact colour quantisation: the nearest of V palette colours for every pixel, at the price of one table read.

The answer for a pixel (r, g, b) is the entry (R, G, B) with the least (r-R)² + (g-G)² + (b-B)². The sum is taken in float64,
in that order; of equal distances the lowest index wins. There are only 2²⁴ different pixels, so a palette is turned into a
table of all answers once; after that a lookup costs the same for 2 and for 65,536 colours. Every backend gives the same bits.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from igpt_kernels import backends
from igpt_kernels._native import load
from igpt_kernels._ops.transforms import over_leading
from igpt_kernels._torch import palette as torch_palette
from igpt_kernels.checks import FLOAT_DTYPES, INT_DTYPES, check_memory, check_tensor, check_whole
from igpt_kernels.messages import shown
from igpt_kernels.reference import palette_lookup_reference

Backend = Literal["auto", "ext", "torch", "reference"]
Maker = Literal["ext", "torch"]

# The greatest V whose indices a dtype of tokens holds.
_CAPACITY = {torch.uint8: 256, torch.int16: 1 << 15, torch.uint16: 1 << 16, torch.int32: 1 << 16, torch.int64: 1 << 16}
_MAX_COLORS = 1 << 16
# Colours this far from the cube are a mistake of scale; and from 1e8 on, rounding makes them indistinguishable.
_MAX_VALUE = float(1 << 20)


class PaletteTable:
    """A palette of V colours. At the first lookup the table of the nearest one to each of the 2²⁴ colours is made.

    Args:
        colors: [V, 3] numbers (nested sequence, array or real tensor), 2 <= V <= 65536; on the 0..255 scale of uint8 pixels;
            fractions and values outside 0..255 are allowed, up to ±2²⁰. Copied.
        backend: what makes the table and looks pixels up. ``"ext"`` is the compiled extension (tensors on the CPU and on
            NVIDIA GPUs); ``"torch"`` is PyTorch operations (any device); ``"reference"`` tries every colour for every
            pixel, without a table. ``"auto"`` takes ``"ext"`` if it is loaded for the device of the pixels, else
            ``"torch"``. Asked for by name, a backend never falls back to another; and an extension that was not built is built
            then, if there is a C++ compiler; (10 to 30 s, once on a machine; IGPT_JIT=0 forbids it).

    The table takes 32 MB on each device that pixels are looked up on, is made there, and cached here. For 512 colours it
    costs one core about 0.03 s with ``"ext"`` and 0.4 s with ``"torch"``; for 65,536, 0.3 s and 3 s. Palettes whose colours
    all lie on one line are the worst known: 0.2 s and 3 s for 512, 25 s and many minutes for 65,536.
    Safe to share between threads; a pickle or copy carries the colours and makes its own table.

    Raises:
        TypeError: `colors` does not hold real numbers.
        ValueError: `colors` has another shape or size, or a value that is not finite or beyond ±2²⁰; `backend` is unknown.
        BackendUnavailable (a ValueError): `backend` is ``"ext"``, and the extension is not loaded; the message says why.
    """

    def __init__(self, colors: Any, *, backend: Backend = "auto") -> None:
        self._colors = _checked_colors(colors)
        _choose(backend, torch.device("cpu"), "PaletteTable")
        self._backend = backend
        self._lock = threading.Lock()
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def colors(self) -> Tensor:
        """float64 [V, 3] on the CPU: a copy, so that the table stays true."""
        return self._colors.clone()

    @property
    def size(self) -> int:
        """V."""
        return self._colors.shape[0]

    def __repr__(self) -> str:
        return f"PaletteTable({self.size} colors, backend={self._backend!r})"

    def lookup(self, pixels: Tensor, *, channel_dim: int = -1, dtype: torch.dtype = torch.int64) -> Tensor:
        """The index of the nearest colour of each pixel.

        Args:
            pixels: uint8 with size 3 (red, green, blue) in `channel_dim`, any other sizes (0 too), any strides, any device.
            channel_dim: -1 for [..., h, w, 3], -3 for [..., 3, h, w].
            dtype: of the result: uint8 (V <= 256), int16 (V <= 32768), uint16, int32 or int64.

        Returns:
            The shape of `pixels` without `channel_dim`, contiguous, on the device of `pixels`. On a CPU ``"ext"`` takes 1 to
            3 ns a pixel and core, without a copy of `pixels`; on a GPU it is one launch, on the current stream.

        Raises:
            TypeError: `pixels` is not a uint8 tensor, or `dtype` not one of the five.
            ValueError: no dimension `channel_dim`, or its size is not 3; V indices do not fit `dtype`.
            BackendUnavailable (a ValueError): the backend of this palette, asked for by name, cannot take these pixels.
        """
        return _lookup(self, pixels, channel_dim, dtype, self._backend)

    def colors_of(self, tokens: Tensor) -> Tensor:
        """The colours that tokens stand for.

        Args:
            tokens: [...] of any integer dtype, 0 <= token < V.

        Returns:
            float64 [..., 3] on the device of `tokens`.

        Raises:
            TypeError: `tokens` is not a tensor of integers.
            ValueError: a token is outside 0..V-1.
        """
        _check_tokens(tokens)
        return over_leading(self._colors_of, tokens)

    def _colors_of(self, tokens: Tensor) -> Tensor:
        index = tokens.to(torch.int64)
        if index.numel() > 0 and type(index) is Tensor and not index.is_meta:  # others have no values to check
            low, high = index.aminmax()
            if low < 0 or high >= self.size:
                self._refuse(index)
        return self._colors.to(index.device)[index]

    def pixels_of(self, tokens: Tensor, *, channel_dim: int = -1) -> Tensor:
        """The pixels that tokens stand for: `colors_of`, rounded to whole values (half to even) and cut off at 0 and 255.

        Args:
            tokens: [...] of any integer dtype, 0 <= token < V, any strides, any device.
            channel_dim: where the result has its red, green and blue: -1 for [..., h, w, 3], -3 for [..., 3, h, w].

        Returns:
            uint8 with the shape of `tokens` and size 3 in `channel_dim`, contiguous, on the device of `tokens`. One pass
            with ``"ext"``; on a GPU the check of the tokens waits for the device.

        Raises:
            TypeError: `tokens` is not a tensor of integers.
            ValueError: a token is outside 0..V-1, or the result would have no dimension `channel_dim`.
            BackendUnavailable (a ValueError): the backend of this palette, asked for by name, cannot take these tokens.
        """
        _check_tokens(tokens)
        dims = tokens.ndim + 1
        channel_dim = check_whole("channel_dim", channel_dim)
        if not -dims <= channel_dim < dims:
            raise ValueError(f"channel_dim={channel_dim} is no dimension of pixels for tokens of shape {list(tokens.shape)}")
        return over_leading(functools.partial(self._pixels_of, from_last=dims - channel_dim % dims), tokens)

    def _pixels_of(self, tokens: Tensor, from_last: int) -> Tensor:
        """`pixels_of` with red, green and blue in dimension ``-from_last``."""
        channel_dim = tokens.ndim + 1 - from_last
        if _choose(self._backend, tokens.device, "pixels_of") != "ext":
            colors = self.colors_of(tokens).round().clamp(0, 255).to(torch.uint8)
            return colors.movedim(-1, channel_dim).contiguous()
        shape = (*tokens.shape[:channel_dim], 3, *tokens.shape[channel_dim:])
        pixels = torch.empty(shape, dtype=torch.uint8, device=tokens.device)
        known = tokens if tokens.dtype in _CAPACITY else tokens.to(torch.int64)
        beyond = torch.zeros(1, dtype=torch.int32, device=tokens.device)
        run = math.prod(tokens.shape[channel_dim:]) or 1
        torch.ops.igpt_kernels.palette_pixels(self._bytes(tokens.device), known.contiguous(), run, pixels, beyond)
        if beyond.item():
            self._refuse(tokens)
        return pixels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the colours to a safetensors file ("colors", float64 [V, 3]). An existing file is replaced in one step."""
        from safetensors.torch import save

        target = _checked_path(path)
        content = save({"colors": self._colors}, metadata={"format": "pt", "kind": "igpt_kernels.PaletteTable"})
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: Backend = "auto") -> PaletteTable:
        """Read a palette that `save` has written.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a safetensors file, holds no "colors", or colours that `PaletteTable` refuses.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = _checked_path(path).read_bytes()
        try:
            tensors = load(content)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if "colors" not in tensors:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise ValueError(f'{path} is not a palette: it must hold "colors" [V, 3], and holds {found}')
        try:
            return cls(tensors["colors"], backend=backend)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"colors": self._colors, "backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._colors = state["colors"].clone()
        self._backend = state["backend"]
        self._lock = threading.Lock()
        self._tables = {}

    def _table(self, maker: Maker, device: torch.device) -> Tensor:
        """The table made by `maker`, on `device`; uint16 [2²⁴]."""
        table = self._tables.get((maker, device))
        return self._make_table(maker, device) if table is None else table

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make_table(self, maker: Maker, device: torch.device) -> Tensor:
        # Apple's GPUs have no float64, and the extension works on some devices only; elsewhere the table is a copy.
        at_home = _ext_serves(device) if maker == "ext" else device.type != "mps"
        home = device if at_home else torch.device("cpu")
        with self._lock:
            if (maker, home) not in self._tables:
                if maker == "ext":
                    load.require()
                    self._tables[maker, home] = torch.ops.igpt_kernels.palette_table(self._colors.to(home))
                else:
                    self._tables[maker, home] = torch_palette.build_table(self._colors.to(home))
            if (maker, device) not in self._tables:
                self._tables[maker, device] = self._tables[maker, home].to(device)
            return self._tables[maker, device]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _bytes(self, device: torch.device) -> Tensor:
        """The colours as pixels: uint8 [V, 4] on `device`, the fourth 0, so that a colour is one word."""
        with self._lock:
            if ("bytes", device) not in self._tables:
                whole = self._colors.round().clamp(0, 255).to(torch.uint8)
                self._tables["bytes", device] = torch.nn.functional.pad(whole, (0, 1)).to(device)
            return self._tables["bytes", device]

    def _refuse(self, tokens: Tensor) -> NoReturn:
        low, high = (int(bound) for bound in tokens.to(torch.int64).aminmax())
        raise ValueError(f"tokens must be in 0..{self.size - 1} for a palette of {self.size} colors, got {low}..{high}")


def palette_lookup(
    pixels: Tensor, table: PaletteTable, *, dtype: torch.dtype = torch.int64, backend: Backend = "auto"
) -> Tensor:
    """The index of the nearest palette colour of each pixel.

    Args:
        pixels: uint8 [..., 3] (red, green, blue), any strides, any device. For other layouts see `PaletteTable.lookup`.
        table: the palette.
        dtype: of the result: uint8 (V <= 256), int16 (V <= 32768), uint16, int32 or int64.
        backend: as in `PaletteTable`; ``"auto"`` is that of `table`.

    Returns:
        tokens [...] on the device of `pixels`.

    Raises:
        TypeError: `pixels` is not a uint8 tensor, `table` not a `PaletteTable`, or `dtype` not one of the five.
        ValueError: the last size of `pixels` is not 3; V indices do not fit `dtype`; `backend` is unknown.
        BackendUnavailable (a ValueError): the backend asked for by name cannot take these pixels; the message says why.
    """
    if not isinstance(table, PaletteTable):
        raise TypeError(f"table must be a PaletteTable, got {type(table).__name__}; make one with PaletteTable(colors)")
    return _lookup(table, pixels, -1, dtype, table._backend if isinstance(backend, str) and backend == "auto" else backend)


def _lookup(table: PaletteTable, pixels: Tensor, channel_dim: int, dtype: torch.dtype, backend: Backend) -> Tensor:
    channel_dim = _checked_pixels(pixels, channel_dim)
    _check_dtype(dtype, table.size)
    from_last = pixels.ndim - channel_dim
    return over_leading(lambda pixels: _find(table, pixels, pixels.ndim - from_last, dtype, backend), pixels)


def _find(table: PaletteTable, pixels: Tensor, channel_dim: int, dtype: torch.dtype, backend: Backend) -> Tensor:
    """`palette_lookup` of checked arguments."""
    chosen = _choose(backend, pixels.device, "palette_lookup")
    if chosen == "reference":
        colors = table._colors.to(pixels.device)
        return palette_lookup_reference(pixels.movedim(channel_dim, -1).contiguous(), colors).to(dtype)
    if chosen == "ext":
        shape = pixels.shape[:channel_dim] + pixels.shape[channel_dim + 1 :]
        tokens = torch.empty(shape, dtype=dtype, device=pixels.device)
        torch.ops.igpt_kernels.palette_lookup(table._table("ext", pixels.device), pixels, channel_dim, tokens)
        return tokens
    # Even where the extension cannot look up, "auto" lets it make the table, which is then copied to the device.
    maker: Maker = "ext" if backend == "auto" and load.status().loaded else "torch"
    return torch_palette.lookup(table._table(maker, pixels.device), pixels, channel_dim, dtype)


def _choose(backend: Backend, device: torch.device, op: str) -> str:
    """The backend for tensors of `device`; asked for by name, an extension that was not built is built now."""
    if isinstance(backend, str) and backend == "ext" and load.status().path is None and not torch.compiler.is_compiling():
        load.build()
    return backends.choose(backend, backends.explain("palette_lookup", dtype=torch.uint8, device=device), op)


def _ext_serves(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda") and load.status("cuda" if device.type == "cuda" else "cpu").loaded


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {shown(path)}")
    if "\0" in os.fspath(path):
        raise ValueError(f"path must hold no null character, got {shown(path)}")
    return Path(path)


def _check_tokens(tokens: Tensor) -> None:
    check_tensor("tokens", tokens, dtypes=(*INT_DTYPES, torch.uint64))
    check_memory({"tokens": tokens})


def _checked_colors(colors: Any) -> Tensor:
    """A contiguous float64 copy [V, 3] on the CPU."""
    if isinstance(colors, Tensor):
        check_tensor("colors", colors)
        check_memory({"colors": colors})
        if colors.is_meta:
            raise ValueError("colors must have values, got a tensor on the device meta")
        real = colors.dtype in (*FLOAT_DTYPES, *INT_DTYPES, torch.uint64)
        kind, shape = f"a tensor of {colors.dtype}", list(colors.shape)
    else:
        try:
            colors = np.asarray(colors)  # not torch.as_tensor, which makes float32 of Python's floats
        except Exception as error:  # whatever an object of the caller raises
            reason = " ".join(str(error).split())
            raise TypeError(f"colors must be numbers [V, 3], got {shown(colors)} ({reason})") from error
        real = colors.dtype.kind in "iuf"
        kind, shape = f"an array of {colors.dtype}", list(colors.shape)
    if not real:
        raise TypeError(f"colors must be real numbers [V, 3], got {kind}")
    if len(shape) != 2 or shape[1] != 3 or not 2 <= shape[0] <= _MAX_COLORS:
        raise ValueError(f"colors must have shape [V, 3] with 2 <= V <= {_MAX_COLORS}, got {shape}")
    if isinstance(colors, Tensor):
        checked = colors.detach().to("cpu", torch.float64, copy=True).contiguous()
    else:
        checked = torch.from_numpy(colors.astype(np.float64, order="C"))
    wrong = ~(checked.abs() <= _MAX_VALUE)
    if wrong.any():
        row, channel = (int(place) for place in wrong.nonzero()[0])
        value = float(checked[row, channel])
        raise ValueError(
            f"colors must be finite, on the 0..255 scale, and within ±{_MAX_VALUE:.0f}; colors[{row}, {channel}] is {value}"
        )
    return checked


def _checked_pixels(pixels: Tensor, channel_dim: int) -> int:
    """`channel_dim`, counted from the front."""
    check_tensor("pixels", pixels, dtypes=(torch.uint8,))
    check_memory({"pixels": pixels})
    channel_dim = check_whole("channel_dim", channel_dim)
    if not -pixels.ndim <= channel_dim < pixels.ndim:
        raise ValueError(f"channel_dim={channel_dim} is no dimension of pixels with shape {list(pixels.shape)}")
    if pixels.shape[channel_dim] != 3:
        raise ValueError(
            f"pixels must have size 3 (red, green, blue) in dimension {channel_dim}, got shape {list(pixels.shape)}"
        )
    return channel_dim % pixels.ndim


def _check_dtype(dtype: torch.dtype, size: int) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in _CAPACITY:
        names = ", ".join(str(known).removeprefix("torch.") for known in _CAPACITY)
        raise TypeError(f"dtype must be one of {names}; got {shown(dtype)}")
    if size > _CAPACITY[dtype]:
        raise ValueError(f"dtype={dtype} holds the indices of at most {_CAPACITY[dtype]} colors, the palette has {size}")
