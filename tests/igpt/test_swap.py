"""`use_kernels`: what it switches, and that it always switches back."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch

import igpt
from igpt import swap
from igpt.config import ImageGPTConfig
from igpt.errors import ConfigError
from igpt.model import ImageGPT

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


def backend(model: ImageGPT) -> str | None:
    return swap.active(model.blocks[0].attn, "attention")  # type: ignore[union-attr,arg-type]


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


def test_a_region_belongs_to_its_thread(model: ImageGPT) -> None:
    inside, seen = threading.Event(), []

    def look() -> None:
        inside.wait(10)
        seen.append(backend(model))

    thread = threading.Thread(target=look)
    thread.start()
    with igpt.use_kernels():
        inside.set()
        thread.join()
        assert backend(model) == "auto"
    assert seen == [None]


def test_state_dict_copies_and_wrappers_are_untouched(model: ImageGPT, tokens: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with igpt.use_kernels(model):
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert backend(copy.deepcopy(model)) == "auto"
        wrapped = torch.nn.DataParallel(model) if torch.cuda.is_available() else torch.nn.Sequential(model)
        inner = igpt.use_kernels(wrapped, attention="reference")
        assert backend(model) == "reference"
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


def test_training_curve_is_the_same(tokens: torch.Tensor) -> None:
    curves = []
    for kernels in ("off", "auto"):
        torch.manual_seed(0)
        model = ImageGPT(CONFIG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        with igpt.use_kernels(model, attention=kernels):
            for _ in range(30):
                loss = model(tokens, tokens).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_report_says_what_runs_and_why(model: ImageGPT) -> None:
    with igpt.use_kernels(model, norm="triton") as report:
        text = str(report)
        table = report.as_dict()
    assert table["attention"]["active"] == "torch"  # type: ignore[index]
    assert table["attention"]["modules"] == 2  # type: ignore[index]
    assert table["norm"]["active"] == "plain"  # type: ignore[index]
    assert "not triton" in text
    print(report, file=io.StringIO())


def test_strict_raises_with_every_reason(model: ImageGPT) -> None:
    with pytest.raises(ConfigError, match=r"triton cannot run: device cpu is not one of cuda.*norm has no fused kernel"):
        igpt.use_kernels(model, attention="triton", norm="triton", strict=True)
    assert backend(model) is None


def test_bad_arguments_are_named(model: ImageGPT) -> None:
    with pytest.raises(TypeError, match="Linear"):
        igpt.use_kernels(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="str"):
        igpt.use_kernels("sdpa")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention"):
        igpt.use_kernels(model, attention=3)  # type: ignore[arg-type]
