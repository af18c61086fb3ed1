"""Hugging Face's ImageGPT with kernels: the same results, and a reason for everything that stays plain."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
)

import igpt
from igpt.errors import ConfigError, KernelRefused
from igpt.kernels import classes, huggingface
from tests.huggingface import close, gradients, make, result

BLOCK = ImageGPTModel  # what a model of theirs is made of


TRUNCATED = huggingface.truncates_scale(96)  # fixed after transformers 5.17


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_embd": 96, "n_head": 1},
        {"n_embd": 128, "n_head": 1},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "n_embd": 96, "n_head": 1},
        {"layer_norm_epsilon": 0.1},
        {"n_inner": 40},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_results_and_gradients_are_the_same(changes: dict[str, Any], tokens: Tensor) -> None:
    for kind in (ImageGPTModel, ImageGPTForCausalImageModeling, ImageGPTForImageClassification):
        model = make(kind, **changes)
        before, slopes = result(model, tokens), gradients(model, tokens)
        with igpt.use_kernels(model, match_hf_scale=True) as report:
            close(result(model, tokens), before)
            for actual, expected in zip(gradients(model, tokens), slopes, strict=True):
                close(actual, expected)
        assert report.calls("attention") == 4
        assert report.calls("norm") == 10
        assert report.calls("mlp") == (0 if changes.get("activation_function") else 4)
        assert torch.equal(result(model, tokens), before)


@pytest.mark.parametrize(("head_dim", "divisor"), [(96, 9), (128, 11), (16, 4)])
def test_scale_is_corrected_unless_asked_for(head_dim: int, divisor: int, tokens: Tensor) -> None:
    ported = make(n_embd=head_dim, n_head=1)
    true = make(n_embd=head_dim, n_head=1, reorder_and_upcast_attn=True)  # the port's own path with a true square root
    wanted, before = result(true, tokens), result(ported, tokens)
    with igpt.use_kernels(ported) as report:
        close(result(ported, tokens), wanted)
    with igpt.use_kernels(ported, match_hf_scale=True) as matched:
        close(result(ported, tokens), before)
    truncated = TRUNCATED and head_dim != 16
    assert truncated == ((wanted - before).abs().max() > 1e-3)
    assert truncated == (f"divides by {divisor}" in str(report))
    assert truncated == (f"divided by {divisor}, as transformers {transformers.__version__} does" in str(matched))


def refused(model: Any, call: Callable[[], Any], same: Callable[[Any, Any], None], words: str) -> None:
    """A call that goes the original way: equal result, one warning, counted with its reason, an error when strict."""
    before = call()
    with igpt.use_kernels(model, norm="off", mlp="off") as report:
        with pytest.warns(RuntimeWarning, match=words):
            same(call(), before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same(call(), before)
    ((reason, number),) = report.refused("attention").items()
    assert words in reason
    assert number in (4, 2 * 2 * 3)  # two layers, two calls (of three steps each)
    assert f"{number} calls plain: {reason}" in str(report)
    with igpt.use_kernels(model, strict=True, norm="off", mlp="off"), pytest.raises(KernelRefused, match=words):
        call()
    same(call(), before)


def test_attention_weights_are_given_when_asked_for(model: Any, tokens: Tensor) -> None:
    def same(actual: Any, expected: Any) -> None:
        assert torch.equal(actual.logits, expected.logits)
        assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected.attentions, strict=True))
        assert len(actual.attentions) == 2

    refused(model, lambda: model(tokens, output_attentions=True), same, "output_attentions=True")


def test_padded_batches_go_the_original_way(model: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    refused(model, lambda: result(model, tokens, attention_mask=mask), equal, "padded")
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        close(result(model, tokens, attention_mask=torch.ones_like(tokens)), result(model, tokens))
        assert not report.refused("attention")


def equal(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual, expected)


def test_dropout_on_the_weights_goes_the_original_way(tokens: Tensor) -> None:
    model = make(attn_pdrop=0.5).train()

    def call() -> Tensor:
        torch.manual_seed(1)
        return result(model, tokens)

    refused(model, call, equal, "set attn_pdrop=0")
    model.eval()
    with igpt.use_kernels(model) as report:
        call()
        assert report.calls("attention") == 2


def test_other_dropout_stays(tokens: Tensor) -> None:
    model = make(resid_pdrop=0.5, embd_pdrop=0.5).train()
    torch.manual_seed(1)
    before = result(model, tokens)
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        torch.manual_seed(1)
        close(result(model, tokens), before)
        assert report.calls("attention") == 2


def test_cross_attention_keeps_its_own(tokens: Tensor) -> None:
    model = make(BLOCK, add_cross_attention=True)
    states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    # Without a cache, with which transformers 5.17 cannot do it itself.
    before = result(model, tokens, encoder_hidden_states=states, use_cache=False)
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        close(result(model, tokens, encoder_hidden_states=states, use_cache=False), before)
        assert report.as_dict()["attention"]["modules"] == 2
        assert report.calls("attention") == 2
        assert "cross attention keeps its own" in str(report)
        assert not report.refused("attention")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_greedy_generation_is_the_same(options: dict[str, Any], tokens: Tensor) -> None:
    for head_dim in (16, 96):
        model = make(n_embd=3 * head_dim)

        def generate(start: Tensor, model: Any = model) -> Tensor:
            return model.generate(start, max_length=32, do_sample=False, **options)

        for start in (torch.full((2, 1), 16), tokens[:, :7]):
            before = generate(start)
            with igpt.use_kernels(model, match_hf_scale=True) as report:
                assert torch.equal(generate(start), before)
                assert report.calls("attention") > 40
                assert not report.refused("attention")
            assert torch.equal(generate(start), before)


def test_a_chunk_of_queries_at_the_end_of_a_cache(model: Any, tokens: Tensor) -> None:
    """Their mask counts from the lower right corner; a kernel that counts from the upper left sees too little."""
    whole = result(model, tokens)
    for swapped in (False, True):
        report = igpt.use_kernels(model) if swapped else None
        first = model(tokens[:, :11], use_cache=True)
        values = vars(first)
        cache = {name: values[name] for name in ("past_key_values", "cache") if values.get(name) is not None}
        rest = model(tokens[:, 11:], use_cache=True, **cache)
        close(torch.cat([first.logits, rest.logits], 1), whole)
        if report is not None:
            report.restore()


def test_training_curve_is_the_same(tokens: Tensor) -> None:
    curves = []
    for kernels in ("off", "auto"):
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        report = igpt.use_kernels(model, attention=kernels, norm=kernels, mlp=kernels)
        curve = []
        for _ in range(30):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        report.restore()
        curves.append(curve)
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_half_precision_models_and_autocast(tokens: Tensor) -> None:
    """Within twice the error that the port itself makes at that dtype."""
    exact = result(make().double(), tokens)
    for dtype in (torch.bfloat16, torch.float16):
        model = make().to(dtype)
        plain = result(model, tokens)
        with igpt.use_kernels(model, match_hf_scale=True) as report:
            swapped = result(model, tokens)
            assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
        assert swapped.dtype == plain.dtype
        assert (swapped - exact).abs().max() <= 2 * (plain - exact).abs().max()
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = result(model, tokens)
        with igpt.use_kernels(model, match_hf_scale=True):
            swapped = result(model, tokens)
    assert swapped.dtype == plain.dtype
    assert (swapped - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_the_report_names_what_stays_plain(tokens: Tensor) -> None:
    model = make(activation_function="gelu")
    report = igpt.use_kernels(model)
    table = report.as_dict()
    assert table["mlp"]["modules"] == 0
    assert table["mlp"]["active"] == "plain"
    assert "not quick_gelu" in str(table["mlp"]["reason"])
    assert "logits are part of the port's output" in str(table["loss"]["reason"])
    report.restore()
    model.transformer.ln_f.forward = functools.partial(type(model.transformer.ln_f).forward, model.transformer.ln_f)
    with igpt.use_kernels(model) as report:
        assert report.as_dict()["norm"]["modules"] == 4
        assert "something else has replaced its forward" in str(report)
    assert "forward" in vars(model.transformer.ln_f)


def test_strict_names_what_cannot_be_met(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"attention: triton cannot run: device cpu.*loss: logits are part"):
        igpt.use_kernels(model, attention="triton", loss="torch", strict=True)
    assert not any(classes.installed(module) for module in model.modules())
    igpt.use_kernels(model, strict=True).restore()


def test_a_release_with_other_attentions_is_named(model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(huggingface._READ, "attention", ("c_attn", "c_new"))
    before = result(model, tokens)
    with igpt.use_kernels(model, norm="off", mlp="off") as report:
        assert torch.equal(result(model, tokens), before)
    assert f"transformers {transformers.__version__} has another ImageGPTAttention (no c_new)" in str(report)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="Linear"):
        igpt.use_kernels(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="match_hf_scale"):
        igpt.use_kernels(match_hf_scale=True)
    ours = igpt.ImageGPT(igpt.preset("tiny", height=4, width=4, vocab_size=16))
    with pytest.raises(ConfigError, match="match_hf_scale"):
        igpt.use_kernels(ours, match_hf_scale=True)
