"""A swap of Hugging Face's ImageGPT from its start to its end: order, threads, copies, torch.compile, FSDP, PEFT."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import ImageGPTForCausalImageModeling

import igpt
from igpt.errors import ConfigError
from igpt.kernels import classes
from tests.huggingface import close, gradients, make, result


def test_restoring_leaves_no_trace(model: Any, tokens: Tensor) -> None:
    def everything() -> dict[str, dict[str, object]]:
        return {name: {**vars(module), "class": type(module)} for name, module in model.named_modules()}

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    before, masks, logits = everything(), buffers(), result(model, tokens)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = igpt.use_kernels(model)
    assert report.freed_bytes == 32 * 32, "two layers share a mask"
    assert len({block.attn.bias.data_ptr() for block in model.transformer.h}) == 1
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    result(model, tokens)
    report.restore()
    report.restore()
    after = everything()
    for name, values in before.items():
        assert list(after[name]) == list(values)
        assert after[name]["class"] is values["class"]
    assert all(torch.equal(buffer, masks[name]) for name, buffer in model.named_buffers())
    assert len({block.attn.bias.data_ptr() for block in model.transformer.h}) == 2
    assert torch.equal(result(model, tokens), logits)
    assert not any(classes.installed(module) for module in model.modules())


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
    reports[1 - first].restore()
    assert torch.equal(result(model, tokens), before)
    assert not any(classes.installed(module) for module in model.modules())


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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("region", ["whole", "forward", "backward", "inner", "inner off"])
def test_gradient_checkpointing(tokens: Tensor, region: str, reentrant: bool) -> None:
    """Backward, on another thread, computes each layer again: it must run what the forward pass ran."""
    model = make().train()
    wanted = gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def backward(loss: Tensor) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not errors

    def forward() -> Tensor:
        return result(model, tokens).square().sum()

    def swap(**kernels: str) -> igpt.KernelReport:
        return igpt.use_kernels(model, match_hf_scale=True, **kernels)  # type: ignore[arg-type]

    if region == "whole":
        with swap() as report:
            backward(forward())
    elif region == "forward":
        with swap() as report:
            loss = forward()
        with torch.no_grad():
            result(model.eval(), tokens)
        backward(loss)
        model.train()
    elif region == "backward":
        loss = forward()
        with swap() as report:
            backward(loss)
    else:
        with swap() as outer:
            off = "off" if region == "inner off" else "reference"
            with swap(attention=off, norm=off, mlp=off) as report:
                loss = forward()
            backward(loss)
        assert outer.calls("attention") == 0
    assert report.calls("attention") == {"backward": 0, "inner off": 0}.get(region, 4), "each layer once more for backward"
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        close(parameter.grad, expected)
    result(model, tokens)
    assert not any(classes.installed(module) for module in model.modules())


def test_regions_of_tasks_and_generators(model: Any, tokens: Tensor) -> None:
    """They end in another order than they began, or late, and nothing stays on."""
    before = result(model, tokens)
    order: list[str] = []

    async def task(name: str, backend: str, waits: asyncio.Event, sets: asyncio.Event) -> None:
        with igpt.use_kernels(model, attention=backend) as report:
            sets.set()
            await waits.wait()
            close(result(model, tokens), before)
            order.append(name)
            assert report.calls("attention") == (4 if name == "late" else 0), "the newest that stands runs"
        if name == "late":
            raise RuntimeError("late")

    async def both() -> None:
        first, second, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        early = asyncio.create_task(task("early", "reference", second, first))
        await first.wait()
        late = asyncio.create_task(task("late", "torch", go, second))
        await early
        go.set()
        with pytest.raises(RuntimeError, match="late"):
            await late

    asyncio.run(both())
    assert order == ["early", "late"]
    assert not any(classes.installed(module) for module in model.modules())

    def drawing() -> Iterator[Tensor]:
        with igpt.use_kernels(model, attention="reference"):
            while True:
                yield result(model, tokens)

    late, dropped = drawing(), drawing()
    next(late)
    next(dropped)
    with igpt.use_kernels(model):
        late.close()
        close(result(model, tokens), before)
    assert any(classes.installed(module) for module in model.modules())
    del dropped
    gc.collect()
    assert not any(classes.installed(module) for module in model.modules())
    assert torch.equal(result(model, tokens), before)


def test_a_report_restores_once(model: Any, tokens: Tensor) -> None:
    """From many threads, and by a copy of it too."""
    before = result(model, tokens)
    outer = igpt.use_kernels(model, attention="reference")
    for _ in range(20):
        report = igpt.use_kernels(model)
        threads = [threading.Thread(target=report.restore) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report.restore()
        copy.copy(report).restore()
    result(model, tokens)
    assert outer.calls("attention") == 2
    twin = copy.copy(outer)
    twin.restore()
    outer.restore()
    assert torch.equal(result(model, tokens), before)
    assert not any(classes.installed(module) for module in model.modules())
