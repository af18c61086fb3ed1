"""Models on disk in Hugging Face ImageGPT format: config.json, model.safetensors, preprocessor_config.json.

Reads what transformers writes (old files with mask buffers, sharded ones, fine-tuned ones with biases). Writes what
``transformers.ImageGPTForCausalImageModeling.from_pretrained`` loads with equal logits. Nothing is unpickled.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igpt.errors import CheckpointError, ConfigError, DataError, IgptError, import_extra
from igpt.files import describe, read_json, replacing, write_json
from igpt.model.config import ImageGPTConfig

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT

# ours -> theirs, inside a block. Their Conv1D keeps [in, out], the transpose of nn.Linear.
_LINEAR = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "fc": "mlp.c_fc", "proj": "mlp.c_proj"}
_NORM = ("ln_1", "ln_2")
# Settings of the port that change what is computed, with the only value that Image GPT has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("quick_gelu",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
}
_EXTRA = ("height", "width", "attention", "objective", "mask_rate")


def load(source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> ImageGPT:
    """Read a model, with its palette when one lies beside it.

    Args:
        source: folder in Hugging Face format, or a hub id such as ``"openai/imagegpt-small"`` (needs huggingface_hub).
        device: where the weights go.
        dtype: of the weights; that of the file when None.

    Returns:
        `igpt.ImageGPT` in evaluation mode. Biases are kept only where the file holds non-zero ones; of an image size that
        config.json does not state, ``n_positions`` must be a square.

    Raises:
        CheckpointError: a file is missing or malformed, a tensor is missing, unknown, non-finite or of another shape.
        ConfigError: a device that is not there.
        TypeError: `source` is no path.
    """
    from igpt.model.image_gpt import ImageGPT

    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a path or a hub id, got {type(source).__name__}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch is built without CUDA
        raise ConfigError(f"device {device!r} cannot be used ({describe(error)})") from error
    folder = _folder(source)
    settings = _read_json(folder / "config.json")
    state = _canonical(_read_tensors(folder), folder)
    config = _config(settings, folder, bias=any(name.endswith("bias") and bool(value.any()) for name, value in state.items()))
    with torch.device("meta"):
        model = ImageGPT(config)
    model.load_state_dict(_from_hf(state, model, folder), assign=True)
    if dtype is not None:
        model.to(dtype)
    model.to(device)
    if any((folder / name).exists() for name in ("preprocessor_config.json", "kmeans_centers.npy")):
        from igpt.palette.palette import Palette

        model.palette = Palette.from_pretrained(folder)
        if model.palette.size != config.vocab_size:
            raise CheckpointError(f"{folder}: the palette has {model.palette.size} colours, the model {config.vocab_size}")
    return model.eval()


def save(model: ImageGPT, folder: str | Path) -> None:
    """Write a model into `folder` (made if absent), each file under a temporary name and then renamed.

    Biases that Image GPT does not have are written as zeros; image size, attention pattern and objective, for which the
    port has no words, are extra keys of config.json. A bert model, which has no start vector, gets a zero row for it.

    Raises:
        DataError: the folder or a file in it cannot be written; what was there stays.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    with replacing(folder / "model.safetensors") as part:
        save_file(_to_hf(model), part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors 0.8 leaves 0600, unreadable for the colleague it is shared with
    write_json(folder / "config.json", _hf_config(model))
    if model.palette is not None:
        model.palette.save(folder, height=model.config.height, width=model.config.width)


def _folder(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    looks_like_id = (
        isinstance(source, str) and source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not path.exists()
    )
    if not looks_like_id:
        raise CheckpointError(f"{source}: no such folder; a model is a folder with config.json and model.safetensors")
    try:
        hub = import_extra("huggingface_hub", "hf")
        return Path(hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "kmeans_centers.npy"]))
    except IgptError as error:
        raise CheckpointError(f"{source}: no such folder, and to look on the hub {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent}: no {path.name}; is this a model folder?")
    try:
        values = read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names in the same folder")
        files = [folder / name for name in sorted(set(shards.values()))]
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except FileNotFoundError as error:
            hint = ""
            if (folder / "pytorch_model.bin").exists():
                hint = (
                    "; pytorch_model.bin is a pickle and is not opened: convert it with transformers' "
                    "ImageGPTForCausalImageModeling.from_pretrained(folder).save_pretrained(folder)"
                )
            raise CheckpointError(f"{folder}: no {file.name}{hint}") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    return state


