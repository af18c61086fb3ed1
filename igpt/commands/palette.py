"""`igpt palette`: learn a palette from images, or lay out an even one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from igpt.checks import Between, Count, Natural, Options, Side
from igpt.console import say
from igpt.errors import ConfigError
from igpt.training.options import BadImages

if TYPE_CHECKING:
    from igpt.palette.palette import Palette


@dataclass(frozen=True)
class PaletteOptions(Options):
    """Options of `igpt palette`: learn a palette from images, or write a uniform one."""

    source: str = ""
    """Images to learn from, see the sources; empty with --uniform."""
    out: Path = Path("palette")
    """Folder for preprocessor_config.json and the picture palette.png."""
    k: Annotated[int, Between(2, 65536)] = 512
    """Colours."""
    uniform: bool = False
    """Evenly spaced colours instead of k-means."""
    height: Side | None = None
    """Rows to resize images to; the source's own size when left out."""
    width: Side | None = None
    """Columns to resize images to."""
    max_pixels: Count = 2_000_000
    """Pixels drawn at random for k-means; all are used when there are fewer."""
    seed: Natural = 0
    """Seed of the pixel sample and of k-means."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.uniform and not self.source:
            raise ConfigError("source is empty: name the images to learn from, for example photos:DIR, or pass --uniform")


def run_palette(options: PaletteOptions) -> Palette:
    """The command `igpt palette`: learn or lay out a palette, write it and palette.png, print how much it loses."""
    from igpt.commands.pictures import check_file, check_folder
    from igpt.data.open import open_source
    from igpt.data.palettes import sample_pixels
    from igpt.files import replacing
    from igpt.palette.palette import Palette
    from igpt.plots.grids import palette_picture

    check_folder(options.out)
    for name in ("preprocessor_config.json", "palette.png"):
        check_file(options.out / name)
    pixels = None
    size: tuple[int | None, int | None] = (options.height, options.width)
    if options.source:
        with open_source(
            options.source, height=options.height, width=options.width, val_fraction=0.0, bad_images=options.bad_images
        ) as source:
            pixels = sample_pixels(source, options.max_pixels, options.seed)
            size = (source.height, source.width)
            if source.skipped:
                say(f"{options.source}: {source.skipped} damaged picture(s) skipped")
    if options.uniform or pixels is None:
        palette, origin = Palette.uniform(options.k), "evenly spaced"
    else:
        palette = Palette.fit(pixels, options.k, max_pixels=options.max_pixels, seed=options.seed)
        origin = f"learned from {options.source}"
    palette.save(options.out, height=size[0], width=size[1])
    with replacing(options.out / "palette.png") as temporary:
        palette_picture(palette).save(temporary, format="PNG")
    loss = "" if pixels is None else f"; on {len(pixels):,} of its pixels: {palette.error(pixels)}"
    say(f"{options.out}: {palette.size} colours, {origin}{loss}")
    return palette
