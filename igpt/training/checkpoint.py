"""Checkpoints of a run: folders that are whole or absent, whatever moment the process dies at.

``RUN/checkpoints/step-N/`` holds the model in Hugging Face format (so that the folder loads in transformers too), and

    optim.safetensors   Adam's step count and moments, each under ``<kind>/<parameter name>``
    state.json          what the training loop needs to go on: step, random states, results so far
    COMPLETE            JSON: size and SHA-256 of every other file; written last

A checkpoint is written into a temporary folder beside its place. Every file and the folder are flushed to the disk. Then the
folder is renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igpt.errors import CheckpointError, DataError, NonFiniteError
from igpt.files import TEMPORARY, describe, flush_to_disk, open_plain, read_json, reason, regular_size
from igpt.training.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from igpt.model.image_gpt import ImageGPT

MARKER = "COMPLETE"
STATE = "state.json"
OPTIMIZER = "optim.safetensors"
_NEEDED = ("config.json", "model.safetensors", OPTIMIZER, STATE)
_KINDS = ("step", "exp_avg", "exp_avg_sq")
_FLOATS = ("F64", "F32", "F16", "BF16")
_STEP = re.compile(r"step-([0-9]+)")
_TRASH, _REPLACED = ".trash-", ".replaced-"
_MAX_MARKER_BYTES = 1 << 20  # ours take 500
_MAX_STATE_BYTES = 32 << 20  # losses since the last line of metrics.jsonl: 20 bytes for each of `log_every` steps
_MAX_HEADER_BYTES = 16 << 20  # of the moments: 120 bytes a tensor


def checkpoints(run: Path | str) -> list[tuple[int, Path]]:
    """All checkpoint folders of a run as (step, folder), largest step first, whole or not."""
    folder = Path(run) / CHECKPOINTS
    names = [(match, path) for path in (folder.iterdir() if folder.is_dir() else ()) if (match := _STEP.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in names), reverse=True)


def find_damage(folder: Path | str) -> str | None:
    """Why a checkpoint cannot be trusted, or None when every file is as it was written.

    Cost: every file is read and hashed (SHA-256, 1.7 GB/s on one core here).
    """
    folder = Path(folder)
    try:
        if not os.path.lexists(folder / MARKER):
            return f"no {MARKER} file: it was not written or copied to its end"
        listed = read_json(folder / MARKER, limit=_MAX_MARKER_BYTES, strict=True)["files"]
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # DataError is a ValueError
        return f"{MARKER} is not readable ({describe(error)})"
    for name in sorted({*files, *_NEEDED}):
        if name not in files or Path(name).name != name:
            return f"{MARKER} does not list {name}" if name not in files else f"{MARKER} lists {name!r}, which is no file name"
        size, digest = files[name]
        try:
            if not os.path.lexists(folder / name):
                return f"{name} is missing"
            found = regular_size(folder / name)
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
            if _sha256(folder / name) != digest:
                return f"{name} is damaged: its SHA-256 is not the one that was written"
        except (OSError, DataError) as error:
            return f"{name} cannot be read ({describe(error)})"
    return None


def latest_checkpoint(run: Path | str) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; None when there is none.

    Every newer one that is skipped gives a warning with its reason.
    """
    for _, folder in checkpoints(run):
        reason = find_damage(folder)
        if reason is None:
            return folder
        warnings.warn(f"skipped checkpoint {folder}: {reason}", stacklevel=2)
    return None


