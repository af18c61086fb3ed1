"""Subclasses, patched classes and replaced parts of Hugging Face's ImageGPT: what computes differently is never skipped."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ImageGPTModel
from transformers.activations import QuickGELUActivation
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTAttention, ImageGPTLayerNorm, ImageGPTMLP

import igpt
from igpt.errors import ConfigError, KernelRefused
from tests.huggingface import close, make, result

Change = Callable[[Any, pytest.MonkeyPatch], Any]


def attention(model: Any) -> Any:
    return model.transformer.h[1].attn


class OwnForward(ImageGPTAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


class OwnScores(ImageGPTAttention):
    def _attn(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
        return super()._attn(2 * query, key, value, *args)


class OwnUpcast(ImageGPTAttention):
    def _upcast_and_reordered_attn(self, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
        return super()._upcast_and_reordered_attn(2 * query, key, value, *args)


class OfOwnForward(OwnForward):
    pass


class OwnNorm(ImageGPTLayerNorm):
    def forward(self, tensor: Tensor) -> Tensor:
        return super().forward(tensor) + 1


class OwnActivation(QuickGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LinearNorm(nn.Module):
    """In the place of a norm, as libraries of kernels have theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def of_class(place: Callable[[Any], nn.Module], kind: type) -> Change:
    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(place(model), "__class__", kind)

    return change


