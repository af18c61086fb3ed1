"""The classes that modules of transformers get while a swap stands: copies, replicas, and what others put around modules."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTAttention

import igpt
from igpt.kernels import classes
from tests.huggingface import close, make, result


def plain_again(model: nn.Module) -> bool:
    """No module asks for kernels, and none keeps anything of a swap."""
    return not any(classes.installed(one) or any(name.startswith("kernels") for name in vars(one)) for one in model.modules())


@pytest.mark.parametrize("kind", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_are_plain(model: Any, tokens: Tensor, kind: Any) -> None:
    """They carry no setting, compute with weights of their own, and whoever loads them need not have this project."""
    plain = result(model, tokens)
    with igpt.use_kernels(model) as report:
        result(model, tokens)
        twins = {name: kind(module) for name, module in model.named_modules() if classes.installed(module)}
        whole = copy.deepcopy(model) if kind is copy.copy else kind(model)  # a shallow copy of it has the same modules
        assert len(twins) == 2 + 5 + 2 + 1
        assert not any(classes.installed(module) for module in [*twins.values(), *whole.modules()])
        assert type(twins["transformer.h.0.attn"]) is type(whole.transformer.h[0].attn) is ImageGPTAttention
        assert twins["transformer.h.0.attn"].bias.shape == (1, 1, 32, 32)
        assert b"igpt" not in pickle.dumps(model).replace(b"imagegpt", b"")
        calls = report.calls("attention")
        assert torch.equal(result(whole, tokens), plain)
        assert report.calls("attention") == calls
        norm = twins["transformer.ln_f"]
        norm._parameters = {"weight": nn.Parameter(torch.full((48,), 3.0))}
        x = torch.randn(2, 48)
        close(norm(x), 3 * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
        with igpt.use_kernels(whole) as own:
            close(result(whole, tokens), plain)
            assert own.calls("attention") == 2
        assert torch.equal(result(whole, tokens), plain)
    assert torch.equal(result(model, tokens), plain)
    fresh = make()
    with igpt.use_kernels(fresh):
        fresh.load_state_dict(model.state_dict())
        state = fresh.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_replicas_compute_with_their_own_weights(model: Any, tokens: Tensor) -> None:
    """As DataParallel makes them: the attributes of the original, other weights. They keep its kernels."""

    def replicate(original: Any) -> Any:
        modules = list(original.modules())
        replicas = {module: module._replicate_for_data_parallel() for module in modules}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                replica._modules[name] = replicas[child]
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.detach() * 1.5)
            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer
        return replicas[original]

    bigger = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in bigger.parameters():
            parameter.mul_(1.5)
    wanted, before = result(bigger, tokens), result(model, tokens)
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    padded = result(bigger, tokens, attention_mask=mask)
    with igpt.use_kernels(model) as report:
        replica = replicate(model)
        close(result(replica, tokens), wanted)
        assert report.calls("attention") == 2
        close(result(replica, tokens, attention_mask=mask), padded)
        close(result(model, tokens), before)
    close(result(replica, tokens), wanted)
    igpt.use_kernels(replica).restore()
    assert not any(classes.installed(module) for module in replica.modules())
    close(result(replica, tokens), wanted)
    assert torch.equal(result(model, tokens), before)


class Timer:
    """As a profiler does it: a `forward` on the instance that calls the one that was there."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.inner, self.calls = module, module.forward, 0

        @functools.wraps(module.forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.inner(*args, **kwargs)

        module.forward = timed  # type: ignore[method-assign]

    def close(self) -> None:
        self.module.forward = self.inner  # type: ignore[method-assign]


class Hook:
    """accelerate's."""

    def __init__(self, module: nn.Module) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        self.module, self.calls, self.remove = module, 0, hooks.remove_hook_from_module

        class Counting(hooks.ModelHook):  # type: ignore[misc]
            def post_forward(hook, module: nn.Module, output: Any) -> Any:
                self.calls += 1
                return output

        hooks.add_hook_to_module(module, Counting())

    def close(self) -> None:
        self.remove(self.module)


PARTS = ("transformer", "transformer.h.0.attn", "transformer.h.0.ln_1", "transformer.h.1.mlp.act", "transformer.ln_f")
STEPS = (
    "swap wrap unwrap restore",
    "swap wrap restore unwrap",
    "swap wrap restore swap unwrap restore",
    "swap wrap swap restore restore unwrap",
    "wrap swap restore unwrap",
    "wrap swap unwrap restore",
)
"""What is done in turn."""


@pytest.mark.parametrize("wrapper", [Timer, Hook])
@pytest.mark.parametrize("steps", STEPS)
def test_what_others_put_around_a_module_stays(model: Any, tokens: Tensor, steps: str, wrapper: Any) -> None:
    plain, modules = result(model, tokens), [model.get_submodule(name) for name in PARTS]
    reports: list[Any] = []
    standing: list[Any] = []
    wrappers: list[Any] = []
    for step in steps.split():
        if step == "swap":
            standing.append(igpt.use_kernels(model))
            reports.append(standing[-1])
        elif step == "restore":
            standing.pop().restore()
        elif step == "wrap":
            wrappers = [wrapper(module) for module in modules]
        else:
            for each in wrappers:
                each.close()
        found = result(model, tokens)
        close(found, plain)
        assert standing or torch.equal(found, plain), f"plain after {step}"
        if wrappers and step != "unwrap":
            assert all(each.calls > 0 for each in wrappers), "what was put around is still called"
            for each in wrappers:
                each.calls = 0
        if step == "unwrap":
            assert all(each.calls == 0 for each in wrappers)
            wrappers = []
    assert plain_again(model)
    assert all(report.calls("attention") > 0 for report in reports)
    if steps.startswith("wrap"):
        assert "something else has replaced its forward" in str(reports[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(result(twin, tokens), plain)
    with igpt.use_kernels(model, strict=True, loss="off", palette="off") as report:
        close(result(model, tokens), plain)
        assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
    assert plain_again(model)
    assert torch.equal(result(model, tokens), plain)


@pytest.mark.parametrize("first", ["swap", "offload"])
def test_offloaded_to_the_cpu(model: Any, tokens: Tensor, first: str) -> None:
    """accelerate keeps weights elsewhere, and puts them in place around each call of the module that owns them."""
    accelerate = pytest.importorskip("accelerate")
    hooks = pytest.importorskip("accelerate.hooks")
    plain = result(model, tokens)
    with igpt.use_kernels(model) if first == "swap" else torch.no_grad():
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        close(result(model, tokens), plain)
        if first == "offload":
            with igpt.use_kernels(model) as report:
                close(result(model, tokens), plain)
            assert "something else has replaced its forward" in str(report)
    close(result(model, tokens), plain)
    hooks.remove_hook_from_submodules(model)
    assert plain_again(model)


def test_signatures_are_those_of_the_class(model: Any) -> None:
    modules = [model, *(model.get_submodule(name) for name in PARTS)]
    before = [(inspect.signature(one.forward), typing.get_type_hints(one.forward), one.forward.__doc__) for one in modules]
    names = [(type(one).__name__, type(one).__module__, type(one).__qualname__, repr(one)) for one in modules]
    with igpt.use_kernels(model):
        for one, (signature, hints, text), named in zip(modules, before, names, strict=True):
            assert inspect.signature(one.forward) == signature
            assert inspect.signature(type(one).forward).parameters.keys() == {"self", *signature.parameters}
            assert typing.get_type_hints(one.forward) == hints
            assert one.forward.__doc__ == text
            assert (type(one).__name__, type(one).__module__, type(one).__qualname__, repr(one)) == named


def test_a_trainer_keeps_the_columns_of_a_bare_model(tokens: Tensor) -> None:
    from transformers import ImageGPTModel

    model = make(ImageGPTModel)
    wanted = list(inspect.signature(model.forward).parameters)
    with igpt.use_kernels(model):
        assert list(inspect.signature(model.forward).parameters) == wanted
        assert {"input_ids", "attention_mask", "inputs_embeds"} <= set(wanted)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_parametrized_modules(model: Any, tokens: Tensor, late: bool, inside: bool) -> None:
    """torch makes a class of its own for them too: each gives back what it found, in whatever order."""
    modules = (model.transformer.ln_f, model.transformer.h[0].attn.c_attn)
    plain = result(model, tokens)
    reports = [igpt.use_kernels(model)] if inside else []
    for module in modules:
        parametrize.register_parametrization(module, "weight", Doubled())
    doubled = result(model, tokens)
    assert (doubled - plain).abs().max() > 0.1
    if not inside:
        reports.append(igpt.use_kernels(model))
        assert "weight is parametrized" in str(reports[0])
    close(result(model, tokens), doubled)
    if not late:
        reports[0].restore()
        close(result(model, tokens), doubled)
    for module in modules:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    close(result(model, tokens), plain)
    reports[0].restore()
    assert torch.equal(result(model, tokens), plain)
    assert plain_again(model)


def test_what_is_built_by_the_class_of_a_swapped_module_is_plain(model: Any, tokens: Tensor, tmp_path: Any) -> None:
    inner = model.transformer
    plain = result(inner, tokens)
    with igpt.use_kernels(model):
        twin = type(inner)(inner.config).eval()
        twin.load_state_dict(inner.state_dict())
        inner.save_pretrained(tmp_path)
        loaded = type(inner).from_pretrained(tmp_path).eval()
        for one in (twin, loaded):
            assert plain_again(one)
            assert type(one).__mro__[:1] == type(inner).__mro__[2:3]
            assert torch.equal(result(one, tokens), plain)
    assert type(twin) is type(inner)


def test_a_patch_of_the_class_of_a_swapped_module_ends_with_the_swap(model: Any, tokens: Tensor) -> None:
    plain = result(model, tokens)
    with igpt.use_kernels(model):
        kind = type(model.transformer.ln_f)
        own = kind.forward
        kind.forward = lambda self, x: 2 * own(self, x)
        assert (result(model, tokens) - plain).abs().max() > 0.1, "as long as it stands the patch counts"
    assert torch.equal(result(model, tokens), plain)
    with igpt.use_kernels(model) as report:
        close(result(model, tokens), plain)
        assert report.calls("norm") == 5
        assert type(model.transformer.ln_f) is not kind


def test_a_swap_in_inference_mode_leaves_no_tensor_of_it(model: Any, tokens: Tensor) -> None:
    with torch.inference_mode():
        plain = result(model, tokens)
        with igpt.use_kernels(model):
            close(result(model, tokens), plain)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    result(model, tokens).sum().backward()
