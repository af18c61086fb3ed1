"""`use_kernels`: run a model by fast kernels instead of plain PyTorch, ours or Hugging Face's ImageGPT, and back again."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from igpt.console import aligned_table
from igpt.errors import ConfigError
from igpt.kernels import classes, huggingface, state
from igpt_kernels import backends

Request = str | bool
_OPERATION = {
    "attention": "flash_attention",
    "norm": "rms_norm",
    "mlp": "quick_gelu",
    "loss": "linear_cross_entropy",
    "palette": "palette_lookup",
}
_swap_ids = itertools.count(1)
_lock = threading.RLock()  # around what is set on modules of transformers: two threads may come and go at once


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    op: str
    modules: int | None
    """How many modules ask for it; None: all there are and will be."""
    requested: str
    active: str
    """What runs: a backend, or "plain"."""
    reason: str
    """Why that is not what was requested, or not the fastest there is."""


@dataclass
class KernelReport:
    """What `use_kernels` did. Print it; `restore()` undoes it; as a context manager it is undone on leaving.

    Attributes:
        rows: one for each operation.
        model: the model it was called with, or None for the process default.
        freed_bytes: memory of Hugging Face's causal masks that is free while the swap stands: the layers share one.
    """

    rows: tuple[Row, ...]
    model: nn.Module | None
    freed_bytes: int
    _settings: state.Settings
    _owners: Sequence[Any] | None
    _installed: Sequence[nn.Module]
    _compiled_before: Mapping[str, int]
    _refused_before: Mapping[str, Counter[str]]
    _stands: bool = True
    _entered: bool = False

    def calls(self, op: str) -> int:
        """Calls of `op` that a kernel served since the swap (those inside compiled graphs are not seen)."""
        return state.calls(self._settings, op)

    def compiled(self, op: str) -> int:
        """Places where a kernel of `op` went into a graph of torch.compile, in this process since the swap."""
        return state.compiled_in(op) - self._compiled_before[op]

    def refused(self, op: str) -> Mapping[str, int]:
        """Calls of `op` that went the plain way since the swap, by reason; of a graph of torch.compile each place once."""
        return state.refusals(self._settings, op) + (state.refusals(None, op) - self._refused_before[op])

    def restore(self) -> None:
        """Take exactly this swap's settings off. Swaps may be restored in any order; a second call does nothing."""
        with _lock:
            if not self._stands:
                return
            self._stands = False
            state.take(self._settings, self._owners)
            for module in self._installed:
                if not state.stands(module):
                    huggingface.uninstall(module)

    def __enter__(self) -> KernelReport:
        if self._entered or not self._stands:
            why = "it is entered already" if self._stands else "it has been restored"
            raise ConfigError(f"this swap cannot be entered: {why}; call use_kernels again")
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def as_dict(self) -> dict[str, dict[str, object]]:
        """The report as plain data, by operation."""
        return {
            row.op: vars(row)
            | {"calls": self.calls(row.op), "compiled": self.compiled(row.op), "refused": dict(self.refused(row.op))}
            for row in self.rows
        }

    def __str__(self) -> str:
        lines = [("op", "modules", "requested", "active", "calls", "reason")]
        for row in self.rows:
            served = str(self.calls(row.op)) + (f" +{self.compiled(row.op)} compiled" if self.compiled(row.op) else "")
            reasons = [row.reason] if row.reason else []
            reasons += [f"{number} calls plain: {reason}" for reason, number in self.refused(row.op).items()]
            modules = "all" if row.modules is None else str(row.modules)
            lines.append((row.op, modules, row.requested, row.active, served, "; ".join(reasons)))
        return "\n".join(aligned_table(lines))


@dataclass(frozen=True)
class _Facts:
    """What decides which kernels can run: of a model's weights, or without a model of this machine's best device."""

    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int]
    """The size that each operation's backends may be limited in."""

    def explain(self, op: str) -> list[tuple[str, list[str]]]:
        """The backends of an operation, best first, with what speaks against each."""
        operation = _OPERATION[op]
        name = backends.SIZE_ARGUMENT[operation]
        sizes = {} if name is None else {name: self.sizes[op]}
        dtype = torch.uint8 if op == "palette" else self.dtype
        return backends.explain(operation, dtype=dtype, device=self.device, **sizes)


