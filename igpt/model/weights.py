"""Tensors in safetensors files: what the files say they hold, and weights read from them once that is known to fit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from igpt.errors import CheckpointError, DataError
from igpt.files import describe, read_json, regular_size

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Parts of names that wrappers add.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A model of 1,024 layers, the most there can be, needs 1.4 MB.
_MAX_HEADER_BYTES = 4 * 1024 * 1024


def read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent}: no {path.name}; is this a model folder?")
    try:
        values = read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def files_of(folder: Path) -> dict[Path, set[str]]:
    """The files with weights, each with the names that an index says are in it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():  # as in transformers, an index beside a whole file counts for nothing
        return {single: set()}
    shards = read_object(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else [None]
    if not all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names in the same folder")
    files: dict[Path, set[str]] = {}
    for tensor, name in cast(dict[str, str], shards).items():
        files.setdefault(folder / name, set()).add(tensor)
    return files


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def headers(files: dict[Path, set[str]]) -> list[Stored]:
    """What the files say they hold."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file, promised in files.items():
        if not file.exists():
            hint = ""
            if (file.parent / "pytorch_model.bin").exists():
                hint = (
                    "; pytorch_model.bin is a pickle and is not opened: convert it with transformers' "
                    "ImageGPTForCausalImageModeling.from_pretrained(folder).save_pretrained(folder)"
                )
            raise CheckpointError(f"{file.parent}: no {file.name}{hint}")
        try:
            regular_size(file)
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise DataError(f"{file}: its header has {size:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found.append(Stored(file, name, part.get_dtype(), tuple(part.get_shape())))
        except DataError as error:
            raise CheckpointError(str(error)) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {describe(error)}") from error
        missing = promised - {stored.name for stored in found if stored.file == file}
        if missing:
            raise CheckpointError(f"{file}: has no tensor {min(missing)}, which the index says it has")
    return found


def unwrapped(name: str) -> str:
    """A tensor's name without what torch.compile, DDP, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a weight comes from: rows ``start:stop`` of a tensor, then transposed, or its one row."""

    stored: Stored
    start: int | None = None
    stop: int | None = None
    transposed: bool = False
    one_row: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = self.stored.shape
        if shape:
            shape = (len(range(shape[0])[self.start : self.stop]), *shape[1:])
        return shape[1:] if self.one_row else shape[::-1] if self.transposed else shape

    def take(self, tensor: Tensor) -> Tensor:
        """The weight, from the whole tensor."""
        tensor = tensor[self.start : self.stop] if self.start is not None or self.stop is not None else tensor
        tensor = tensor[0] if self.one_row else tensor.t() if self.transposed else tensor
        return tensor.clone(memory_format=torch.contiguous_format)


def read(plan: dict[str, Source | None], shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
    """The weights of one dtype, checked to be finite."""
    from safetensors import SafetensorError, safe_open

    sources = {name: source for name, source in plan.items() if source is not None}
    dtype = functools.reduce(torch.promote_types, {DTYPES[source.stored.dtype] for source in sources.values()})
    weights: dict[str, Tensor] = {}
    for file in sorted({source.stored.file for source in sources.values()}):
        try:
            with safe_open(file, framework="pt") as opened:
                for name, source in sources.items():
                    if source.stored.file == file:
                        weights[name] = source.take(opened.get_tensor(source.stored.name)).to(dtype)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {describe(error)}") from error
    for name, shape in shapes.items():
        if name not in weights:
            weights[name] = torch.zeros(shape, dtype=dtype)
        elif not bool(torch.isfinite(weights[name]).all()):
            raise CheckpointError(f"{folder}: tensor for {name} holds NaN or infinite values")
    return weights
