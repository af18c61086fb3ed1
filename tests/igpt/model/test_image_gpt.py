"""The model against transformers' ImageGPT, its parameter counts, its cache, its objectives."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import igpt
from igpt.errors import ConfigError
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT
from tests.models import random_model


def small(head_dim: int = 16, **changes: object) -> ImageGPT:
    """A model whose every weight is random, the output matrix and the gains too."""
    values: dict[str, object] = {"n_layer": 3, "n_head": 2, "n_embd": 2 * head_dim, "vocab_size": 64, "height": 6, "width": 8}
    return random_model(0.1, **{**values, **changes})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("igpt-s", 76_571_648), ("igpt-m", 455_157_760), ("igpt-l", 1_362_250_752), ("igpt-xl", 6_801_438_720)],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = ImageGPT(igpt.preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_equals_transformers(head_dim: int, tokens: torch.Tensor) -> None:
    from igpt.model.huggingface import _hf_config, _to_hf

    model = small(head_dim)
    config = transformers.ImageGPTConfig(**{**_hf_config(model), "reorder_and_upcast_attn": True})
    theirs = transformers.ImageGPTForCausalImageModeling(config).eval()
    missing, unexpected = theirs.load_state_dict(_to_hf(model), strict=False)
    assert not missing
    assert not unexpected
    start = torch.full((2, 1), 64)
    with torch.no_grad():
        ours = model(tokens).logits
        expected = theirs(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        greedy = theirs.generate(start, max_length=48, do_sample=False)
        drawn = tokens[:, :0]
        for _ in range(47):
            padded = torch.cat([drawn, torch.zeros(2, 1, dtype=torch.int64)], 1)
            drawn = torch.cat([drawn, model(padded).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(drawn, greedy[:, 1:])


def test_untrained_loss_is_uniform(tokens: torch.Tensor) -> None:
    model = ImageGPT(ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, height=6, width=8))
    assert model(tokens, tokens).loss.item() == pytest.approx(math.log(64), abs=1e-6)


def test_loss_counts_every_pixel_once(tokens: torch.Tensor) -> None:
    model = small()
    logits = model(tokens).logits.double()
    expected = -logits.log_softmax(-1).gather(2, tokens[..., None]).mean()
    assert model(tokens, tokens).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ignored = tokens.clone()
    ignored[:, 10:] = -100
    expected = -logits.log_softmax(-1).gather(2, tokens[..., None])[:, :10].mean()
    assert model(tokens, ignored).loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_pixel_sees_itself_or_the_future(tokens: torch.Tensor) -> None:
    model = small()
    base = model(tokens).logits
    for at in (0, 7, 23, 47):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 64
        moved = (model(changed).logits != base).any(-1).any(0)
        assert not moved[: at + 1].any()
        assert at == 47 or moved[at + 1 :].all()


def test_bert_sees_everything_but_the_hidden(tokens: torch.Tensor) -> None:
    model = small(objective="bert")
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[:, 20] = True
    base = model(tokens, mask=mask).logits
    hidden, seen = tokens.clone(), tokens.clone()
    hidden[:, 20] = (hidden[:, 20] + 1) % 64
    seen[:, 40] = (seen[:, 40] + 1) % 64
    assert torch.equal(model(hidden, mask=mask).logits, base)
    assert (model(seen, mask=mask).logits != base).any(-1).all()


def test_bert_loss_is_a_mean_of_means(tokens: torch.Tensor) -> None:
    model = small(objective="bert")
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[0, :3] = True
    mask[1, 5:40] = True
    nats = -model(tokens, mask=mask).logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    expected = (nats[0][mask[0]].mean() + nats[1][mask[1]].mean()) / 2
    assert model(tokens, tokens, mask=mask).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    mask[0] = False
    assert model(tokens, tokens, mask=mask).loss.item() == pytest.approx(nats[1][mask[1]].mean().item(), abs=1e-5)


def test_bert_masks_follow_their_generator(tokens: torch.Tensor) -> None:
    model = small(objective="bert")
    first = model.draw_mask(4000, torch.Generator().manual_seed(3))
    assert torch.equal(first, model.draw_mask(4000, torch.Generator().manual_seed(3)))
    assert first.float().mean().item() == pytest.approx(0.15, abs=0.005)


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_cached_logits_equal_full_ones(kernels: str, tokens: torch.Tensor) -> None:
    model = small()
    with torch.no_grad(), igpt.use_kernels(model, attention=kernels):
        full = model(tokens).logits
        cache = model.new_cache(2)
        steps = [model.decode(tokens[:, :0], cache)] + [model.decode(tokens[:, i : i + 1], cache) for i in range(47)]
        torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=0)
        cache = model.new_cache(2)
        for start, end in ((0, 20), (20, 33), (33, 34), (34, 47)):
            torch.testing.assert_close(model.decode(tokens[:, start:end], cache), full[:, end], atol=1e-5, rtol=0)
    assert cache.length == 48


def test_cache_refuses_too_much_and_nothing(tokens: torch.Tensor) -> None:
    model = small()
    cache = model.new_cache(2)
    model.decode(tokens[:, :47], cache)
    with pytest.raises(ValueError, match="48 positions"):
        model.decode(tokens[:, 47:], cache)
    with pytest.raises(ValueError, match="at least one pixel"):
        model.decode(tokens[:, :0], cache)
    with pytest.raises(ValueError, match="B = 2"):
        model.decode(tokens[:1], cache)
    with pytest.raises(ConfigError, match="bert"):
        small(objective="bert").decode(tokens, cache)


def test_features_are_means_of_normed_inputs(tokens: torch.Tensor) -> None:
    model = small()
    seen: list[torch.Tensor] = []
    hooks = [block.ln_1.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.blocks]
    hooks.append(model.ln_f.register_forward_hook(lambda _, __, out: seen.append(out)))
    model(tokens)
    for hook in hooks:
        hook.remove()
    stacked = model.features(tokens)
    assert stacked.shape == (4, 2, 32)
    for layer in range(4):
        torch.testing.assert_close(stacked[layer], seen[layer].mean(1))
        torch.testing.assert_close(model.features(tokens, layer), stacked[layer])
    raw = model.features(tokens, 0, normed=False)
    torch.testing.assert_close(raw, model._embed(tokens, None).mean(1))
    with pytest.raises(ValueError, match="layer"):
        model.features(tokens, 4)
    with pytest.raises(ConfigError, match="layer must be an integer from 0 to 3, got '1'"):
        model.features(tokens, "1")  # type: ignore[arg-type]


def test_bad_tokens_are_named(tokens: torch.Tensor) -> None:
    model = small()
    with pytest.raises(TypeError, match=r"tokens.*float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"tokens.*0 to 63.*64"):
        model(tokens + 64 - tokens.max() if tokens.max() < 64 else tokens)
    with pytest.raises(ValueError, match=r"tokens.*6 x 8"):
        model(torch.cat([tokens, tokens], 1))
    with pytest.raises(ValueError, match="targets"):
        model(tokens, tokens[:1])
    with pytest.raises(ValueError, match="targets must be from 0 to 63 or -100, got 64"):
        model(tokens, torch.full_like(tokens, 64))
    with pytest.raises(ValueError, match="targets must be from 0 to 63 or -100, got -1"):
        model(tokens, torch.full_like(tokens, -1))
    with pytest.raises(TypeError, match=r"targets must be a tensor of integers \[B,T\], got .*torch.float32"):
        model(tokens, tokens.float())
    with pytest.raises(TypeError, match=r"targets must be a tensor of integers .*, got \[\["):
        model(tokens, tokens.tolist())
    with pytest.raises(ValueError, match="mask"):
        model(tokens, mask=tokens > 3)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .*, got \[True\]"):
        small(objective="bert")(tokens, mask=[True])


def test_a_model_needs_a_config() -> None:
    with pytest.raises(TypeError, match=r"config must be an ImageGPTConfig, such as igpt\.preset gives, got dict"):
        ImageGPT({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer.*0"),
        ({"n_head": 3}, "multiple"),
        ({"vocab_size": 1}, "vocab_size.*1"),
        ({"vocab_size": 65537}, "65537"),
        ({"attention": "sparkle"}, "sparkle"),
        ({"attention": ()}, "attention"),
        ({"objective": "gan"}, "gan"),
        ({"mask_rate": 1.0}, "mask_rate"),
        ({"height": True}, "height"),
        ({"bias": 1}, "bias"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageGPTConfig.from_dict({"n_layer": 2, "n_head": 2, "n_embd": 32, **changes})


def test_config_needs_its_sizes() -> None:
    with pytest.raises(ConfigError, match="n_embd"):
        ImageGPTConfig.from_dict({"n_layer": 2, "n_head": 2})
    with pytest.raises(ConfigError, match="igpt-xxl"):
        igpt.preset("igpt-xxl")


def test_gradients_reach_every_parameter(tokens: torch.Tensor) -> None:
    for objective in ("ar", "bert"):
        model = small(objective=objective, bias=True)
        model(tokens, tokens, generator=torch.Generator().manual_seed(0)).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # The bias of the keys shifts every score of a query alike, which softmax ignores.
            assert name.endswith("qkv.bias") or parameter.grad.abs().max() > 0, name


def test_bf16_autocast_stays_near_fp32(tokens: torch.Tensor) -> None:
    model = small(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, tokens).loss
        cache = model.new_cache(2)
        assert cache.keys[0].dtype == torch.bfloat16
        model.decode(tokens[:, :5], cache)
    assert rough.item() == pytest.approx(model(tokens, tokens).loss.item(), rel=0.02)


def test_initial_weights_follow_the_paper() -> None:
    torch.manual_seed(0)
    model = ImageGPT(ImageGPTConfig(n_layer=8, n_head=2, n_embd=256, height=16, width=16))
    block = model.blocks[3]
    # 0.125 / sqrt(fan_in), and what writes into the residual stream divided by sqrt(2 L) = 4.
    expected = {"attn.qkv": 0.125 / 16, "attn.proj": 0.125 / 16 / 4, "fc": 0.125 / 16, "proj": 0.125 / 32 / 4}
    for name, std in expected.items():
        assert block.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.02), name
    tables = {"wte": (model.wte.weight, 0.02), "wpe": (model.wpe.weight, 0.01)}
    for name, (table, std) in tables.items():
        assert table.std().item() == pytest.approx(std, rel=0.02), name
    assert model.head.weight.abs().max() == 0
    assert all((block.ln_1.weight == 1).all() for block in model.blocks)
