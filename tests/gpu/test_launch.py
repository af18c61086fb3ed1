"""Launches by `launch` on a GPU against Triton's own: the same bits, whatever was launched before. `make gpu` runs these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igpt_kernels._triton import launch as module
from igpt_kernels._triton.activation import launch_quick_gelu_forward
from igpt_kernels._triton.attention_backward import launch_flash_backward
from igpt_kernels._triton.attention_forward import launch_flash_forward
from tests import operators

pytestmark = pytest.mark.gpu


def heads(shift: int) -> list[Tensor]:
    """q, k, v and a gradient, whose memory begins `shift` elements behind an aligned address."""
    generator = torch.Generator("cuda").manual_seed(shift)
    size = (2, 4, 200, 64)
    count = 2 * 4 * 200 * 64
    flat = [torch.randn(count + shift, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(4)]
    return [x[shift:].view(size) for x in flat]


def attention(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    out, lse = launch_flash_forward(q, k, v, True, 0.125)
    return [out, lse, *launch_flash_backward(grad, q, k, v, out, lse, True, 0.125)]


def test_the_same_bits_as_by_triton_on_two_alignments_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    want = {}
    with monkeypatch.context() as patch:
        patch.setattr(module, "KNOWN", False)
        for shift in (0, 3):
            want[shift] = attention(*heads(shift))
    module.clear()
    for _ in range(3):
        for shift in (0, 3):
            assert all(torch.equal(a, b) for a, b in zip(attention(*heads(shift)), want[shift], strict=True))
    assert all(form.direct and form.compiled for form in module._forms.values())
    # Four kernels; the two that may read by descriptors take tensors where the address is odd, which is another form.
    counts = sorted(len(form.compiled) for form in module._forms.values())
    assert counts in ([2, 2, 2, 2], [1, 1, 1, 1, 2, 2])


def test_later_calls_do_not_ask_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module.clear()
    x = torch.randn(1000, 512, device="cuda")
    want = launch_quick_gelu_forward(x, None)
    monkeypatch.setattr(module.JITFunction, "__getitem__", None)
    (form,) = module._forms.values()
    monkeypatch.setattr(form, "keep", None)
    assert torch.equal(launch_quick_gelu_forward(x, None), want)


def test_side_stream_and_graph() -> None:
    tensors = heads(0)
    operators.check_side_stream(lambda: attention(*tensors))
    want = attention(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention(*tensors)
    for x in found:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_turn() -> None:
    x = torch.randn(1000, 512, device="cuda:0")
    want = launch_quick_gelu_forward(x, None).cpu()
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        assert torch.equal(launch_quick_gelu_forward(x.to(device), None).cpu(), want)
