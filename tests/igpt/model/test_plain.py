"""What hangs on a module of the model counts, whatever it is, with kernels and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import igpt
from igpt.model.image_gpt import ImageGPT, RMSNorm
from tests.models import random_model

pytestmark = pytest.mark.filterwarnings("ignore:loss runs as plain", "ignore:Full backward hook")
TOKENS = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 7, "height": 4, "width": 6}
# A ModuleList has no forward: nothing ever calls it.
NAMES = [name for name, module in ImageGPT(igpt.ImageGPTConfig(**SIZES)).named_modules() if name not in ("", "blocks")]
WEIGHTED = [name for name in NAMES if name.rpartition(".")[2] not in ("0", "1", "attn")]


def small() -> ImageGPT:
    torch.manual_seed(0)
    return random_model(0.3, **SIZES)


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def swapped(request: pytest.FixtureRequest) -> Iterator[Callable[[], ImageGPT]]:
    """Makes models, in plain or in kernel mode."""
    if request.param:
        with igpt.use_kernels(attention="torch", norm="torch", mlp="torch", loss="torch"):
            yield small
    else:
        yield small


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS, TOKENS).loss


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_on_every_module_is_called(name: str, swapped: Callable[[], ImageGPT]) -> None:
    model, fired = swapped(), []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    module.register_forward_hook(lambda *_: fired.append("after"))
    module.register_full_backward_pre_hook(lambda *_: fired.append("before backward"))
    loss_of(model).backward()
    assert fired == ["before", "after", "before backward"]
    module = swapped().get_submodule(name)
    model = swapped()
    module = model.get_submodule(name)
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    loss_of(model).backward()
    assert fired[3:] == ["backward"]


@pytest.mark.parametrize("name", NAMES)
def test_another_forward_of_every_module_counts(name: str, swapped: Callable[[], ImageGPT]) -> None:
    model = swapped()
    before, gradient = loss_of(model), "blocks.0.attn.qkv.weight"
    module, kind = model.get_submodule(name), type(model.get_submodule(name))

    def doubled(self: nn.Module, *args: Any) -> Any:
        return 2 * kind.forward(self, *args) + 1

    def replaced() -> None:
        module.forward = doubled.__get__(module)

    def subclassed() -> None:
        module.__class__ = type("Other", (kind,), {"forward": doubled})

    def hooked() -> None:
        module.register_forward_hook(lambda _, __, output: 2 * output + 1)

    found = []
    for change in (hooked, replaced, subclassed):
        model = swapped()
        module = model.get_submodule(name)
        change()
        loss = loss_of(model)
        (grad,) = torch.autograd.grad(loss, model.get_parameter(gradient))
        found.append((loss, grad))
        assert abs(loss - before) > 1e-5
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_parametrization_of_every_weight_counts(name: str, swapped: Callable[[], ImageGPT]) -> None:
    model, other = swapped(), small()
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(2)
    parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    torch.testing.assert_close(loss_of(model), loss_of(other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if "ln_" not in name])
def test_lora_on_every_layer_counts(name: str, swapped: Callable[[], ImageGPT]) -> None:
    model = swapped()
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[name], r=2, init_lora_weights=False), model)
    merged = copy.deepcopy(adapted)
    layer = merged.get_submodule(name)
    with torch.no_grad():
        assert abs(loss_of(adapted) - loss_of(small())) > 1e-4
        layer.merge()
        torch.testing.assert_close(loss_of(adapted), loss_of(merged), atol=1e-5, rtol=1e-4)
        # In a generation, too: the same pixels as those of the model whose weights hold the adapter.
        plain = small()
        plain.get_submodule(name).weight.copy_(layer.get_base_layer().weight)
        drawn = igpt.sample(plain, 2, temperature=0)
        assert torch.equal(igpt.sample(adapted, 2, temperature=0), drawn)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear, RMSNorm])
def test_a_patched_class_counts(
    kind: type[nn.Module], swapped: Callable[[], ImageGPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, called = swapped(), []
    original = kind.forward

    def noted(self: nn.Module, x: Tensor) -> Tensor:
        called.append(self)
        return original(self, x)

    monkeypatch.setattr(kind, "forward", noted)
    loss_of(model)
    assert set(called) == {module for module in model.modules() if type(module) is kind}


def test_hooks_on_all_modules_are_called(swapped: Callable[[], ImageGPT]) -> None:
    model, called = swapped(), set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module)):
        loss_of(model)
    assert called == {model, *(model.get_submodule(name) for name in NAMES)}


def test_the_fused_paths_stay_where_nothing_hangs_on_the_modules() -> None:
    model = small()
    calls = []
    for block in model.blocks:
        block.ln_2.forward = calls.append  # put on and taken off again
        del block.ln_2.forward
    with igpt.use_kernels(model, norm="torch", loss="torch") as report, pytest.MonkeyPatch.context() as patch:
        patch.setattr("igpt.model.image_gpt.rms_norm", lambda *args, **more: calls.append(more) or igpt_norm(*args, **more))
        loss_of(model)
        assert [("residual" in more) for more in calls] == [False, True, False, True, False]
        assert report.calls("loss") == 1
        assert report.refused("loss") == {}


def igpt_norm(*args: Any, **more: Any) -> Any:
    from igpt_kernels.norm import rms_norm

    return rms_norm(*args, **more)


def test_an_output_layer_with_a_bias_keeps_it() -> None:
    model = small()
    head = nn.Linear(16, 7)
    model.head = head
    expected = loss_of(model)
    with igpt.use_kernels(model, loss="torch") as report, pytest.warns(RuntimeWarning, match="the output layer has a bias"):
        torch.testing.assert_close(loss_of(model), expected)
    assert report.refused("loss") == {"the output layer has a bias": 1}


@pytest.mark.parametrize("setting", [{"max_norm": 0.1}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_settings_of_the_position_table_count(setting: dict[str, Any]) -> None:
    model = small()
    model.wpe = nn.Embedding(24, 16, _weight=model.wpe.weight.detach().clone(), **setting)
    before = loss_of(small())
    loss = loss_of(model)
    loss.backward()
    assert (loss != before) == ("max_norm" in setting)
    assert model.wpe.weight.grad.is_sparse == ("sparse" in setting)
    assert bool((model.wpe.weight.grad.to_dense()[3] == 0).all()) == ("padding_idx" in setting)


def test_weights_that_accelerate_offloads(swapped: Callable[[], ImageGPT]) -> None:
    model = swapped()
    expected = model(TOKENS).logits, loss_of(model), model.features(TOKENS), igpt.sample(model, 2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.wpe.weight.is_meta
    found = model(TOKENS).logits, loss_of(model), model.features(TOKENS), igpt.sample(model, 2)
    torch.testing.assert_close(found, expected)
    assert model.sos.is_meta
    with pytest.raises(igpt.errors.IgptError, match="tokens"):
        model(TOKENS + 7)


@pytest.mark.slow
def test_compiled_models_follow_what_hangs_on_modules(swapped: Callable[[], ImageGPT]) -> None:
    model = swapped()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits)
    for name in ("wpe", "blocks.0.ln_2", "head"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output: 2 * output)
        torch._dynamo.reset()  # torch.compile does not look for new hooks by itself
        torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits)
