"""`use_kernels` on Hugging Face's ImageGPT: the same results, a reason for everything that stays plain, and no trace left."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
)

import igpt
from igpt.errors import ConfigError, KernelRefused
from igpt.kernels import huggingface

BLOCK = ImageGPTModel  # what a model of theirs is made of
TRUNCATED = huggingface.truncates_scale(96)  # fixed after transformers 5.17
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make(kind: Any = ImageGPTForCausalImageModeling, **changes: Any) -> Any:
    """A small model with gains and biases that are not those of a fresh one, in evaluation mode."""
    settings: dict[str, Any] = {"vocab_size": 17, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3} | QUIET | changes
    torch.manual_seed(0)
    model = kind(ImageGPTConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("ln_" in name))
            else:
                parameter.mul_(4)  # so that attention is far from uniform
    return model.eval()


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 16, (2, 20), generator=torch.Generator().manual_seed(0))


def result(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    output = model(input_ids=tokens, **options)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result(model, tokens).square().sum(), list(model.parameters()), allow_unused=True))


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    """Within float32 rounding of sums as large as the largest value."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, atol=3e-6 * max(1.0, float(expected.detach().abs().max())), rtol=1e-5)


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


def test_restoring_leaves_no_trace(model: Any, tokens: Tensor) -> None:
    def everything() -> dict[str, dict[str, object]]:
        return {name: dict(vars(module), kernels_kept=None) for name, module in model.named_modules()}

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    before, masks, logits = everything(), buffers(), result(model, tokens)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = igpt.use_kernels(model)
    assert report.freed_bytes == 2 * 32 * 32
    assert sum(buffer.numel() for buffer in model.buffers()) == 0
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    result(model, tokens)
    report.restore()
    report.restore()
    after = everything()
    assert {name: list(values) for name, values in after.items()} == {name: list(values) for name, values in before.items()}
    assert all(torch.equal(buffer, masks[name]) for name, buffer in model.named_buffers())
    assert torch.equal(result(model, tokens), logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_swaps_are_restored_in_any_order(model: Any, tokens: Tensor) -> None:
    before = result(model, tokens)
    first, second = igpt.use_kernels(model, attention="reference"), igpt.use_kernels(model, attention="torch")
    first.restore()
    result(model, tokens)
    assert (first.calls("attention"), second.calls("attention")) == (0, 2)
    second.restore()
    assert torch.equal(result(model, tokens), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_regions_nest_and_survive_exceptions(model: Any, tokens: Tensor) -> None:
    before = result(model, tokens)
    with igpt.use_kernels(model) as outer:
        with pytest.raises(RuntimeError, match="inner"), igpt.use_kernels(model, attention="off", norm="off", mlp="off"):  # noqa: PT012
            assert torch.equal(result(model, tokens), before)
            raise RuntimeError("inner")
        result(model, tokens)
        assert outer.calls("attention") == 2
    assert torch.equal(result(model, tokens), before)
    with pytest.raises(ConfigError, match="restored"), outer:
        pass


def test_only_the_model_named_is_swapped(model: Any, tokens: Tensor) -> None:
    other, ours = copy.deepcopy(model), igpt.ImageGPT(igpt.preset("tiny", height=4, width=4, vocab_size=16))
    before = result(other, tokens)
    with igpt.use_kernels(model) as report, igpt.use_kernels() as everywhere:
        assert torch.equal(result(other, tokens), before)
        assert report.calls("attention") == 0
        ours(tokens[:, :16])
        assert report.calls("attention") == 0
        assert everywhere.calls("attention") > 0
        calls = everywhere.calls("attention")
        result(model, tokens)
        assert everywhere.calls("attention") == calls, "the process default is for igpt models"


def test_a_swap_is_seen_by_every_thread(model: Any, tokens: Tensor) -> None:
    before, seen = result(model, tokens), []
    thread = threading.Thread(target=lambda: seen.append(result(model, tokens)))
    with igpt.use_kernels(model, attention="reference") as report:
        thread.start()
        thread.join()
        assert report.calls("attention") == 2
    close(seen[0], before)
    assert torch.equal(result(model, tokens), before)


@pytest.mark.parametrize("first", [0, 1])
def test_swaps_end_in_any_order(model: Any, tokens: Tensor, first: int) -> None:
    before = result(model, tokens)
    reports = [igpt.use_kernels(model, attention=backend).__enter__() for backend in ("torch", "reference")]
    reports[first].__exit__(None, None, None)
    close(result(model, tokens), before)
    assert [report.calls("attention") for report in reports] == ([0, 2] if first == 0 else [2, 0])
    reports[1 - first].__exit__(None, None, None)
    assert torch.equal(result(model, tokens), before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_a_swap(model: Any, tokens: Tensor, reentrant: bool) -> None:
    """Autograd recomputes on threads of its own; they must run what the forward ran."""
    transformer = getattr(model, "transformer", model)

    def gradients() -> list[Tensor]:
        out = model(tokens, use_cache=False)
        hidden = out.logits if hasattr(out, "logits") else out.last_hidden_state
        wanted = list(transformer.h.parameters())
        return list(torch.autograd.grad(hidden.square().mean(), wanted, allow_unused=True, materialize_grads=True))

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with igpt.use_kernels(model) as report:
            inside: list[list[Tensor]] = []
            out = model(tokens, use_cache=False)
            hidden = out.logits if hasattr(out, "logits") else out.last_hidden_state
            thread = threading.Thread(target=hidden.square().mean().backward)
            thread.start()
            thread.join()
            inside.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in transformer.h.parameters()])
            assert report.calls("attention") == 4, "two layers, forward and again in backward"
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    for mine, true in zip(inside[0], plain, strict=True):
        close(mine, true)


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


def test_copies_and_pickles_are_swapped_models_of_their_own(model: Any, tokens: Tensor) -> None:
    plain = result(model, tokens)
    report = igpt.use_kernels(model)
    swapped = result(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls = report.calls("attention")
        assert torch.equal(result(twin, tokens), swapped)
        assert report.calls("attention") == calls + 2, "a copy counts as the model it was made from"
        attention = twin.get_submodule("transformer.h.0.attn")
        assert attention.forward.args[0] is attention
        with igpt.use_kernels(twin, attention="off", norm="off", mlp="off"):
            close(result(twin, tokens), plain)
    with igpt.use_kernels(model):
        region = copy.deepcopy(model)
    report.restore()
    assert b"igpt" not in pickle.dumps(model).replace(b"imagegpt", b""), "whoever loads it need not have this project"
    assert torch.equal(result(model, tokens), plain)
    assert torch.equal(result(region, tokens), swapped), "a copy made in a region keeps the model's own setting"
    fresh = make()
    with igpt.use_kernels(fresh):
        fresh.load_state_dict(model.state_dict())
        state = fresh.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_saving_while_swapped(model: Any, tokens: Tensor, tmp_path: Any) -> None:
    with igpt.use_kernels(model):
        model.save_pretrained(tmp_path)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    assert torch.equal(result(again, tokens), result(model, tokens))


@pytest.mark.slow
def test_compiled_models_follow_swaps(tokens: Tensor) -> None:
    """No stale graph, and none made twice; more swaps than torch keeps graphs (8), which with fullgraph would be an error."""
    model = make(n_embd=96, n_head=1)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run() -> Tensor:
        return compiled(tokens, use_cache=False).logits

    plain = run()  # a traced sqrt is not truncated: what is traced differs from what is eager on transformers 5.17
    for cycle in range(12):
        with igpt.use_kernels(model, attention="torch" if cycle % 2 else "reference") as report:
            swapped = result(model, tokens)
            assert report.calls("attention") == 2
            assert torch.equal(run(), swapped), "the compiled model runs what the eager one runs"
            assert report.compiled("attention") == (2 if cycle < 2 else 0)
            with igpt.use_kernels(model, attention="off", norm="off", mlp="off"):
                assert torch.equal(run(), plain)
            assert torch.equal(run(), swapped)
            assert not report.refused("attention")
        assert torch.equal(run(), plain)
    assert len(graphs) == 4, "plain, plain inside of a swap, and two backends"
    torch.compiler.reset()


def test_places_in_compiled_graphs_are_counted(model: Any, tokens: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with igpt.use_kernels(model) as report:
        compiled(tokens, use_cache=False)
        assert [report.compiled(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
        assert "0 +2 compiled" in str(report)
    torch.compiler.reset()


@pytest.mark.slow
def test_a_padded_batch_in_a_compiled_model(model: Any, tokens: Tensor) -> None:
    """While tracing, transformers makes a mask even where nothing is padded; a padded one must still be obeyed."""
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    padded = result(model, tokens, attention_mask=mask)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with igpt.use_kernels(model, match_hf_scale=True):
        close(compiled(tokens, attention_mask=mask, use_cache=False).logits, padded)
        close(compiled(tokens, use_cache=False).logits, result(model, tokens))
        close(compiled(tokens, attention_mask=mask, use_cache=False).logits, padded)
    torch.compiler.reset()


def test_an_attention_swapped_alone_learns_nothing_from_its_model(model: Any) -> None:
    """Its model, swapped no longer, would not tell it that a later call is padded."""
    attention = model.transformer.h[0].attn
    with igpt.use_kernels(model):
        shared = attention.kernels_call
        assert shared is model.transformer.kernels_call
    with igpt.use_kernels(attention):
        assert attention.kernels_call is not shared
    with igpt.use_kernels(model):
        assert attention.kernels_call is shared


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_distributed_wrappers(process_group: None, tokens: Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(model: Any) -> Any:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for wrap in (nn.parallel.DistributedDataParallel, sharded):
        wanted, model = make(), wrap(make())
        close(result(model, tokens).detach(), result(wanted, tokens))
        with igpt.use_kernels(model, match_hf_scale=True) as report:
            assert report.as_dict()["attention"]["modules"] == 2
            result(model, tokens).square().sum().backward()
            assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
        result(wanted, tokens).square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        for actual, parameter in zip(gradients, wanted.parameters(), strict=True):
            close(actual.full_tensor() if hasattr(actual, "full_tensor") else actual, parameter.grad)  # type: ignore[union-attr]


@pytest.mark.slow
def test_adapters_of_peft(model: Any, tokens: Tensor) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, settings).eval()
    before = result(adapted, tokens)
    with igpt.use_kernels(adapted, match_hf_scale=True) as report:
        close(result(adapted, tokens), before)
        assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
    assert torch.equal(result(adapted, tokens), before)


def test_gradient_checkpointing(tokens: Tensor) -> None:
    model = make().train()
    wanted = gradients(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        for actual, expected in zip(gradients(model, tokens), wanted, strict=True):
            close(actual, expected)
        assert report.calls("attention") == 4, "each layer once more for the backward pass"


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
    assert not any("forward" in vars(module) for module in model.modules())
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
