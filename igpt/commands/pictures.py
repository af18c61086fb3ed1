"""Output files: pictures, and what `igpt sample` and `igpt complete` write beside them."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from igpt.console import say
from igpt.errors import ConfigError, DataError
from igpt.files import describe, link_target, reason, replacing

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
        _mode(path)
        place = next(each for each in (path, *path.parents) if _mode(each) is not None)
        if not stat.S_ISDIR(os.stat(place).st_mode):
            raise ConfigError(f"out: {place} is a file, a folder is wanted")
        for name in path.parts[len(place.parts) :]:
            _mode(place / name)
        tempfile.TemporaryFile(dir=place).close()
    except (OSError, ValueError) as error:
        raise _refused(error, f"out: cannot write into {path}") from error


def check_file(path: Path) -> None:
    """`check_folder` for one file. Where it is a link, what it leads to will be replaced: that must be a plain file too.

    Raises:
        ConfigError: it cannot be written; names the option `out`.
    """
    try:
        target = link_target(path)
        mode = _mode(target) or stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise ConfigError(f"out: {target} is a folder, a file is wanted")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"out: {target} is no plain file, and will not be replaced")
        check_folder(target.parent)
        if _mode(target.parent) is None:
            _mode(Path(target.name))  # a name that is too long shows anywhere
    except (OSError, ValueError) as error:
        raise _refused(error, f"out: cannot write {path}") from error


def _mode(path: Path) -> int | None:
    """Kind and rights of what is there, links not followed; None where nothing is. `OSError` for an impossible name."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _refused(error: Exception, what: str) -> ConfigError:
    return error if isinstance(error, ConfigError) else ConfigError(f"{what}: {reason(error)}")


def check_picture(out: Path) -> None:
    """Find out before anything is drawn, not after, that the picture cannot be written."""
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out must end in .png, got {str(out)!r}")
    check_file(out)


def check_outputs(out: Path) -> None:
    """`check_picture`, and the same for the tokens beside it."""
    check_picture(out)
    check_file(out.with_suffix(".npy"))


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
    try:
        with replacing(out) as part:
            picture().save(part, format="PNG", pnginfo=info)
    except (MemoryError, OSError, ValueError) as error:
        what = "out of memory: " if isinstance(error, MemoryError) else ""
        raise DataError(f"{what}{describe(error)}; {beside} holds the tokens that were drawn") from error
    images = tokens.numel() // model.config.n_ctx
    say(f"{images} images in {seconds:.2f} s ({seconds / images:.3f} s each, {model.device}): {out}, {beside}")
