"""Output files: pictures, and what `igpt sample` and `igpt complete` write beside them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from igpt.errors import ConfigError
from igpt.files import replacing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from igpt.model.image_gpt import ImageGPT


def check_folder(path: Path) -> None:
    """Find out before the work, not after, whether a folder for a command's outputs can be made and written. Makes nothing.

    Raises:
        ConfigError: it cannot; names the option `out`.
    """
    try:
        place = next(each for each in (path, *path.parents) if each.exists())
        if not place.is_dir():
            raise ConfigError(f"out: {place} is a file, a folder is wanted")
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ConfigError(f"out: cannot write into {path}: {error.strerror}") from error


def check_picture(out: Path) -> None:
    """Find out before anything is drawn, not after, that the picture cannot be written."""
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out must end in .png, got {str(out)!r}")
    if out.is_dir():
        raise ConfigError(f"out: {out} is a folder, a file is wanted")
    check_folder(out.parent)


def check_outputs(out: Path) -> None:
    """`check_picture`, and the same for the tokens beside it."""
    check_picture(out)
    if out.with_suffix(".npy").is_dir():
        raise ConfigError(f"out: the tokens go to {out.with_suffix('.npy')}, which is a folder")


def decoder(model: ImageGPT) -> Callable[[Tensor], npt.NDArray[np.uint8]]:
    """What turns tokens of the model into pictures uint8 [..., h, w, 3]; `ConfigError` for a model without a palette."""
    palette = model.palette
    if palette is None:
        raise ConfigError("the model has no palette to draw with: put its preprocessor_config.json beside config.json")
    return lambda tokens: palette.decode(tokens, model.config.height, model.config.width)


def write(
    out: Path,
    settings: Mapping[str, object],
    model: ImageGPT,
    picture: Callable[[], Image.Image],
    tokens: Tensor,
    seconds: float,
) -> None:
    """Write the tokens as .npy, then `picture` beside them as PNG with its settings inside; print the speed.

    The tokens come first: a picture that does not fit into memory (a large `scale`) loses nothing that was drawn.
    """
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from igpt import __version__
    from igpt.machine import versions

    settings = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    info = PngInfo()
    info.add_text("Software", f"igpt-kernels {__version__}")
    info.add_text("igpt.settings", json.dumps({**settings, "device": str(model.device), "versions": versions()}))
    info.add_text("igpt.model", json.dumps(dataclasses.asdict(model.config)))
    beside = out.with_suffix(".npy")
    narrow = np.uint8 if model.config.vocab_size <= 256 else np.uint16
    with replacing(beside) as part, part.open("wb") as file:
        np.save(file, tokens.numpy().astype(narrow), allow_pickle=False)
    with replacing(out) as part:
        picture().save(part, format="PNG", pnginfo=info)
    images = tokens.numel() // model.config.n_ctx
    tqdm.write(f"{images} images in {seconds:.2f} s ({seconds / images:.3f} s each, {model.device}): {out}, {beside}")