def resolve_model(source: Path | str) -> Path | str:
    """The folder to read a model from, for what a user may name as one.

    Args:
        source: a run folder (gives its newest checkpoint), a checkpoint or any folder in Hugging Face format (gives itself);
            or something that is no folder, such as a hub id (given back as it is; `ImageGPT.from_pretrained`
            knows what to do with it or says what is wrong).

    Raises:
        CheckpointError: a run folder without an undamaged checkpoint, or a checkpoint that is damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        return source
    if (folder / CHECKPOINTS).is_dir() and not (folder / "config.json").exists():
        newest = latest_checkpoint(folder)
        if newest is None:
            raise CheckpointError(f"{folder} holds no undamaged checkpoint to read a model from{_reasons(folder)}")
        return newest
    if (folder / MARKER).exists() or (folder / STATE).exists():
        reason = find_damage(folder)
        if reason is not None:
            raise CheckpointError(f"checkpoint {folder}: {reason}")
    return folder


def save_checkpoint(
    run: Path | str, step: int, *, model: ImageGPT, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write ``RUN/checkpoints/step-N`` durably, then delete old ones.

    A checkpoint of the same step is replaced. Of those up to `step`, the newest `keep` that are whole stay; one that is
    being deleted is renamed first, so that no moment shows half of it.

    Args:
        run: run folder; must exist.
        step: optimizer steps made.
        model: written by ``model.save_pretrained``, palette included.
        optimizer: Adam or AdamW over parameters of `model`.
        state: what `load_checkpoint` gives back; plain JSON values, finite numbers.
        keep: complete checkpoints to keep, at least 1.

    Returns:
        The folder.

    Raises:
        CheckpointError: the disk is full, read-only, or refuses for another reason. Older checkpoints are untouched.
        NonFiniteError: a weight is NaN or infinite; nothing is written.
    """
    if keep < 1:
        raise CheckpointError(f"keep must be at least 1, got {keep}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"{name} holds NaN or infinite values at step {step}; no checkpoint was written")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(run) / CHECKPOINTS
    final, part, old = (folder / f"{prefix}step-{step}" for prefix in ("", TEMPORARY, _REPLACED))
    try:
        folder.mkdir(exist_ok=True)
        remove_leftovers(run)
        part.mkdir()
        model.save_pretrained(part)
        save_file(_moments(model, optimizer), part / OPTIMIZER)
        text = json.dumps({"format": 1, "step": step, **state}, indent=1, allow_nan=False)
        (part / STATE).write_text(text, encoding="utf-8")
        files = {}
        for path in sorted(part.iterdir()):
            path.chmod(0o644)  # safetensors 0.8 leaves 0600, unreadable for the colleague it is shared with
            flush_to_disk(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        (part / MARKER).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        flush_to_disk(part / MARKER)
        flush_to_disk(part)
        if final.exists():
            os.rename(final, old)
        os.rename(part, final)
        flush_to_disk(folder)
    except (OSError, SafetensorError, DataError) as error:  # DataError: a file of the model could not be written
        if old.exists() and not final.exists():
            os.rename(old, final)
        cause = error.__cause__ if isinstance(error, DataError) else error
        why = reason(cause if isinstance(cause, OSError) else error)
        raise CheckpointError(f"cannot write checkpoint {final}: {why}; older checkpoints are untouched") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    try:
        remove_leftovers(run)
    except OSError as error:
        warnings.warn(f"{folder} could not be tidied up: {reason(error)}", stacklevel=2)
    prune(run, step, keep)
    return final


def prune(run: Path | str, step: int, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints up to `step`; later ones, left by a damaged past, are not touched.

    What cannot be deleted stays, with a warning. Only the process that holds the run's lock may call it.
    """
    kept = 0
    for number, folder in checkpoints(run):
        if number > step:
            continue
        if kept < keep:
            # The marker alone tells here: hashing every older checkpoint on each save would cost more than the save.
            kept += (folder / MARKER).exists()
            continue
        trash = folder.with_name(f"{_TRASH}{folder.name}")
        try:
            os.rename(folder, trash)
            _remove(trash)
        except OSError as error:
            warnings.warn(f"the old checkpoint {folder} could not be deleted: {reason(error)}", stacklevel=2)


def _remove(path: Path) -> None:
    """Delete a file or a folder; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(run: Path | str) -> None:
    """Tidy up after a killed process: delete half-written and half-deleted checkpoint folders, and put back one that was
    about to be replaced. Only the process that holds the run's lock may call it.
    """
    folder = Path(run) / CHECKPOINTS
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        final = folder / path.name.removeprefix(_REPLACED)
        if path.name.startswith(_REPLACED) and not final.exists():
            os.rename(path, final)
        elif path.name.startswith((TEMPORARY, _TRASH, _REPLACED)):
            _remove(path)


def load_checkpoint(folder: Path | str, *, model: ImageGPT, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint's weights into `model` and its moments into `optimizer`, and give its state.

    Everything is read and checked first: on an error neither has changed.

    Raises:
        CheckpointError: missing, incomplete, damaged, or of another model; the tensor, what was got and what is wanted are
            named.
    """
    from igpt.model.image_gpt import ImageGPT

    folder = Path(folder)
    reason = find_damage(folder) if folder.is_dir() else "no such folder"
    if reason is not None:
        raise CheckpointError(f"checkpoint {folder}: {reason}")
    try:
        state = read_json(folder / STATE, limit=_MAX_STATE_BYTES, strict=True)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    step = state.get("step") if isinstance(state, dict) and state.get("format") == 1 else None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        raise CheckpointError(f"{folder / STATE}: must hold an object with format 1 and an integer step of at least 0")
    found = ImageGPT.from_pretrained(folder)
    weights = found.state_dict()
    for name, value in model.state_dict().items():
        if name not in weights and name.endswith("bias"):  # zero biases are not told from absent ones on disk
            weights[name] = torch.zeros_like(value)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _compare(folder, {name: tuple(value.shape) for name, value in weights.items()}, wanted)
    for field in dataclasses.fields(model.config):
        ours, theirs = getattr(model.config, field.name), getattr(found.config, field.name)
        if field.name != "bias" and ours != theirs:
            raise CheckpointError(f"checkpoint {folder}: {field.name} is {theirs!r}, the model has {ours!r}")
    if optimizer is not None:
        _load_moments(folder, model, optimizer, step)
    model.load_state_dict(weights)
    return state


def _moments(model: ImageGPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _load_moments(folder: Path, model: ImageGPT, optimizer: torch.optim.Optimizer, step: int) -> None:
    path = folder / OPTIMIZER
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes: dict[str, tuple[int, ...]] = {}
    if step:  # none are written before the first step
        for parameter in parameters:
            for kind in _KINDS:
                shapes[f"{kind}/{names[id(parameter)]}"] = () if kind == "step" else tuple(parameter.shape)
    tensors = _read_tensors(path, shapes)
    for name, value in tensors.items():
        signed = name.startswith("exp_avg/")
        if not bool(torch.isfinite(value).all()) or not (signed or bool((value >= 0).all())):
            raise CheckpointError(f"{path}: tensor {name} must be finite{'' if signed else ' and not below 0'}")
    state = {}
    for index, parameter in enumerate(parameters):
        if tensors:
            state[index] = {kind: tensors[f"{kind}/{names[id(parameter)]}"] for kind in _KINDS}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of `shapes`, in floating point. Others are not even loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_plain(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a readable safetensors file: its header takes {header:,} bytes")
        with safe_open(path, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            _compare(path, {name: tuple(part.get_shape()) for name, part in parts.items()}, shapes)
            for name, part in parts.items():
                if part.get_dtype() not in _FLOATS:
                    raise CheckpointError(f"{path}: tensor {name} must be floating point, got {part.get_dtype()}")
            return {name: tensors.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, DataError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _compare(where: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless both have the same names and shapes."""
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing; the model wants {wanted[name]}")
        got = found[name]
        if name not in wanted:
            raise CheckpointError(f"{where}: unknown tensor {name} {got}")
        if got != wanted[name]:
            raise CheckpointError(f"{where}: tensor {name} must be {wanted[name]}, got {got}")


def _reasons(run: Path) -> str:
    found = [f"{folder.name}: {find_damage(folder)}" for _, folder in checkpoints(run)]
    return f" ({'; '.join(found)})" if found else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