def patched(kind: Any, name: str, factor: float, wraps: bool = False) -> Change:
    """A method of a class by another function, as monkey patches do it, with its name or without."""

    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        own = getattr(kind, name)

        def other(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return own(self, factor * x, *args, **kwargs)

        patch.setattr(kind, name, functools.wraps(own)(other) if wraps else other)

    return change


def on_instance(place: Callable[[Any], Any], name: str) -> Change:
    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        module = place(model)
        own = getattr(module, name)
        patch.setattr(module, name, types.MethodType(lambda self, x, *args: own(x.roll(1, -1), *args), module))

    return change


def replaced(owner: Callable[[Any], Any], name: str, value: Any) -> Change:
    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        delattr(owner(model), name)
        setattr(owner(model), name, value)

    return change


def upcast(change: Change) -> Change:
    def both(model: Any, patch: pytest.MonkeyPatch) -> None:
        for block in model.transformer.h:
            block.attn.reorder_and_upcast_attn = True
        change(model, patch)

    return both


CHANGES: dict[str, tuple[Change, str, str]] = {
    "a forward": (of_class(attention, OwnForward), "attention", "OwnForward has a forward of its own"),
    "an inherited forward": (of_class(attention, OfOwnForward), "attention", "OwnForward has a forward of its own"),
    "scores": (of_class(attention, OwnScores), "attention", "OwnScores has a _attn of its own"),
    "upcast scores": (upcast(of_class(attention, OwnUpcast)), "attention", "OwnUpcast has a _upcast_and_reordered_attn"),
    "a norm": (of_class(lambda model: model.transformer.ln_f, OwnNorm), "norm", "OwnNorm has a forward of its own"),
    "an activation": (of_class(lambda model: model.transformer.h[0].mlp.act, OwnActivation), "mlp", "OwnActivation has a"),
    "a patched class": (patched(ImageGPTLayerNorm, "forward", -1.0), "norm", "ImageGPTLayerNorm.forward has been patched"),
    "a patch with its name": (patched(ImageGPTLayerNorm, "forward", -1.0, True), "norm", "ImageGPTLayerNorm.forward has been"),
    "patched scores": (patched(ImageGPTAttention, "_attn", 2.0, True), "attention", "ImageGPTAttention._attn has been patched"),
    "a patched activation": (patched(QuickGELUActivation, "forward", 2.0), "mlp", "QuickGELUActivation.forward has been"),
    "an instance's scores": (on_instance(attention, "_attn"), "attention", "something else has replaced its _attn"),
    "an instance's norm": (on_instance(lambda model: model.transformer.ln_f, "forward"), "norm", "replaced its forward"),
    "another norm": (
        replaced(lambda model: model.transformer.h[0], "ln_1", LinearNorm()), "norm", "LinearNorm stands in the place of"
    ),
    "a mask of its own": (
        lambda model, patch: attention(model).bias.copy_(torch.ones(32, 32).tril().triu(-3)), "attention", "its causal mask"
    ),
    "a function": (
        replaced(lambda model: model.transformer.h[0].mlp, "act", torch.tanh), "mlp", "the activation is <built-in"
    ),
    "the same name": (
        replaced(
            lambda model: model.transformer.h[0].mlp,
            "act",
            type("QuickGELUActivation", (nn.Module,), {"forward": lambda self, x: -x})(),
        ),
        "mlp",
        "the activation is QuickGELUActivation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_computes_differently_stays_and_is_told(
    model: Any, tokens: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, op, reason = CHANGES[name]
    before = result(model, tokens)
    change(model, monkeypatch)
    wanted = result(model, tokens)
    assert (wanted - before).abs().max() > 1e-2
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        close(result(model, tokens), wanted)
    assert reason in str(report.as_dict()[op]["reason"])
    with pytest.raises(ConfigError, match=f"{op}: .*"):
        igpt.use_kernels(model, strict=True, loss="off", palette="off")
    igpt.use_kernels(model, strict=True, loss="off", palette="off", **{op: "off"}).restore()  # type: ignore[arg-type]
    assert torch.equal(result(model, tokens), wanted)


@pytest.mark.filterwarnings("ignore:.* runs as plain:RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in CHANGES if name.startswith(("a patch", "patched", "an instance"))])
def test_a_patch_while_a_swap_stands(model: Any, tokens: Tensor, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, op, _ = CHANGES[name]
    before = result(model, tokens)
    with monkeypatch.context() as patch:
        change(model, patch)
        wanted = result(model, tokens)
    close(result(model, tokens), before)
    with igpt.use_kernels(model, match_hf_scale=True) as report, monkeypatch.context() as patch:
        change(model, patch)
        close(result(model, tokens), wanted)
        assert report.refused(op) or name == "an instance's norm", "the last one calls what was there"
    with monkeypatch.context() as patch, igpt.use_kernels(model, match_hf_scale=True):
        change(model, patch)
        close(result(model, tokens), wanted)


class Quiet(ImageGPTAttention):
    """Overrides nothing that is replaced."""

    def extra_repr(self) -> str:
        return "quiet"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().__call__(*args, **kwargs)
        return 2 * y, weights


class OwnMLP(ImageGPTMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


class OwnModel(ImageGPTModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


def test_subclasses_that_override_nothing_replaced_are_swapped(model: Any, tokens: Tensor) -> None:
    model.transformer.h[0].attn.__class__ = Quiet
    model.transformer.h[0].mlp.__class__ = OwnMLP
    model.transformer.ln_f.__class__ = type("Norm", (ImageGPTLayerNorm,), {})
    wanted = result(model, tokens)
    with igpt.use_kernels(model, match_hf_scale=True, strict=True, loss="off", palette="off") as report:
        close(result(model, tokens), wanted)
        assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
    assert type(model.transformer.h[0].attn) is Quiet
    model.transformer.__class__ = OwnModel
    wanted = result(model, tokens)
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        close(result(model, tokens), wanted)
    assert "OwnModel has a forward of its own" in str(report.as_dict()["attention"]["reason"])


@pytest.mark.filterwarnings("ignore:attention runs as plain:RuntimeWarning")
def test_what_is_done_to_the_weights_is_not_left_out(tokens: Tensor) -> None:
    """Dropout that is on alone, a module in its place, a hook on it: the kernel makes no weights."""
    model = make(attn_pdrop=0.5)
    attention = model.transformer.h[1].attn
    seen: list[Tensor] = []

    def both(words: str) -> None:
        torch.manual_seed(1)
        wanted, number = result(model, tokens), len(seen)
        with igpt.use_kernels(model, match_hf_scale=True) as report:
            torch.manual_seed(1)
            close(result(model, tokens), wanted)
        assert len(seen) == 2 * number
        assert [words in reason for reason in report.refused("attention")] == ([True] if words else [])
        seen.clear()

    both("")
    attention.attn_dropout.train()
    both("dropout of 0.5")
    attention.attn_dropout.eval()
    model.train()
    for block in model.transformer.h:
        block.attn.attn_dropout.eval()
    both("")
    model.eval()
    hook = attention.attn_dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    both("hooks on it")
    hook.remove()
    attention.attn_dropout = nn.Identity()
    both("")
    attention.attn_dropout = nn.Threshold(0.2, 0.0)
    both("a Threshold")
    with igpt.use_kernels(model, strict=True, loss="off", palette="off"), pytest.raises(KernelRefused, match="Threshold"):
        result(model, tokens)


def test_hooks_on_what_a_swapped_module_calls_fire(model: Any, tokens: Tensor) -> None:
    called: list[str] = []
    for name, module in model.named_modules():
        if "attn_dropout" not in name:
            module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    result(model, tokens)
    plain = list(called)
    called.clear()
    with igpt.use_kernels(model) as report:
        result(model, tokens)
    assert called == plain
    assert report.calls("attention") == 2


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", ["attention", "norm", "mlp", "loss", "palette"])
def test_a_name_that_does_not_exist_is_an_error(model: Any, op: str, strict: bool) -> None:
    real = {"palette": ("ext", "torch", "reference"), "loss": ("triton", "ext", "torch", "reference")}.get(
        op, ("triton", "torch", "reference")
    )
    names: list[Any] = ["cuda", "Triton", "", "flash", " torch", None, 1, 0, 1.0, b"torch", ["torch"], torch.tensor(True)]
    names += [name for name in ("ext", "triton") if name not in real]
    for target in (None, model, model.transformer, nn.Sequential(model), attention(model)):
        for name in names:
            with pytest.raises(ConfigError, match=f"{op} must be auto, off, {', '.join(real)}") as caught:
                igpt.use_kernels(target, **{op: name}, strict=strict)
            assert "got" in str(caught.value)
    for option in ("strict", "match_hf_scale"):
        for value in ("no", 1, None, 0):
            with pytest.raises(ConfigError, match=f"{option} must be True or False, got"):
                igpt.use_kernels(model, **{option: value})
