"""Padding, causal masks and caches of Hugging Face's ImageGPT, swapped: what is hidden stays hidden, compiled or not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import igpt
from igpt.errors import KernelRefused
from tests.huggingface import close, make, result

CACHE = "past_key_values" if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24) else "cache"
STEPS = ((0, 7), (7, 11), (11, 12))
"""A prompt, a few tokens more, and one."""


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sliding(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.sliding_window, config.layer_types = 5, ["sliding_attention"] * config.n_layer
    return config


CACHES: dict[str, Callable[[Any], Any]] = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
    "sliding": lambda config: DynamicCache(config=sliding(config)),
    "static and sliding": lambda config: StaticCache(config=sliding(config), max_cache_len=24),
    "encoder and decoder": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
}


def padding(hidden: slice | None) -> Tensor | None:
    if hidden is None:
        return None
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, hidden] = 0
    return mask


def logits(call: Any, config: Any, tokens: Tensor, cache: str, hidden: slice | None, steps: Any = STEPS) -> Tensor:
    """Of each step; without a cache each step sees all tokens so far."""
    kept, mask, found = CACHES[cache](config), padding(hidden), []
    for start, end in steps:
        options: dict[str, Any] = {"use_cache": False} if kept is None else {CACHE: kept, "use_cache": True}
        if mask is not None:
            options["attention_mask"] = mask[:, :end]
        found.append(call(tokens[:, 0 if kept is None else start : end], **options).logits)
    return torch.cat(found, 1)


@torch.no_grad()
def compare(tokens: Tensor, cache: str, hidden: slice | None, is_decoder: bool, compiled: bool) -> igpt.KernelReport:
    """Swapped against the model as it was, in float64."""
    model = make(is_decoder=is_decoder, n_layer=1 if compiled else 2)
    exact = copy.deepcopy(model).double()
    tokens = tokens[:, :12]
    steps = ((0, 11), STEPS[-1]) if compiled else STEPS
    wanted = logits(exact, exact.config, tokens, cache, hidden, steps).float()
    call = torch.compile(model, backend="eager", dynamic=False) if compiled else model
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        close(logits(call, model.config, tokens, cache, hidden, steps), wanted)
    return report


@pytest.mark.filterwarnings("ignore:attention runs as plain:RuntimeWarning")
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_masks_and_caches(tokens: Tensor, cache: str, is_decoder: bool) -> None:
    full = cache in ("none", "dynamic", "encoder and decoder")
    report = compare(tokens, cache, None, is_decoder, False)
    assert report.calls("attention") == (6 if full or not is_decoder else 0)
    assert sum(report.refused("attention").values()) == 6 - report.calls("attention")
    if full or is_decoder:  # transformers itself has no mask as long as a static cache otherwise
        for hidden in (slice(9, 12), slice(0, 3)):
            report = compare(tokens, cache, hidden, is_decoder, False)
            assert report.calls("attention") + sum(report.refused("attention").values()) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:attention runs as plain:RuntimeWarning")
@pytest.mark.parametrize(
    ("cache", "is_decoder"),
    [("none", True), ("dynamic", True), ("static", True)],
)
def test_masks_and_caches_in_compiled_models(tokens: Tensor, cache: str, is_decoder: bool) -> None:
    report = compare(tokens, cache, None, is_decoder, True)
    assert (report.compiled("attention") > 0) == (cache in ("none", "dynamic"))
    assert bool(report.refused("attention")) != (cache in ("none", "dynamic"))


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_call_that_raises_hides_no_padding(tokens: Tensor, fullgraph: bool) -> None:
    """A flag that the exception leaves behind would say for good that nothing is padded."""
    model = make(n_layer=1)

    class Failing(nn.Module):
        broken = True

        def forward(self, x: Tensor) -> Tensor:
            if not fullgraph:
                torch._dynamo.graph_break()
            if self.broken:
                raise RuntimeError("once")
            return x

    failing = model.transformer.h[0].mlp.dropout = Failing()
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with igpt.use_kernels(model, match_hf_scale=True):
        with pytest.raises(Exception, match=r"once|Observed exception"):
            compiled(tokens, use_cache=False)
        failing.broken = False
        with igpt.use_kernels(model, attention="off", norm="off", mlp="off"):
            wanted = result(model, tokens, attention_mask=mask)
        with pytest.warns(RuntimeWarning, match="padded"):
            close(compiled(tokens, attention_mask=mask, use_cache=False).logits, wanted)
        close(result(model, tokens, attention_mask=mask), wanted)


@pytest.mark.filterwarnings("ignore:attention runs as plain:RuntimeWarning")
def test_padded_and_whole_batches_in_threads(tokens: Tensor) -> None:
    """Each call knows for itself whether it is padded, of one model at once too."""
    model = make(is_decoder=True)
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    wanted = {None: result(model, tokens).detach(), "padded": result(model, tokens, attention_mask=mask).detach()}
    found: dict[Any, list[Tensor]] = {None: [], "padded": []}

    def run(kind: str | None) -> None:
        for _ in range(20):
            found[kind].append(result(model, tokens, attention_mask=None if kind is None else mask).detach())

    with igpt.use_kernels(model, match_hf_scale=True) as report:
        threads = [threading.Thread(target=run, args=(kind,)) for kind in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for kind, all_of in found.items():
        assert len(all_of) == 20
        for each in all_of:
            close(each, wanted[kind])
    assert report.calls("attention") == sum(report.refused("attention").values()) == 40


@pytest.mark.filterwarnings("ignore:attention runs as plain:RuntimeWarning")
def test_models_that_share_modules(tokens: Tensor) -> None:
    """What one model tells its attentions is not heard by another."""
    model = make(n_layer=1)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    wanted = result(model, tokens, attention_mask=mask)
    with igpt.use_kernels(model, match_hf_scale=True):
        result(model, tokens)
        close(result(other, tokens, attention_mask=mask), wanted)
        compiled = torch.compile(other, backend="eager", fullgraph=True)
        close(compiled(tokens, use_cache=False).logits, result(model, tokens))
        close(compiled(tokens, attention_mask=mask, use_cache=False).logits, wanted)


def test_a_mask_of_another_making_is_kept(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block or a function that makes masks in another way may hide more than padding."""
    from transformers.models.imagegpt import modeling_imagegpt as modeling

    class Near(modeling.ImageGPTBlock):
        def forward(
            self, hidden_states: Tensor, layer_past: Any = None, attention_mask: Any = None, *args: Any, **kw: Any
        ) -> Any:
            rows = torch.arange(hidden_states.shape[1])
            near = torch.where(rows[:, None] - rows < 4, 0.0, -1e9)[None, None]
            return super().forward(hidden_states, layer_past, near, *args, **kw)

    model = make(is_decoder=True)
    far = result(model, tokens)
    for block in model.transformer.h:
        block.__class__ = Near
    wanted = result(model, tokens)
    assert (wanted - far).abs().max() > 0.1
    with igpt.use_kernels(model, match_hf_scale=True) as report, pytest.warns(RuntimeWarning, match="padded"):
        close(result(model, tokens), wanted)
    assert "Near.forward may have a mask of its own" in str(report)
    with pytest.raises(igpt.errors.ConfigError, match="Near"):
        igpt.use_kernels(model, strict=True, loss="off", palette="off")
    for block in model.transformer.h:
        block.__class__ = modeling.ImageGPTBlock

    made = modeling.create_causal_mask
    monkeypatch.setattr(modeling, "create_causal_mask", lambda *args, **kw: made(*args, **kw).clamp(min=-1))
    wanted = result(model, tokens)
    with igpt.use_kernels(model, match_hf_scale=True) as report, pytest.warns(RuntimeWarning, match="padded"):
        close(result(model, tokens), wanted)
    assert "create_causal_mask has been patched" in str(report)


def test_a_strict_swap_raises_in_a_compiled_call(model: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    compiled = torch.compile(model, backend="eager")
    with igpt.use_kernels(model, strict=True, loss="off", palette="off"), pytest.raises(KernelRefused, match="padded"):
        compiled(tokens, attention_mask=mask, use_cache=False)
