"""`use_kernels`: what it switches, and that it always switches back."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import itertools
import pickle
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import igpt
from igpt.errors import ConfigError
from igpt.kernels import state
from igpt.model.config import ImageGPTConfig
from igpt.model.image_gpt import ImageGPT

CONFIG = ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=16, height=4, width=4)


@pytest.fixture
def model() -> ImageGPT:
    torch.manual_seed(0)
    model = ImageGPT(CONFIG)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(0))


def backend(model: ImageGPT, op: str = "attention") -> str | None:
    (module, *_) = (module for module in model.modules() if getattr(module, "kernel_op", None) == op)
    return state.settings_of(module)[op]


def test_default_is_plain(model: ImageGPT) -> None:
    assert backend(model) is None


def test_process_default_and_restore(model: ImageGPT, tokens: torch.Tensor) -> None:
    before = model(tokens).logits
    report = igpt.use_kernels()
    try:
        assert backend(model) == "auto"
        assert backend(ImageGPT(CONFIG)) == "auto"
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=0)
        assert report.calls("attention") >= 2
    finally:
        report.restore()
    report.restore()
    assert backend(model) is None
    assert torch.equal(model(tokens).logits, before)


def test_one_model_of_two(model: ImageGPT) -> None:
    other = copy.deepcopy(model)
    report = igpt.use_kernels(model, attention="reference")
    assert (backend(model), backend(other)) == ("reference", None)
    with igpt.use_kernels():
        assert (backend(model), backend(other)) == ("reference", "auto")
    report.restore()
    assert (backend(model), backend(other)) == (None, None)


def test_regions_nest_and_survive_exceptions(model: ImageGPT) -> None:
    with igpt.use_kernels(attention="torch"):
        inner = igpt.use_kernels(attention="reference")
        with pytest.raises(RuntimeError, match="inner"), inner:  # noqa: PT012 - what holds inside is half the test
            assert backend(model) == "reference"
            raise RuntimeError("inner")
        assert backend(model) == "torch"
        with igpt.use_kernels(model, attention="off"):
            assert backend(model) is None
        assert backend(model) == "torch"
    assert backend(model) is None


def test_a_region_is_entered_once(model: ImageGPT) -> None:
    report = igpt.use_kernels(model)
    with report, pytest.raises(ConfigError, match="entered already"):
        report.__enter__()
    with pytest.raises(ConfigError, match="has been restored"):
        report.__enter__()
    assert backend(model) is None


@pytest.mark.parametrize("whole_process", [True, False])
def test_a_region_is_seen_by_every_thread(model: ImageGPT, whole_process: bool) -> None:
    seen = []
    with igpt.use_kernels(None if whole_process else model):
        thread = threading.Thread(target=lambda: seen.append(backend(model)))
        thread.start()
        thread.join()
    assert (seen, backend(model)) == (["auto"], None)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole_process", [True, False])
def test_checkpointing_and_backward_on_another_thread(model: ImageGPT, whole_process: bool, reentrant: bool) -> None:
    """Autograd recomputes on its own thread; it must run the kernels that the forward ran."""
    block, x = model.blocks[0], torch.randn(2, 16, 32, requires_grad=True)
    wanted = torch.autograd.grad(block(x).square().sum(), x)
    with igpt.use_kernels(None if whole_process else model) as report:
        out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant).square().sum()
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: (out.backward(), found.append(x.grad)))  # type: ignore[func-returns-value, arg-type]
        thread.start()
        thread.join()
    assert report.calls("attention") == 2, "once forward, once to recompute"
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whole_process", [True, False])
@pytest.mark.parametrize("region", ["forward", "backward", "inner"])
def test_checkpointing_across_the_end_of_a_region(model: ImageGPT, whole_process: bool, region: str) -> None:
    block, x = model.blocks[0], torch.randn(2, 16, 32, requires_grad=True)
    wanted = torch.autograd.grad(block(x).square().sum(), x)
    target = None if whole_process else model

    def forward() -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).square().sum()  # type: ignore[no-any-return]

    if region == "forward":
        with igpt.use_kernels(target) as report:
            out = forward()
        with torch.no_grad():
            block(x)
        out.backward()
    elif region == "backward":
        out = forward()
        with igpt.use_kernels(target) as report:
            out.backward()
    else:
        with igpt.use_kernels(target, attention="reference"):
            with igpt.use_kernels(target) as report:
                out = forward()
            out.backward()
    assert report.calls("attention") == (0 if region == "backward" else 2)
    torch.testing.assert_close(x.grad, wanted[0], atol=1e-5, rtol=1e-4)
    assert backend(model) is None


@pytest.mark.parametrize("whole_process", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_regions_end_in_any_order(model: ImageGPT, order: tuple[int, ...], whole_process: bool) -> None:
    """As tasks of asyncio and generators that are closed late do: the newest that stands counts, and nothing stays on."""
    names = ("reference", "torch", "auto")
    regions = [igpt.use_kernels(None if whole_process else model, attention=name).__enter__() for name in names]
    standing = list(range(3))
    for one in order:
        regions[one].__exit__(None, None, None)
        standing.remove(one)
        assert backend(model) == (names[max(standing)] if standing else None)


def test_a_generator_that_is_closed_late(model: ImageGPT) -> None:
    def drawing() -> Iterator[str | None]:
        with igpt.use_kernels(model, attention="reference"):
            yield backend(model)

    late = drawing()
    assert next(late) == "reference"
    with igpt.use_kernels(model, attention="torch"):
        late.close()
        assert backend(model) == "torch"
    assert backend(model) is None


def test_state_dict_copies_and_wrappers_are_untouched(model: ImageGPT, tokens: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with igpt.use_kernels(model):
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        wrapped = torch.nn.DataParallel(model) if torch.cuda.is_available() else torch.nn.Sequential(model)
        inner = igpt.use_kernels(wrapped, attention="reference")
        assert backend(model) == "reference", "newer than the region"
        inner.restore()
        assert backend(model) == "auto"
        inner = igpt.use_kernels(wrapped, attention="reference")
        everywhere = igpt.use_kernels(attention="torch")
        assert backend(model) == "reference"
    assert backend(model) == "reference"
    everywhere.restore()
    inner.restore()
    assert backend(model) is None


def test_compiled_models_follow_a_swap(model: ImageGPT, tokens: torch.Tensor) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = model(tokens).logits
    assert torch.equal(compiled(tokens).logits, plain)
    with igpt.use_kernels(attention="torch"):
        swapped = model(tokens).logits
        assert torch.equal(compiled(tokens).logits, swapped)
    assert torch.equal(compiled(tokens).logits, plain)


@pytest.mark.parametrize("changes", [{}, {"objective": "bert"}, {"bias": True, "attention": ("local2d:1", "column")}], ids=str)
def test_training_curve_is_the_same(changes: dict[str, Any], tokens: torch.Tensor) -> None:
    curves = []
    for kernels in ("off", "auto"):
        torch.manual_seed(0)
        model = ImageGPT(dataclasses.replace(CONFIG, **changes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        with igpt.use_kernels(model, attention=kernels, norm=kernels, mlp=kernels, loss=kernels) as report:
            for _ in range(30):
                loss = model(tokens, tokens).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        for op, calls in {"attention": 2, "norm": 5, "mlp": 2, "loss": 1}.items():
            assert report.calls(op) == (30 * calls if kernels == "auto" else 0), op
        curves.append(curve)
    assert curves[0][-1] < (0.95 if changes.get("objective") else 0.7) * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_every_op_computes_the_same(model: ImageGPT, tokens: torch.Tensor) -> None:
    """Each alone, so that none hides another: loss, logits, gradients."""
    parameters = list(model.parameters())
    plain = model(tokens).logits
    slopes = torch.autograd.grad(model(tokens, tokens).loss, parameters)
    for op, name in itertools.product(("attention", "norm", "mlp", "loss"), ("torch", "reference")):
        others = {other: "off" for other in ("attention", "norm", "mlp", "loss") if other != op}
        with igpt.use_kernels(model, **{op: name}, **others) as report:  # type: ignore[arg-type]
            torch.testing.assert_close(model(tokens).logits, plain, atol=1e-5, rtol=0)
            for actual, expected in zip(torch.autograd.grad(model(tokens, tokens).loss, parameters), slopes, strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
            assert {other for other in state.OPS if report.calls(other)} == {op}


def test_swaps_are_restored_in_any_order(model: ImageGPT) -> None:
    for target in (None, model):
        first, second = (igpt.use_kernels(target, attention=name) for name in ("reference", "torch"))
        first.restore()
        assert backend(model) == "torch"
        second.restore()
        assert backend(model) is None


def test_a_model_of_its_own_setting_ignores_the_process(model: ImageGPT) -> None:
    with igpt.use_kernels(model, attention="torch"), igpt.use_kernels(attention="reference"):
        assert backend(model) == "torch"


def test_copies_and_pickles_carry_no_setting(model: ImageGPT) -> None:
    with igpt.use_kernels(model, attention="torch"):
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert backend(same) is None
            with igpt.use_kernels(same, attention="reference"):
                assert (backend(same), backend(model)) == ("reference", "torch")
            assert backend(same) is None
    assert backend(model) is None


@pytest.mark.parametrize("kind", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_a_model_compiled_in_place(model: ImageGPT, tokens: torch.Tensor, kind: Any) -> None:
    model.compile(backend="eager")
    with igpt.use_kernels(model):
        twin = kind(model)
        assert "_compiled_call_impl" not in vars(twin)
    twin.head = torch.nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert not twin(tokens).logits.any()
    assert model(tokens).logits.any()


def test_the_palette_is_looked_up_as_asked() -> None:
    palette = igpt.Palette.uniform(27)
    pixels = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    wanted = palette.encode(pixels)
    model = ImageGPT(dataclasses.replace(CONFIG, vocab_size=27))
    model.palette = palette
    for target in (None, model):
        for name in ("torch", "reference", "off", "auto"):
            with igpt.use_kernels(target, palette=name) as report:
                assert (palette.encode(pixels) == wanted).all()
                assert report.calls("palette") == (name != "off")
                assert palette._backend() == {"off": "torch"}.get(name, name)
    with pytest.raises(ConfigError, match="palette must be auto, off, ext, torch, reference; got 'fast'"):
        igpt.use_kernels(palette="fast")


def test_a_wrapped_output_layer_keeps_its_own(model: ImageGPT, tokens: torch.Tensor) -> None:
    """The kernel reads the matrix, not the layer: what an adapter or a hook adds to it would be lost."""

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    adapted = Adapted(32, 16, bias=False)
    adapted.load_state_dict(model.head.state_dict())
    hooked = copy.deepcopy(model)
    hooked.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    model.head = adapted
    for one in (model, hooked):
        before = one(tokens, tokens).loss
        with (
            igpt.use_kernels(one, attention="off", norm="off", mlp="off") as report,
            pytest.warns(RuntimeWarning, match="wrapped"),
        ):
            assert torch.equal(one(tokens, tokens).loss, before)
        assert list(report.refused("loss").values()) == [1]


def test_report_says_what_runs_and_why(model: ImageGPT, tokens: torch.Tensor) -> None:
    with igpt.use_kernels(model, norm="triton", mlp="off") as report:
        model(tokens, tokens)
        text = str(report)
        table = report.as_dict()
    assert [table[op]["active"] for op in state.OPS] == ["torch", "plain", "plain", "ext", "plain"]
    assert [table[op]["modules"] for op in state.OPS] == [2, 5, 2, 1, 0]
    assert [table[op]["calls"] for op in state.OPS] == [2, 0, 0, 1, 0]
    assert "triton cannot run: device cpu is not one of cuda" in str(table["norm"]["reason"])
    assert "switched off" in text
    print(report, file=io.StringIO())


def test_the_reason_is_what_speaks_against_the_faster_backends_alone(model: ImageGPT) -> None:
    with igpt.use_kernels(model, norm="reference") as report:
        reasons = {row.op: row.reason for row in report.rows}
    assert reasons["attention"] == reasons["mlp"] == "triton: device cpu is not one of cuda (NVIDIA or AMD GPUs)"
    assert reasons["norm"] == ""


def test_a_model_that_is_dropped_while_it_is_swapped_is_freed() -> None:
    model = ImageGPT(CONFIG)
    report = igpt.use_kernels(model)
    kept = weakref.ref(model.blocks[0].attn)
    del model, report
    gc.collect()
    assert kept() is None


def test_strict_raises_with_every_reason(model: ImageGPT) -> None:
    with pytest.raises(ConfigError, match=r"attention: triton cannot run: device cpu is not one of cuda.*norm: .*palette: "):
        igpt.use_kernels(model, attention="triton", norm="triton", palette="reference", strict=True)
    assert backend(model) is None


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", state.OPS)
def test_a_name_that_does_not_exist_is_an_error(model: ImageGPT, op: str, strict: bool) -> None:
    for target in (None, model):
        for name in ("cuda", "sdpa", "Auto", ""):
            with pytest.raises(ConfigError, match=f"{op} must be auto, off, .*; got '{name}'"):
                igpt.use_kernels(target, **{op: name}, strict=strict)  # type: ignore[arg-type]
    assert backend(model) is None


def test_bad_arguments_are_named(model: ImageGPT) -> None:
    with pytest.raises(TypeError, match="Linear"):
        igpt.use_kernels(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        igpt.use_kernels("sdpa")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention"):
        igpt.use_kernels(model, attention=3)  # type: ignore[arg-type]
