"""Cases of the palette: pixels to tokens, and making the table that answers them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.registry import Case, Cost, Method, Operation, Workload
from igpt_kernels.palette import PaletteTable, palette_lookup
from igpt_kernels.reference import palette_lookup_reference

COLOURS = 512
PILLOW_COLOURS = 256
ALLOWED = {"transformers": 1e-3, "scipy": 1e-3, "cdist": 1e-3, "pillow": 0.25}
"""Share of pixels for which a peer may name another colour than the nearest of lowest index; ours may for none.

They round a² - 2ab + b² in float32 or know no rule for ties; Pillow asks a cache of coarser colours.
"""
THEIRS = "transformers.models.imagegpt.image_processing_pil_imagegpt"
CHECKED = 1 << 18
"""Pixels that are compared with the oracle, which tries all colours for each."""
Lookup = Callable[[Tensor], Tensor]


def colours_of(case: Case) -> NDArray[np.float64]:
    """The palette, on the grid of 2⁻¹⁶ that tables keep colours on: normal values around grey."""
    count = PILLOW_COLOURS if case.method == "pillow" else COLOURS
    colours = np.random.default_rng(0).normal(110, 60, (count, 3)).clip(0, 255)
    if case.method == "pillow":
        colours = np.round(colours)  # it knows whole numbers only
    return np.asarray(np.round(colours * 65536) / 65536, dtype=np.float64)


def _pictures() -> list[Path]:
    """The files of scikit-learn's two photographs; none where it is missing. Importing it to ask takes 1.3 s a case."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None or importlib.util.find_spec("PIL") is None:
        return []
    return sorted((Path(found.origin).parent / "datasets" / "images").glob("*.jpg"))


