"""Models on disk in Hugging Face ImageGPT format: config.json, model.safetensors, preprocessor_config.json.

Reads what transformers writes (old files with mask buffers, sharded ones, fine-tuned ones with biases). Writes what
``transformers.ImageGPTForCausalImageModeling.from_pretrained`` loads with equal logits. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igpt.checks import check_path
from igpt.errors import CheckpointError, ConfigError, DataError, IgptError, import_extra
from igpt.files import describe, replacing, write_json
from igpt.model.config import ImageGPTConfig
from igpt.model.weights import DTYPES, Source, Stored, files_of, headers, read, read_object, unwrapped
from igpt_kernels.messages import shown

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
_MERGE = "merge_and_unload() of peft"
_EXTRA = ("height", "width", "attention", "objective", "mask_rate")


def load(source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> ImageGPT:
    """Read a model, with its palette when one lies beside it.

    Names may have what torch.compile, DDP, FSDP and checkpointing put before them, and may be those of `igpt.ImageGPT` itself.
    Nothing is built before the shapes in the files bear out config.json.

    Args:
        source: folder in Hugging Face format, or a hub id such as ``"openai/imagegpt-small"`` (needs huggingface_hub).
        device: where the weights go.
        dtype: of the weights; that of the files when None, of several the one that holds all values.

    Returns:
        `igpt.ImageGPT` in evaluation mode. Biases are kept only where the file holds non-zero ones; of an image size that
        config.json does not state, ``n_positions`` must be a square.

    Raises:
        CheckpointError: a file is missing, malformed or no plain file; a tensor is missing, unknown, non-finite or of another
            shape; the folder holds an adapter alone.
        ConfigError: a device that is not there, a `dtype` that is none of weights.
        ArgumentTypeError: `source` is no path.
    """
    from igpt.model.image_gpt import ImageGPT

    check_path("source", source)
    if dtype is not None and dtype not in DTYPES.values():
        raise ConfigError(f"dtype must be float16, bfloat16, float32, float64 or None, got {shown(dtype)}")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of four kinds; AssertionError: torch is built without CUDA
        raise ConfigError(f"device {shown(device)} cannot be used ({describe(error)})") from error
    folder = _folder(source)
    _refuse_adapters(folder)
    settings = read_object(folder / "config.json")
    stored = _canonical(headers(files_of(folder)), folder)
    config = _config(settings, folder, bias=any(name.endswith("bias") for name in stored))
    shapes = shapes_of(config)
    weights = read(_plan(stored, shapes, config, folder), shapes, folder)
    biases = [name for name in weights if name.endswith("bias")]
    if not any(bool(weights[name].any()) for name in biases):
        config = dataclasses.replace(config, bias=False)
        weights = {name: value for name, value in weights.items() if name not in biases}
    with torch.device("meta"):
        model = ImageGPT(config)
    model.load_state_dict(weights, assign=True)
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
        DataError: the folder or a file in it cannot be written; the weights that were there stay.
        CheckpointError: the model holds what the format has no place for, such as a LoRA; says how to go on.
        ArgumentTypeError: `folder` is no path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = check_path("folder", folder)
    weights = _to_hf(model)
    with replacing(folder / "model.safetensors") as part:
        try:
            save_file(weights, part, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise DataError(f"{folder / 'model.safetensors'}: cannot be written ({describe(error)})") from error
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


def _refuse_adapters(folder: Path) -> None:
    """Say what to do with a folder that holds an adapter alone."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: holds an adapter alone; load its base model, {shown(base) if base else 'which it does not name'}, and "
            "add it: peft.PeftModel.from_pretrained(igpt.ImageGPT.from_pretrained(BASE), FOLDER)"
        )


def _canonical(found: list[Stored], folder: Path) -> dict[str, Stored]:
    """By names without prefixes, and without what is no weight: old mask buffers, a classifier's head, a count of averages."""
    tidy: dict[str, Stored] = {}
    for stored in found:
        name = unwrapped(stored.name).removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name in ("score.weight", "n_averaged"):
            continue
        if ".lora_" in name or ".base_layer." in name:
            raise CheckpointError(f"{folder}: tensor {stored.name[:100]} is of an adapter; save the model after {_MERGE}")
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{folder}: tensor {name[:100]} must be floating point ({', '.join(DTYPES)}), got {stored.dtype}"
            )
        if name in tidy:
            raise CheckpointError(f"{folder}: two tensors are {name[:100]}: {tidy[name].name[:100]} and {stored.name[:100]}")
        tidy[name] = stored
    return tidy


def _config(settings: dict[str, Any], folder: Path, *, bias: bool) -> ImageGPTConfig:
    where = folder / "config.json"
    for name, allowed in _FIXED.items():
        if name in settings and settings[name] not in allowed:
            raise CheckpointError(f"{where}: {name} must be {allowed[0]!r}, got {shown(settings[name])}")
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
            raise CheckpointError(f"{where}: {name} must be an integer of at least 1, got {shown(value)}")
        sizes[name] = value
    inner = settings.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise CheckpointError(f"{where}: n_inner must be 4 x n_embd = {4 * sizes['n_embd']}, got {shown(inner)}")
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


