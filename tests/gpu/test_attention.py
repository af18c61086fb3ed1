"""The attention kernels on a GPU: what neither interpreter nor compiler can show. `make gpu` runs these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from igpt_kernels import testing, tuning
from igpt_kernels._ops import attention
from igpt_kernels._triton import attention_forward
from igpt_kernels.attention import decode_attention, flash_attention
from igpt_kernels.reference import attention_reference
from tests import kit, operators

pytestmark = pytest.mark.gpu

DTYPES = kit.DTYPES


def inputs(shape: tuple[int, ...], dtype: torch.dtype, memory: str = "fused_qkv") -> list[Tensor]:
    return kit.qkv(shape, dtype, memory, "cuda")


def compare(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> None:
    """Out and gradients within the budget of eager at the same dtype, with every new tensor poisoned."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=causal, backend="triton")

    kit.compare_attention(ours, (q, k, v), causal=causal, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_every_shipped_configuration(head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    compare(*inputs((2, 3, 333, head_dim), dtype), causal=causal)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2304, 4096])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_sizes_of_images(tokens: int, head_dim: int) -> None:
    compare(*inputs((1, 2, tokens, head_dim), torch.bfloat16), causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 500), (100, 1000), (1000, 100), (129, 130), (130, 129)])
def test_lengths_that_differ(queries: int, keys: int) -> None:
    q, k, v = inputs((2, 2, max(queries, keys), 64), torch.bfloat16)
    compare(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], causal=True)


