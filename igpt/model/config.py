"""The shape of an Image GPT, and the released sizes. Imports no torch, so that commands start fast."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args

from igpt.checks import Between, Count, check_fields, from_mapping
from igpt.errors import ArgumentTypeError, ConfigError
from igpt.files import describe
from igpt_kernels import layouts
from igpt_kernels.messages import shown

Objective = Literal["ar", "bert"]
PresetName = Literal["tiny", "igpt-s", "igpt-m", "igpt-l", "igpt-xl"]


_MAX_PATTERNS = 1024
_MAX_PATTERN = 1000


@dataclass(frozen=True)
class ImageGPTConfig:
    """The shape of an Image GPT.

    Raises:
        ConfigError: a size below 1, a width that the heads do not divide, an unknown objective or pattern.
    """

    n_layer: Annotated[int, Between(1, 1024)]
    """Blocks."""
    n_head: Count
    """Attention heads; n_embd must be a multiple."""
    n_embd: Annotated[int, Between(1, 2**20)]
    """Width of the residual stream (C)."""
    vocab_size: Annotated[int, Between(2, 65536)] = 512
    """Palette colours (V). The start symbol is not one of them."""
    height: Annotated[int, Between(1, 65536)] = 32
    """Rows of the image in tokens."""
    width: Annotated[int, Between(1, 65536)] = 32
    """Columns of the image in tokens."""
    attention: str | tuple[str, ...] = "dense"
    """Attention pattern, or patterns cycled over the layers: dense, or what `igpt_kernels.layouts.parse` reads."""
    objective: Objective = "ar"
    """ar: predict each pixel from those before it. bert: predict masked pixels from all others."""
    mask_rate: Annotated[float, Between(0, 1, low_open=True, high_open=True)] = 0.15
    """Share of pixels hidden by the bert objective."""
    bias: bool = False
    """Biases in the linear layers. Image GPT has none; fine-tuned Hugging Face checkpoints can."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        patterns = (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)
        if not 1 <= len(patterns) <= _MAX_PATTERNS or max(map(len, patterns)) > _MAX_PATTERN:
            raise ConfigError(
                f"attention must be 1 to {_MAX_PATTERNS} patterns of at most {_MAX_PATTERN} characters, "
                f"got {shown(self.attention)}"
            )
        for pattern in dict.fromkeys(patterns):
            try:
                layouts.parse(pattern, self.height, self.width)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"attention: {describe(error)}") from error

    def pattern(self, layer: int) -> str:
        """The attention pattern of a layer."""
        patterns = (self.attention,) if isinstance(self.attention, str) else self.attention
        return patterns[layer % len(patterns)]

    @property
    def n_ctx(self) -> int:
        """Tokens of one image: T = height x width."""
        return self.height * self.width

    @property
    def head_dim(self) -> int:
        """Width of one head: D = n_embd / n_head."""
        return self.n_embd // self.n_head

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageGPTConfig:
        """Build from a mapping; an unknown or missing key raises `ConfigError` naming it."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ArgumentTypeError(f"values must be a dict of settings by name, got {shown(values)}")
        missing = [one.name for one in fields(cls) if one.default is one.default_factory is MISSING and one.name not in values]
        if missing:
            raise ConfigError(f"values must have {', '.join(missing)}, got {shown(values)}")
        return from_mapping(cls, values)


# Layers, heads, width of the released models (github.com/openai/image-gpt README and paper table 1). The head count of
# XL was never published; 16 heads of 192 is this project's choice. "tiny" learns 8x8 digits on two CPU cores in minutes.
PRESETS: dict[PresetName, tuple[int, int, int]] = {
    "tiny": (6, 4, 128),
    "igpt-s": (24, 8, 512),
    "igpt-m": (36, 8, 1024),
    "igpt-l": (48, 16, 1536),
    "igpt-xl": (60, 16, 3072),
}


def preset(name: PresetName, **changes: Any) -> ImageGPTConfig:
    """The configuration of a named model: `igpt-s`, `igpt-m`, `igpt-l`, `igpt-xl` or `tiny`.

    Args:
        name: one of the names above.
        **changes: fields of `ImageGPTConfig` to set differently, for example ``height=64, width=64``.

    Raises:
        ConfigError: unknown name, or a field that does not exist.
    """
    if not isinstance(name, str) or name not in get_args(PresetName):
        raise ConfigError(f"name must be a preset, one of {', '.join(PRESETS)}; got {shown(name)}")
    n_layer, n_head, n_embd = PRESETS[name]
    return from_mapping(ImageGPTConfig, {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **changes})