def _plan(
    stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]], config: ImageGPTConfig, folder: Path
) -> dict[str, Source | None]:
    """What each weight is read from, or None for zeros. Nothing is read yet; shapes that do not fit are refused.

    `stored` is emptied of what is used.
    """
    plan: dict[str, Source | None] = {}
    if any(name.startswith("blocks.") for name in stored):  # a state dictionary of `igpt.ImageGPT`
        for name in shapes:
            plan[name] = Source(stored.pop(name)) if name in stored else None
    else:
        table = stored.pop("wte.weight", None)
        wanted = (config.vocab_size + 1, config.n_embd)
        if table is None or table.shape != wanted:
            raise CheckpointError(f"{folder}: wte.weight must be {wanted}, got {'nothing' if table is None else table.shape}")
        plan["wte.weight"] = Source(table, stop=-1)
        if config.objective == "ar":
            plan["sos"] = Source(table, start=-1, one_row=True)
        head = stored.pop("lm_head.weight", None)
        if head is None:
            warnings.warn(
                f"{folder} holds no lm_head (a base or classification model): logits will be zero, features are right",
                stacklevel=4,
            )
            plan["head.weight"] = None
        else:
            # tie_word_embeddings=True in the port gives a head with a row for the start symbol, which no pixel can be.
            tied = head.shape[:1] == (config.vocab_size + 1,)
            plan["head.weight"] = Source(head, stop=-1) if tied else Source(head)
        for theirs, name in _names(config.n_layer):
            value = stored.pop(theirs, None)
            if value is None and not theirs.endswith("bias"):
                raise CheckpointError(f"{folder}: tensor {theirs} is missing")
            matrix = name.rpartition(".")[0].rpartition("blocks.")[2].partition(".")[2] in _LINEAR and name.endswith("weight")
            if name in shapes:
                plan[name] = None if value is None else Source(value, transposed=matrix)
    if stored:
        names = [name[:100] for name in sorted(stored)]
        raise CheckpointError(f"{folder}: unknown tensors {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    for name, shape in shapes.items():
        source = plan.get(name)
        if source is None and not name.endswith("bias") and name != "head.weight":
            raise CheckpointError(f"{folder}: tensor for {name} is missing")
        if source is not None and source.shape != shape:
            raise CheckpointError(f"{folder}: tensor for {name} must be {shape}, got {source.shape}")
    return plan


def shapes_of(config: ImageGPTConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a model by name, without building it."""
    width = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, width), "wpe.weight": (config.n_ctx, width)}
    if config.objective == "ar":
        shapes["sos"] = (width,)
    matrices = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "fc": (4 * width, width),
        "proj": (width, 4 * width),
    }
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{norm}.weight": (width,) for norm in _NORM}
        for name, shape in matrices.items():
            shapes[f"blocks.{layer}.{name}.weight"] = shape
            if config.bias:
                shapes[f"blocks.{layer}.{name}.bias"] = shape[:1]
    return shapes | {"ln_f.weight": (width,), "head.weight": (config.vocab_size, width)}


def _names(n_layer: int) -> list[tuple[str, str]]:
    """Pairs (theirs, ours) of every tensor but the token table and the head."""
    pairs = [("wpe.weight", "wpe.weight"), ("ln_f.weight", "ln_f.weight")]
    for layer in range(n_layer):
        pairs += [(f"h.{layer}.{norm}.weight", f"blocks.{layer}.{norm}.weight") for norm in _NORM]
        for ours, theirs in _LINEAR.items():
            pairs += [(f"h.{layer}.{theirs}.{kind}", f"blocks.{layer}.{ours}.{kind}") for kind in ("weight", "bias")]
    return pairs


def _to_hf(model: ImageGPT) -> dict[str, Tensor]:
    ours = {unwrapped(name): value for name, value in model.state_dict().items()}
    _refuse_others(ours, model.config)
    ours = {name: value.detach().cpu() for name, value in ours.items()}
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


def _refuse_others(weights: dict[str, Any], config: ImageGPTConfig) -> None:
    """Refuse a state dictionary that is not the one of an `igpt.ImageGPT` of this configuration, or has no plain values."""
    adapted = [name for name in weights if ".lora_" in name or ".base_layer." in name]
    if adapted:
        raise CheckpointError(
            f"model holds an adapter ({adapted[0]}), for which the format has no place: save that by its own save_pretrained, "
            f"or save the model after {_MERGE}"
        )
    wanted = shapes_of(config)
    for name in [*(name for name in weights if name not in wanted), *(name for name in wanted if name not in weights)]:
        what = "holds" if name in weights else "lacks"
        raise CheckpointError(f"model {what} {name}, so it is no Image GPT any more and has no place in the format")
    for name, value in weights.items():
        plain = isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter)
        if not plain or value.is_meta or value.dtype not in DTYPES.values() or value.shape != wanted[name]:
            raise CheckpointError(
                f"model: {name} must be a plain tensor of floating-point values {wanted[name]}, got {shown(value)}"
            )


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
