"""The block-sparse kernels on a GPU: what neither interpreter nor compiler can show. `make gpu` runs these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igpt_kernels import layouts, testing
from igpt_kernels.attention import block_sparse_attention, decode_attention
from igpt_kernels.layouts import SparseLayout
from tests import kit

pytestmark = pytest.mark.gpu

DTYPES = kit.DTYPES
TEXTS = ["local2d:7", "row", "column", "row_column", "strided", "strided:50", "fixed:20,4", "local2d:3+column"]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, memory: str = "fused_qkv") -> list[Tensor]:
    return kit.qkv(shape, dtype, memory, "cuda")


def compare(q: Tensor, k: Tensor, v: Tensor, layout: SparseLayout | list[SparseLayout]) -> None:
    """Out and gradients within the budget of eager at the same dtype, with every new tensor poisoned."""
    each = [layout] if isinstance(layout, SparseLayout) else layout
    mask = torch.stack([one.dense_mask("cuda") for one in each])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, backend="triton")

    kit.compare_attention(ours, (q, k, v), scale=q.shape[-1] ** -0.5, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("text", ["local2d:3", "row_column"])
def test_every_shipped_configuration(text: str, head_dim: int, dtype: torch.dtype) -> None:
    compare(*inputs((2, 3, 19 * 21, head_dim), dtype), layouts.parse(text, 19, 21))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (48, 48), (33, 65), (64, 64)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_patterns(text: str, causal: bool, height: int, width: int) -> None:
    text = "fixed:8,2" if text == "fixed:20,4" and width == 8 else text
    compare(*inputs((1, 2, height * width, 64), torch.bfloat16), layouts.parse(text, height, width, causal=causal))


@pytest.mark.parametrize("kind", testing.MEMORY_FORMATS)
def test_strides_and_heads(kind: str) -> None:
    each = [layouts.local2d(20, 20, 3), layouts.column(20, 20), layouts.strided(20, 20)]
    compare(*inputs((2, 3, 400, 96), torch.float16, kind), each)


def test_a_large_image_agrees_with_the_torch_backend() -> None:
    layout = layouts.parse("local2d:7+column", 256, 256)
    q, k, v = (x.requires_grad_() for x in inputs((1, 2, 65536, 64), torch.float32))
    grad = torch.randn_like(q)
    runs = []
    for backend in ("triton", "torch"):
        out = block_sparse_attention(q, k, v, layout, backend=backend)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("text", TEXTS)
def test_decode(text: str, head_dim: int, dtype: torch.dtype) -> None:
    layout = layouts.parse(text, 24, 32)
    q, k, v = inputs((3, 4, 768, head_dim), dtype)
    for length in (768, 100, torch.tensor([768, 0, 300], device="cuda")):
        out = decode_attention(q[:, :, :1], k, v, length, layout=layout, backend="triton")
        kit.compare_decode(out, q[:, :, :1], k, v, length, layout=layout)


def test_the_same_bits_a_hundred_times() -> None:
    layout = layouts.parse("local2d:7+column", 64, 64)
    q, k, v = (x.requires_grad_() for x in inputs((2, 8, 4096, 64), torch.bfloat16))
    grad = torch.randn_like(q)
    first: tuple[Tensor, ...] | None = None
    for _ in range(100):
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        run = (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))
        first = run if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


def test_decode_in_a_graph() -> None:
    layout = layouts.local2d(16, 16, 3)
    q, k, v = inputs((2, 8, 256, 64), torch.bfloat16, "contiguous")
    query, lengths = q[:, :, :1].contiguous(), torch.full((2,), 100, device="cuda")
    decode_attention(query, k, v, lengths, layout=layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row = decode_attention(query, k, v, lengths, layout=layout)
    lengths.fill_(200)
    graph.replay()
    kit.compare_decode(row, query, k, v, 200, layout=layout)


def test_no_pattern_compiles_anew() -> None:
    """Descriptors hold the shape of a tile, so a kernel is compiled once for each shape, whatever the pattern and the size."""
    from igpt_kernels._triton.sparse_forward import _sparse_forward_kernel

    q, k, v = inputs((1, 2, 400, 64), torch.bfloat16)
    for text in ("local2d:1", "row_column"):
        block_sparse_attention(q, k, v, layouts.parse(text, 20, 20), backend="triton")
    known = sum(len(cache[0]) for cache in _sparse_forward_kernel.device_caches.values())
    # Parts in another order would be compiled anew: the first reads no sums of parts before it.
    for text, size in (("local2d:9", (20, 20)), ("local2d:5", (10, 40)), ("local2d:2", (40, 10)), ("strided:20", (20, 20))):
        block_sparse_attention(q, k, v, layouts.parse(text, *size), backend="triton")
    assert sum(len(cache[0]) for cache in _sparse_forward_kernel.device_caches.values()) == known
