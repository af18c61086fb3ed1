"""Evaluation of a shared model: its mode is never changed, and what depends on the mode is in evaluation all the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn

import igpt
from igpt.errors import ConfigError, NonFiniteError
from igpt.evaluation.features import extract
from igpt.model.image_gpt import ImageGPT
from igpt.model.inference import check_finite, evaluating
from tests.models import random_model

TOKENS = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(0))


def small() -> ImageGPT:
    torch.manual_seed(0)
    return random_model(0.5, n_layer=2, n_head=2, n_embd=16, vocab_size=7, height=4, width=6)


def with_lora() -> Any:
    config = peft.LoraConfig(target_modules=["qkv", "wpe"], r=2, lora_dropout=0.9, init_lora_weights=False)
    return peft.get_peft_model(small(), config)


def with_dropout() -> ImageGPT:
    model = small()
    for block in model.blocks:
        block.proj = nn.Sequential(block.proj, nn.Dropout(0.9))
    return model


def with_hook() -> ImageGPT:
    """Dropout by a hook, which asks the module for its mode."""
    model = small()
    for block in model.blocks:
        block.fc.register_forward_hook(lambda module, _, output: nn.functional.dropout(output, 0.9, module.training))
    return model


MAKERS = [small, with_lora, with_dropout, with_hook]


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("make", MAKERS)
def test_threads_draw_while_others_train(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    expected = igpt.sample(model, 2), igpt.complete(model, TOKENS)
    features = extract(model, TOKENS, raw=True)
    model.train()
    modes: list[bool] = []
    found: list[tuple[Tensor, Tensor]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            modes.append(all(module.training for module in model.modules()))
            model(TOKENS[:1], TOKENS[:1]).loss.backward()

    def draw() -> None:
        given = extract(model, TOKENS, raw=True)
        assert all((given[name] == features[name]).all() for name in features)
        found.append((igpt.sample(model, 2), igpt.complete(model, TOKENS)))

    threads = [threading.Thread(target=draw) for _ in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert modes
    assert all(modes)
    assert all(module.training for module in model.modules())
    assert len(found) == 3
    assert all(torch.equal(mine, wanted) for each in found for mine, wanted in zip(each, expected, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_what_depends_on_the_mode_is_in_evaluation(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    expected = igpt.sample(model, 2)
    model.train()
    assert torch.equal(igpt.sample(model, 2), expected)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(igpt.sample(compiled, 2), expected)
    assert compiled.training
    model.compile(backend="eager")
    assert torch.equal(igpt.sample(model, 2), expected)


def test_a_view_shares_weights_and_hooks_and_is_used_only_where_it_must_be() -> None:
    plain = small().train()
    with evaluating(plain) as used:
        assert used is plain
    model = with_dropout()
    with evaluating(model.eval()) as used:
        assert used is model
    seen: list[Any] = []
    model.train().blocks[0].attn.register_forward_hook(lambda module, *_: seen.append(module))
    with evaluating(model) as used:
        assert used is not model
        assert not any(module.training for module in used.modules())
        used(TOKENS)
        assert [module.training for module in seen] == [False]
        assert all(mine is its for mine, its in zip(model.parameters(), used.parameters(), strict=True))
    assert all(module.training for module in model.modules())


def test_modes_stay_after_errors_and_in_generators_that_are_left() -> None:
    model = with_dropout().train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.ln_f.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        igpt.sample(model, 2)
    handle.remove()
    assert [module.training for module in model.modules()] == before

    def pictures() -> Iterator[Tensor]:
        for seed in range(3):
            yield igpt.sample(model, 1, seed=seed)

    drawn = pictures()
    next(drawn)
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()
    drawn.close()


def test_a_module_with_a_forward_of_its_own_is_asked_to_be_in_evaluation() -> None:
    model = with_dropout().train()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model is in training mode, and its module ImageGPT has a forward of its own; call"):
        igpt.sample(model, 1)
    igpt.sample(model.eval(), 1)


def test_broken_and_empty_weights_are_named() -> None:
    model = small()
    with torch.no_grad():
        model.blocks[1].fc.weight[0, :2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^blocks\.1\.fc\.weight holds 2 NaN or infinite values of 1024"):
        check_finite(model)
    with torch.device("meta"):
        empty = ImageGPT(model.config)
    with pytest.raises(ConfigError, match="model has no values yet: sos is on the device meta"):
        igpt.sample(empty, 1)