def _canonical(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Names without the ``transformer.`` prefix and without what is no weight: old mask buffers, a classifier's head."""
    tidy = {}
    for name, value in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "score.weight":
            continue
        if not value.is_floating_point():
            raise CheckpointError(f"{folder}: tensor {name} must be floating point, got {value.dtype}")
        tidy[name] = value
    return tidy


def _config(settings: dict[str, Any], folder: Path, *, bias: bool) -> ImageGPTConfig:
    where = folder / "config.json"
    for name, allowed in _FIXED.items():
        if name in settings and settings[name] not in allowed:
            raise CheckpointError(f"{where}: {name} must be {allowed[0]!r}, got {settings[name]!r}")
    sizes = {}
    names = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    for name, alias in names.items():
        value = settings.get(name, settings.get(alias))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{where}: {name} must be an integer of at least 1, got {value!r}")
        sizes[name] = value
    inner = settings.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise CheckpointError(f"{where}: n_inner must be 4 x n_embd = {4 * sizes['n_embd']}, got {inner!r}")
    extra = {name: settings[f"igpt_{name}"] for name in _EXTRA if f"igpt_{name}" in settings}
    side = math.isqrt(sizes["n_positions"])
    if "height" not in extra and side * side != sizes["n_positions"]:
        raise CheckpointError(f"{where}: n_positions {sizes['n_positions']} is no square; state igpt_height and igpt_width")
    values = {"height": side, "width": side, "bias": bias, **extra}
    try:
        config = ImageGPTConfig.from_dict(
            {
                "n_layer": sizes["n_layer"],
                "n_head": sizes["n_head"],
                "n_embd": sizes["n_embd"],
                "vocab_size": sizes["vocab_size"] - 1,
                **values,
            }
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if config.n_ctx != sizes["n_positions"]:
        raise CheckpointError(
            f"{where}: igpt_height x igpt_width must be n_positions {sizes['n_positions']}, got {config.n_ctx}"
        )
    return config


def _from_hf(state: dict[str, Tensor], model: ImageGPT, folder: Path) -> dict[str, Tensor]:
    config = model.config
    table = state.pop("wte.weight", None)
    if table is None or table.shape != (config.vocab_size + 1, config.n_embd):
        got = "nothing" if table is None else str(tuple(table.shape))
        raise CheckpointError(f"{folder}: wte.weight must be {(config.vocab_size + 1, config.n_embd)}, got {got}")
    ours = {"wte.weight": table[:-1].clone()}
    if model.sos is not None:
        ours["sos"] = table[-1].clone()
    head = state.pop("lm_head.weight", None)
    if head is None:
        warnings.warn(
            f"{folder} holds no lm_head (a base or classification model): logits will be zero, features are right", stacklevel=4
        )
        head = torch.zeros(config.vocab_size, config.n_embd, dtype=table.dtype)
    # tie_word_embeddings=True in the port gives a head with a row for the start symbol, which no pixel can be.
    ours["head.weight"] = head[:-1].clone() if head.shape[0] == config.vocab_size + 1 else head
    for theirs, name in _names(config.n_layer):
        value = state.pop(theirs, None)
        if value is None:
            if theirs.endswith("bias"):
                continue
            raise CheckpointError(f"{folder}: tensor {theirs} is missing")
        if name.endswith("bias") and not config.bias:
            continue
        transposed = name.rpartition(".")[0].rpartition("blocks.")[2].partition(".")[2] in _LINEAR and name.endswith("weight")
        ours[name] = value.t().contiguous() if transposed else value
    if state:
        raise CheckpointError(f"{folder}: unknown tensors {', '.join(sorted(state)[:4])}{', ...' if len(state) > 4 else ''}")
    for name, parameter in model.state_dict().items():
        value = ours.get(name)
        if value is None:
            if not name.endswith("bias"):
                raise CheckpointError(f"{folder}: tensor for {name} is missing")
            ours[name] = torch.zeros(parameter.shape, dtype=table.dtype)
        elif value.shape != parameter.shape:
            raise CheckpointError(f"{folder}: tensor for {name} must be {tuple(parameter.shape)}, got {tuple(value.shape)}")
        elif not torch.isfinite(value).all():
            raise CheckpointError(f"{folder}: tensor for {name} holds NaN or infinite values")
    return ours


def _names(n_layer: int) -> list[tuple[str, str]]:
    """Pairs (theirs, ours) of every tensor but the token table and the head."""
    pairs = [("wpe.weight", "wpe.weight"), ("ln_f.weight", "ln_f.weight")]
    for layer in range(n_layer):
        pairs += [(f"h.{layer}.{norm}.weight", f"blocks.{layer}.{norm}.weight") for norm in _NORM]
        for ours, theirs in _LINEAR.items():
            pairs += [(f"h.{layer}.{theirs}.{kind}", f"blocks.{layer}.{ours}.{kind}") for kind in ("weight", "bias")]
    return pairs


def _to_hf(model: ImageGPT) -> dict[str, Tensor]:
    ours = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    width = model.config.n_embd
    start = ours["sos"] if model.sos is not None else torch.zeros(width, dtype=ours["wte.weight"].dtype)
    state = {
        "transformer.wte.weight": torch.cat([ours["wte.weight"], start[None]]),
        "lm_head.weight": ours["head.weight"].contiguous(),
    }
    for theirs, name in _names(model.config.n_layer):
        if name in ours:
            value = ours[name].t() if ours[name].dim() == 2 and name != "wpe.weight" else ours[name]
        else:
            weight = ours[name.removesuffix("bias") + "weight"]
            value = torch.zeros(weight.shape[0], dtype=weight.dtype)
        state[f"transformer.{theirs}"] = value.contiguous()
    return state


def _hf_config(model: ImageGPT) -> dict[str, Any]:
    config = model.config
    root = math.isqrt(config.head_dim)
    values: dict[str, Any] = {
        "model_type": "imagegpt",
        "architectures": ["ImageGPTForCausalImageModeling"],
        "vocab_size": config.vocab_size + 1,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "quick_gelu",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        # transformers 5 truncates sqrt(head_dim) to an integer on its plain path (11 for 11.31); this path does not.
        "reorder_and_upcast_attn": root * root != config.head_dim,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    for name in _EXTRA:
        value = getattr(config, name)
        values[f"igpt_{name}"] = list(value) if isinstance(value, tuple) else value
    return values