def _facts(model: nn.Module | None, modules: Mapping[Any, str]) -> _Facts:
    sizes = {"attention": 64, "norm": 512, "mlp": 2048, "loss": 512}
    if model is None:
        return _Facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32, sizes)
    for module, op in modules.items():
        if op == "attention":
            sizes["attention"] = module.head_dim
        elif op == "norm":
            sizes["norm"] = module.weight.numel()
        elif op == "loss":
            sizes["loss"] = module.config.vocab_size
    # A replica of DataParallel has no parameters; a quantized model may have none that are floating point.
    weights = itertools.chain(model.parameters(), (getattr(module, "weight", None) for module in modules), model.buffers())
    weight = next((each for each in weights if isinstance(each, torch.Tensor) and each.is_floating_point()), torch.empty(0))
    return _Facts(weight.device, weight.dtype, sizes)


def _choose(op: str, request: Request, facts: _Facts) -> tuple[str | None, str, str]:
    """The setting for a request, what it comes to, and why that is not what was asked or the best."""
    table = facts.explain(op)
    names = [name for name, _ in table]
    if not isinstance(request, (str, bool)) or str(request) not in ("True", "False", "auto", "off", *names):
        raise ConfigError(f"{op} must be auto, off, {', '.join(names)}; got {request!r}")
    if request in (False, "off"):
        return None, "plain", "switched off"
    if request in (True, "auto"):
        chosen = backends.choose("auto", table, op)
        return (
            "auto",
            chosen,
            "; ".join(f"{name}: {', '.join(why)}" for name, why in table[: names.index(chosen)]),
        )
    reasons = dict(table)[str(request)]
    return (None, "plain", f"{request} cannot run: {', '.join(reasons)}") if reasons else (str(request), str(request), "")


def _port_reason(op: str, facts: _Facts, match_hf_scale: bool) -> str:
    """What to know of an operation of Hugging Face's port, beside the reasons of `_choose`."""
    if op == "loss":
        return "logits are part of the port's output, so they are made in any case"
    head_dim = facts.sizes["attention"]
    if op != "attention" or not huggingface.truncates_scale(head_dim):
        return ""
    version = getattr(sys.modules.get("transformers"), "__version__", "of this version")
    if match_hf_scale:
        return f"scores divided by {int(head_dim**0.5)}, as transformers {version} does, not by sqrt({head_dim})"
    return (
        f"scores divided by sqrt({head_dim}) = {head_dim**0.5:.3f}, where transformers {version} divides by "
        f"{int(head_dim**0.5)} (match_hf_scale=True keeps that)"
    )