@pytest.mark.parametrize("layout", testing.MEMORY_FORMATS)
def test_strides(layout: str) -> None:
    compare(*inputs((2, 3, 200, 96), torch.float16, layout), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("longest", [1, 100, 1024, 4097])
def test_decode(longest: int, head_dim: int, dtype: torch.dtype) -> None:
    _, k, v = inputs((3, 4, longest, head_dim), dtype)
    q = testing.make_input((3, 4, 1, head_dim), dtype=dtype, seed=5, device="cuda")
    for length in (longest, longest // 2, torch.tensor([longest, 0, longest // 3], device="cuda")):
        kit.compare_decode(decode_attention(q, k, v, length, backend="triton"), q, k, v, length)


def test_the_same_bits_a_thousand_times() -> None:
    q, k, v = (x.requires_grad_() for x in inputs((4, 8, 1024, 64), torch.bfloat16))
    grad = torch.randn_like(q)
    first: tuple[Tensor, ...] | None = None
    for _ in range(1000):
        out = flash_attention(q, k, v, backend="triton")
        run = (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))
        first = run if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements() -> None:
    """Batch 350 of 64 x 64 RGB with 8 heads of 64 in a fused tensor: the last image is beyond 32-bit offsets."""
    fused = torch.empty(350, 12288, 3, 8, 64, dtype=torch.bfloat16, device="cuda")
    assert fused.numel() > 2**32
    for image in (0, -1):
        fused[image].normal_()
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    fused[1:-1].zero_()
    out, lse = attention.flash_forward(q, k, v, True, 0.125, "triton")
    alone, alone_lse = attention.flash_forward(*(x[-1:].contiguous() for x in (q, k, v)), True, 0.125, "triton")
    assert torch.equal(out[-1:], alone)
    assert torch.equal(lse[-1:], alone_lse)


def test_side_stream_and_graph() -> None:
    q, k, v = inputs((2, 8, 512, 64), torch.bfloat16, "contiguous")
    operators.check_side_stream(lambda: [flash_attention(q, k, v, backend="triton")])
    lengths = torch.full((2,), 100, device="cuda")
    query = q[:, :, :1].contiguous()
    decode_attention(query, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row = decode_attention(query, k, v, lengths)
    lengths.fill_(300)
    graph.replay()
    kit.compare_decode(row, query, k, v, 300)


def test_compiled_model_step_matches_eager() -> None:
    q, k, v = (x.requires_grad_() for x in inputs((2, 4, 300, 64), torch.bfloat16, "contiguous"))
    compiled = torch.compile(lambda *x: flash_attention(*x).float().square().sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    want = torch.autograd.grad(flash_attention(q, k, v).float().square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_that_sees_nothing() -> None:
    q, k, v = inputs((1, 2, 200, 64), torch.bfloat16)
    out, lse = attention.flash_forward(q, k[:, :, :50], v[:, :, :50], True, 0.125, "triton")
    assert (out[:, :, :150] == 0).all()
    assert (lse[:, :, :150] == -math.inf).all()


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90")
@pytest.mark.parametrize("entry", [(128, 128, 4, 2), (128, 64, 4, 3), (192, 64, 4, 3)], ids=str)
class TestGluon:
    """The Gluon kernel, which no interpreter runs, against the oracle in float64."""

    def compare(self, entry: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> None:
        config, scale = tuning.Config(*entry, gluon=True), q.shape[3] ** -0.5
        assert attention_forward.gluon_takes(q, k, v)
        with testing.poisoned_memory():
            out, lse = attention_forward.launch_flash_forward(q, k, v, causal, scale, config=config)
        eager, _ = attention_reference(q, k, v, causal=causal, scale=scale)
        exact, exact_lse = attention_reference(q.double(), k.double(), v.double(), causal=causal, scale=scale)
        unseen = exact_lse == -math.inf
        assert torch.equal(lse == -math.inf, unseen)
        assert (out.masked_select(unseen[..., None]) == 0).all()
        testing.error_ratio(out, exact, eager, factor=testing.OUTPUT_FACTOR)
        torch.testing.assert_close(lse.masked_fill(unseen, 0).double(), exact_lse.masked_fill(unseen, 0), rtol=1e-5, atol=1e-4)
        again, _ = attention_forward.launch_flash_forward(q, k, v, causal, scale, config=config)
        assert torch.equal(out, again)

    @pytest.mark.parametrize("dtype", kit.HALVES, ids=str)
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 192, 333, 1024, 2305])
    def test_lengths(self, entry: tuple[int, ...], tokens: int, causal: bool, dtype: torch.dtype) -> None:
        for head_dim in (64, 128):
            self.compare(entry, *inputs((2, 3, tokens, head_dim), dtype, "heads_last"), causal=causal)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(
        ("queries", "keys"), [(1, 500), (100, 1000), (1000, 100), (129, 130), (130, 129), (385, 1), (64, 7), (1, 1025)]
    )
    def test_lengths_that_differ(self, entry: tuple[int, ...], queries: int, keys: int, causal: bool) -> None:
        q, k, v = inputs((2, 3, max(queries, keys), 128), torch.bfloat16)
        self.compare(entry, q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], causal=causal)

    @pytest.mark.parametrize("head_dim", [8, 40, 80, 96])
    @pytest.mark.parametrize("memory", ["contiguous", "heads_last", "fused_qkv"])
    def test_padded_heads_and_strides(self, entry: tuple[int, ...], memory: str, head_dim: int) -> None:
        self.compare(entry, *inputs((3, 2, 200, head_dim), torch.float16, memory), causal=True)

    def test_nan_of_a_key_reaches_the_rows_that_see_it(self, entry: tuple[int, ...]) -> None:
        q, k, v = (x.clone() for x in inputs((1, 2, 500, 128), torch.bfloat16))
        k[:, :, 300] = math.nan
        config = tuning.Config(*entry, gluon=True)
        out, lse = attention_forward.launch_flash_forward(q, k, v, True, 0.1, config=config)
        assert torch.equal(out.isnan().any(-1), torch.arange(500, device="cuda").expand(1, 2, 500) >= 300)
        assert torch.equal(lse.isnan(), out.isnan().any(-1))

    def test_the_same_bits_as_often_as_it_runs(self, entry: tuple[int, ...]) -> None:
        q, k, v = inputs((4, 8, 1500, 128), torch.bfloat16)
        config = tuning.Config(*entry, gluon=True)
        first = attention_forward.launch_flash_forward(q, k, v, True, 0.1, config=config)
        for _ in range(200):
            again = attention_forward.launch_flash_forward(q, k, v, True, 0.1, config=config)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_tensors_it_refuses_run_in_triton(self, entry: tuple[int, ...]) -> None:
        q, k, v = inputs((2, 2, 200, 64), torch.bfloat16, "stepped")
        assert not attention_forward.gluon_takes(q, k, v)
        out, _ = attention_forward.launch_flash_forward(q, k, v, True, 0.125, config=tuning.Config(*entry, gluon=True))
        exact, eager = (
            attention_reference(*x, causal=True, scale=0.125)[0] for x in ([y.double() for y in (q, k, v)], (q, k, v))
        )
        testing.error_ratio(out, exact, eager, factor=testing.OUTPUT_FACTOR)


def test_this_gpu_has_a_table() -> None:
    assert tuning.table_for(torch.device("cuda", 0)) in {path.stem for path in tuning.FOLDER.glob("*.json")}
