"""`igpt layouts`: draw a sparse attention pattern, and print what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from igpt.checks import Options, Side
from igpt.console import say
from igpt.errors import ConfigError


@dataclass(frozen=True)
class LayoutsOptions(Options):
    """Options of `igpt layouts`: draw a sparse attention pattern, and say what it costs."""

    pattern: str
    """The pattern, see the forms."""
    then: str = ""
    """Pattern of the layer above, for what two layers reach (up to 64 x 64); the same when left out."""
    size: Side = 64
    """Rows and columns of the image."""
    height: Side | None = None
    """Rows, where they differ from the columns."""
    width: Side | None = None
    """Columns."""
    pixel: str = ""
    """ROW,COLUMN of the pixel whose view is drawn; one in the lower middle when left out."""
    causal: bool = True
    """Only pixels before it in raster order; --no-causal draws what the bert objective sees."""
    out: Path = Path("layout.png")
    """The PNG to write."""


def run_layouts(options: LayoutsOptions) -> None:
    """The command `igpt layouts`: draw a pattern, print its numbers."""
    from igpt.commands.pictures import check_picture
    from igpt.files import replacing
    from igpt.plots.patterns import LARGEST_REACH, plot_layout, reach
    from igpt_kernels import layouts
    from igpt_kernels.block_lists import FULL

    height = options.size if options.height is None else options.height
    width = options.size if options.width is None else options.width
    try:
        layout = layouts.parse(options.pattern, height, width, causal=options.causal)
        above = layouts.parse(options.then or options.pattern, height, width, causal=options.causal)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    query = _query(options.pixel, height, width)
    check_picture(options.out)
    with replacing(options.out) as temporary:
        plot_layout(layout, query, temporary)
    say(f"{layout}: {layout.tokens:,} tokens, {layout.pairs:,} visible pairs, {layout.pairs / layout.tokens:.1f} a pixel")
    say(f"density       {layout.density:.4f} of dense causal attention: the work that is useful")
    say(f"tile density  {layout.tile_density:.4f}: the work that is done")
    for lists in layout.block_lists():
        full = int((lists.q_masks == FULL).sum())
        size = f"{lists.q_tile[0]} x {lists.q_tile[1]} and {lists.k_tile[0]} x {lists.k_tile[1]} pixels"
        say(f"blocks        {lists.blocks:,} of {size}, {full:,} full, {len(lists.masks)} masks")
    if options.causal and layout.tokens <= LARGEST_REACH:
        share = f"{100 * reach(layout, above):.1f} % of all earlier pixels"
        say(f"two layers    {layout.pattern.spec}, then {above.pattern.spec}: {share}")
    say(f"picture       {options.out}")


def _query(pixel: str, height: int, width: int) -> int:
    """The raster position of ``row,column``; two thirds down and in the middle when empty."""
    if not pixel:
        return height * 2 // 3 * width + width // 2
    try:
        y, x = (int(number) for number in pixel.split(","))
    except ValueError:
        raise ConfigError(f"pixel must be ROW,COLUMN, got {pixel!r}") from None
    if not (0 <= y < height and 0 <= x < width):
        raise ConfigError(f"pixel must lie in the {height} x {width} image, got {pixel!r}")
    return y * width + x