def use_kernels(
    model: nn.Module | None = None,
    *,
    attention: Request = "auto",
    norm: Request = "auto",
    mlp: Request = "auto",
    loss: Request = "auto",
    palette: Request = "auto",
    strict: bool = False,
    match_hf_scale: bool = False,
) -> KernelReport:
    """Run a model's operations by fast kernels instead of plain PyTorch. Results are equal up to rounding.

    ``use_kernels()`` sets the process default, for every igpt model built already or later. ``use_kernels(model)`` sets one
    model, which then ignores the default: an `igpt.ImageGPT`, or Hugging Face's ``ImageGPTModel``,
    ``ImageGPTForCausalImageModeling`` or ``ImageGPTForImageClassification``. It may be wrapped by torch.compile, DDP, FSDP2 or
    PEFT. ``with use_kernels(...):`` restores on exit, after exceptions too; regions may overlap and end in any order. A
    per-model setting overrides the process default; among equals the newest that stands wins.

    Settings belong to the model or to the process, not to a thread: autograd runs backward on threads of its own. Threads that
    want different settings use different models. Copies and pickles of a model do not take its settings along.

    A call that a kernel cannot serve goes the original way (``output_attentions``, padding, cross attention, dropout on the
    weights); the report counts it with its reason, and a warning says it once.

    Args:
        model: the model, or None for the process default.
        attention: ``"auto"``, a backend by name (``"triton"``, ``"torch"``, ``"reference"``), or ``"off"`` / False.
        norm: the root-mean-square norms, likewise.
        mlp: the activation of the MLP, likewise.
        loss: output matrix and cross-entropy without the logits, likewise, also ``"ext"``; of igpt models only.
        palette: how `igpt.Palette.encode` looks colours up: ``"auto"``, ``"ext"``, ``"torch"``, ``"reference"``, or ``"off"``
            for plain PyTorch. Exact on every backend. With `model`, of that model's palette.
        strict: raise instead of going the plain way, now or in a later call, for operations not switched off.
        match_hf_scale: divide scores as the installed transformers does. Release 5.17 truncates sqrt(D) to an integer, 11 for
            11.31 and 9 for 9.80; by default that is corrected.

    Returns:
        A report: print it, `restore()` it, or use it as a context manager. `state_dict` is untouched. The layers of a
        Hugging Face model share one causal mask (n_positions² bytes) while the swap stands. Set and restore such swaps while
        no other thread runs the model.

    Raises:
        ConfigError: a value that is not a backend's name; `match_hf_scale` without such a model; or, when strict, a request
            that cannot be met (all reasons).
        TypeError: `model` has no Image GPT in it.
    """
    requests: dict[str, Request] = {"attention": attention, "norm": norm, "mlp": mlp, "loss": loss, "palette": palette}
    for name, value in {"strict": strict, "match_hf_scale": match_hf_scale}.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
    ours: dict[Any, str] = {}
    theirs: dict[nn.Module, str] = {}
    if model is not None:
        if isinstance(model, nn.Module):
            ours = {module: getattr(module, "kernel_op") for module in model.modules() if hasattr(module, "kernel_op")}  # noqa: B009
            palettes = [module.palette for module in model.modules() if getattr(module, "palette", None) is not None]
            ours |= dict.fromkeys((each for each in palettes if hasattr(each, "kernels")), "palette")
            theirs = huggingface.find(model)
        if not ours and not theirs:
            raise TypeError(f"model must be an Image GPT of igpt or transformers, or hold one; got {type(model).__name__}")
    if match_hf_scale and not theirs:
        raise ConfigError("match_hf_scale is for models of transformers; model has no such attention in it")
    kept = {module: huggingface.unsupported_reason(module, op) for module, op in theirs.items()}
    facts = _facts(model, {module: op for module, op in (ours | theirs).items() if not kept.get(module)})

    settings = dict(state.PLAIN, swap_id=str(next(_swap_ids)), scale="ported" if match_hf_scale else None)
    settings["strict"] = "yes" if strict else None
    rows, unmet = [], []
    for op in state.OPS:
        able = [module for module, kind in (ours | theirs).items() if kind == op and not kept.get(module)]
        backend, runs, reason = _choose(op, requests[op], facts)
        asked = requests[op] not in ("off", False)
        told = [reason] if reason and not (op == "loss" and theirs and asked) else []
        missed = asked and backend is None
        if asked and theirs and op != "palette":
            left = sorted({kept[module] for module, kind in theirs.items() if huggingface.setting_name(kind) == op} - {""})
            told += [text for text in (_port_reason(op, facts, match_hf_scale),) if text] + left
            missed = missed or bool(left)
        if model is not None and not able:
            backend, runs = None, "plain"
            if op == "palette" and not told:
                told = ["the model has no palette of igpt"]
            missed = missed or (asked and requests[op] not in ("auto", True))
        if missed:
            unmet.append(f"{op}: {'; '.join(told)}")
        settings[op] = backend
        rows.append(Row(op, None if model is None else len(able), str(requests[op]), runs, "; ".join(told)))
    if strict and unmet:
        raise ConfigError("use_kernels(strict=True) cannot be met: " + "; ".join(unmet))

    with _lock:
        # Those that another swap has installed already, too: "off" inside of it must reach them.
        wanted = {
            module: op
            for module, op in theirs.items()
            if settings[huggingface.setting_name(op)] is not None or classes.installed(module)
        }
        installed = {module: op for module, op in wanted.items() if not kept[module]}
        for module, op in installed.items():
            huggingface.install(module, op)
        freed = 0
        if settings["attention"] is not None:
            freed = huggingface.share_masks(module for module, op in installed.items() if op == "attention")
        owners = None if model is None else [*ours, *installed]
        state.put(settings, owners)
    return KernelReport(
        rows=tuple(rows),
        model=model,
        freed_bytes=freed,
        _settings=settings,
        _owners=owners,
        _installed=list(installed),
        _compiled_before={op: state.compiled_in(op) for op in state.OPS},
        _refused_before={op: state.refusals(None, op) for op in state.OPS},
    )