def photographs(case: Case) -> Tensor:
    """uint8 [B,h,w,3]: squares of scikit-learn's two photographs; where it is missing, smooth noise."""
    side = case.size[0]
    if files := _pictures():
        from PIL import Image

        squares = []
        for index in range(case.batch):
            photo = Image.open(files[index % len(files)])
            left = (photo.width - photo.height) * index // max(case.batch, 1)
            square = photo.crop((left, 0, left + photo.height, photo.height)).resize((side, side), Image.Resampling.BOX)
            squares.append(np.asarray(square))
        return torch.from_numpy(np.stack(squares)).to(case.device)
    coarse = torch.rand(case.batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noisy = smooth + 0.03 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    return (noisy.clamp(0, 1) * 255).byte().movedim(1, -1).contiguous().to(case.device)


def prepare(case: Case, subject: Lookup) -> Workload:
    """All pixels of the images to tokens, int64."""
    pixels = photographs(case)
    count = PILLOW_COLOURS if case.method == "pillow" else COLOURS
    return Workload(
        {"forward": lambda: subject(pixels)},
        lambda: subject(pixels[:1]),
        f"{count} colours, {'photographs' if _pictures() else 'smooth noise'}",
    )


def verify(case: Case, subject: Lookup) -> float:
    """Tokens against the oracle: the share of allowed other answers that was used."""
    pixels = photographs(case)
    found = subject(pixels).flatten()
    step = max(1, found.numel() // CHECKED)
    sample = pixels.reshape(-1, 3)[::step]
    unique, place = sample.unique(dim=0, return_inverse=True)
    answer = palette_lookup_reference(unique, torch.from_numpy(colours_of(case)).to(case.device))[place]
    wrong = float((found[::step] != answer).double().mean())
    allowed = ALLOWED.get(case.method, 0.0)
    if wrong > allowed:
        raise AssertionError(f"{100 * wrong:.3g} % of the tokens are not the oracle's; {100 * allowed:.3g} % may differ")
    return wrong / allowed if allowed else 0.0


def cost(case: Case, way: str) -> Cost:
    """3 bytes in and 8 out for a pixel; the distances that a search would compute are not counted."""
    pixels = case.batch * case.tokens
    return Cost(0.0, 11.0 * pixels, "memory", "3 bytes in and 8 bytes out a pixel", "pixels", pixels)


def _table(case: Case, backend: Any) -> Lookup:
    table = PaletteTable(colours_of(case))
    table.lookup(torch.zeros(1, 3, dtype=torch.uint8, device=case.device))  # made once for a palette
    return lambda pixels: palette_lookup(pixels, table, backend=backend)


def _transformers(case: Case) -> Lookup:
    from transformers.models.imagegpt.image_processing_pil_imagegpt import color_quantize

    clusters = colours_of(case) / 127.5 - 1

    def run(pixels: Tensor) -> Tensor:
        scaled: Any = pixels.numpy().reshape(-1, 3) / np.float32(127.5)
        scaled -= 1
        return torch.from_numpy(color_quantize(scaled, clusters))

    return run


def _scipy(case: Case) -> Lookup:
    from scipy.spatial import cKDTree

    tree = cKDTree(colours_of(case))
    threads = torch.get_num_threads()
    return lambda pixels: torch.from_numpy(tree.query(pixels.reshape(-1, 3).numpy().astype(np.float64), workers=threads)[1])


def _cdist(case: Case) -> Lookup:
    colours = torch.from_numpy(colours_of(case)).float().to(case.device)

    def run(pixels: Tensor) -> Tensor:
        flat = pixels.reshape(-1, 3).float()
        # A million pixels at a time: all distances at once would take 2 KiB a pixel.
        return torch.cat([torch.cdist(part, colours).argmin(-1) for part in flat.split(1 << 20)])

    return run


def _pillow(case: Case) -> Lookup:
    from PIL import Image

    palette = Image.new("P", (1, 1))
    palette.putpalette(colours_of(case).astype(np.uint8).flatten().tolist())

    def run(pixels: Tensor) -> Tensor:
        image = Image.fromarray(pixels.reshape(-1, pixels.shape[-2], 3).numpy())
        return torch.from_numpy(np.asarray(image.quantize(palette=palette, dither=Image.Dither.NONE), dtype=np.int64))

    return run


def _distances(case: Case, way: str) -> tuple[int, str]:
    pixels = min(case.batch * case.tokens, 1 << 20)
    return 4 * pixels * COLOURS, f"distances of {pixels:,} pixels to {COLOURS} colours"


def _no_extension(case: Case, way: str) -> str:
    from igpt_kernels._native import load

    status = load.status()
    return "" if status.loaded else f"the compiled extension is not loaded: {status.reason}"


LOOKUP = {
    "transformers": Method(_transformers, ("transformers", "PIL"), (THEIRS,), devices=("cpu",)),
    "scipy": Method(_scipy, needs=("scipy",), devices=("cpu",)),
    "cdist": Method(_cdist, memory=_distances),
    "pillow": Method(_pillow, needs=("PIL",), devices=("cpu",)),
    "torch": Method(lambda case: _table(case, "torch"), public="palette_lookup"),
    "ext": Method(lambda case: _table(case, "ext"), public="palette_lookup", devices=("cpu",), refuses=_no_extension),
}


def make_prepare(case: Case, subject: Callable[[], PaletteTable]) -> Workload:
    """A table of all 16,777,216 answers for a new palette."""
    pixel = torch.zeros(1, 3, dtype=torch.uint8, device=case.device)
    return Workload({"forward": lambda: subject().lookup(pixel)}, None, f"{COLOURS} colours")


def make_verify(case: Case, subject: Callable[[], PaletteTable]) -> float:
    """The new table's answers for the pixels of photographs."""
    table = subject()
    return verify(Case.of({**case.__dict__, "batch": 2, "tokens": 64 * 64}), table.lookup)


def make_cost(case: Case, way: str) -> Cost:
    """2 bytes for each of the colours there are."""
    return Cost(0.0, 2.0 * 2**24, "memory", "2 bytes for each of 2²⁴ colours", "colours", 2**24)


def _maker(backend: Any) -> Callable[[Case], Callable[[], PaletteTable]]:
    return lambda case: lambda: PaletteTable(colours_of(case), backend=backend)


MAKE = {
    "torch": Method(_maker("torch"), public="PaletteTable"),
    "ext": Method(_maker("ext"), public="PaletteTable", devices=("cpu",), refuses=_no_extension),
}
OPERATIONS = [
    Operation("palette", "lookup", ("palette_lookup",), ("forward",), prepare, verify, cost, LOOKUP),
    Operation("palette", "table", ("PaletteTable",), ("forward",), make_prepare, make_verify, make_cost, MAKE),
]
