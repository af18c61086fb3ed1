"""`igpt tokenize`: a data set as rows of palette tokens, one or two bytes a pixel, written as it is read."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from igpt.checks import Options, Side
from igpt.console import one_line, say
from igpt.errors import ConfigError, DataError
from igpt.training.options import BadImages

_BATCH, _PIXELS = 256, 1 << 22
"""Images, and pixels, that are read at once, at most."""


@dataclass(frozen=True)
class TokenizeOptions(Options):
    """Options of `igpt tokenize`: write a data set as palette tokens, one row an image, readable as tokens:FILE."""

    source: str
    """Images to read, see the sources."""
    palette: str
    """Folder or file of a palette."""
    out: Path
    """The .npy file to write: uint8 up to 256 colours, else uint16, [images, height x width]."""
    height: Side | None = None
    """Rows; the source's own size when left out."""
    width: Side | None = None
    """Columns."""
    split: Literal["train", "val", "all"] = "all"
    """Which part of the source."""
    bad_images: BadImages = "raise"
    """Stop at a damaged image, or skip and count it."""


def run_tokenize(options: TokenizeOptions) -> Path:
    """Write NAME.npy, NAME.json and, with labels, NAME.labels.npy (see `igpt.data.tokens`), and say how much was lost.

    Rows are in the source's order; with ``bad_images="skip"`` damaged images have no row. Each file replaces an older
    one in one step, and only when it is complete.

    Returns:
        The .npy.

    Raises:
        ConfigError: `out` does not end in .npy, or the source holds tokens.
        IgptError: as `open_source` and `Palette.from_pretrained`; a file that cannot be written.
    """
    import numpy as np
    from tqdm import tqdm

    from igpt.commands.pictures import check_file
    from igpt.data.open import open_source
    from igpt.data.palettes import parse_palette
    from igpt.data.tokens import sidecar_paths
    from igpt.files import replacing, write_json
    from igpt.palette.palette import ErrorMeter

    if options.out.suffix != ".npy":
        raise ConfigError(f"out must end in .npy, got {str(options.out)!r}")
    sidecar, labels_path = sidecar_paths(options.out)
    for path in (options.out, sidecar, labels_path):
        check_file(path)
    with open_source(
        options.source, height=options.height, width=options.width, split=options.split, bad_images=options.bad_images
    ) as source:
        if source.kind != "images":
            raise ConfigError(f"{options.source} holds tokens already")
        palette = parse_palette(options.palette, source)
        dtype = np.dtype(np.uint8 if palette.size <= 256 else np.uint16)
        shape = (len(source), source.height * source.width)
        meter, labels, rows = ErrorMeter(), [], 0
        at_once = max(1, min(_BATCH, _PIXELS // shape[1]))
        with replacing(options.out) as temporary, temporary.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            begin = file.tell()
            with tqdm(total=len(source), desc=one_line(f"tokenize {options.source}"), unit="img") as bar:
                for start in range(0, len(source), at_once):
                    asked = np.arange(start, min(start + at_once, len(source)))
                    batch = source.read(asked)
                    whole = batch.indices == asked
                    images = batch.images[whole]
                    tokens = palette.encode(images).numpy()
                    file.write(tokens.astype(dtype).tobytes())
                    meter.add(images, palette.decode(tokens, source.height, source.width))
                    if batch.labels is not None:
                        labels.append(batch.labels[whole])
                    rows += len(images)
                    bar.update(len(asked))
            if rows == 0:
                raise DataError(f"{options.source}: no readable image")
            # numpy pads the header so that a number of rows with fewer digits leaves its length alone.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, shape[1])})
            if file.tell() != begin:
                raise DataError(f"{options.out}: the header changed its length from {begin} to {file.tell()} bytes")
            file.flush()
            # The array is briefly without its sidecar, never beside the sidecar of another file.
            for old in (sidecar, labels_path):
                with contextlib.suppress(FileNotFoundError):
                    old.unlink()
        if labels:
            with replacing(labels_path) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array(file, np.concatenate(labels), allow_pickle=False)
        about = {"format": "igpt-tokens", "source": options.source, "split": options.split, "images": rows}
        size = {"height": source.height, "width": source.width, "vocab": palette.size, "classes": list(source.classes)}
        write_json(sidecar, {**about, **size, **palette.as_dict(source.height, source.width)})
        skipped = f", {source.skipped} damaged skipped" if source.skipped else ""
    total = options.out.stat().st_size / 1e6
    say(
        f"{options.out}: {rows:,} images of {source.height} x {source.width} in {palette.size} colours, "
        f"{total:.1f} MB{skipped}; {meter.result()}"
    )
    return options.out
