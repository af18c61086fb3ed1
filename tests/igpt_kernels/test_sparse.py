"""Block-sparse attention on the torch backend, and its operators: against the dense-mask oracle in float64."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from igpt_kernels import backends, layouts, testing
from igpt_kernels._ops import decode, sparse
from igpt_kernels._torch import sparse as torch_sparse
from igpt_kernels.attention import block_sparse_attention, decode_attention, flash_attention
from igpt_kernels.layouts import SparseLayout
from igpt_kernels.reference import attention_reference
from tests import kit, operators

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TEXTS = [
    "local2d:3",
    "row",
    "column",
    "row_column",
    "strided",
    "strided:7",
    "fixed:10,3",
    "local2d:2+column",
    "local2d:4&row_column",
]


@pytest.fixture(params=["tiles", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of the torch backend, whatever it would choose."""
    torch_sparse._dense_bias.cache_clear()
    if request.param == "tiles":
        monkeypatch.setattr(torch_sparse, "DENSE_BYTES", 0)
    else:
        monkeypatch.setattr(torch_sparse, "BLOCK_COST", 1e9)
    yield request.param
    torch_sparse._dense_bias.cache_clear()


def inputs(
    tokens: int, head_dim: int = 24, dtype: torch.dtype = torch.float32, *, heads: int = 2, kind: str = "fused_qkv"
) -> list[Tensor]:
    return [testing.make_input((2, heads, tokens, head_dim), dtype=dtype, seed=seed, memory=kind) for seed in range(3)]


def mask_of(layout: SparseLayout | Sequence[SparseLayout]) -> Tensor:
    return torch.stack([one.dense_mask() for one in ([layout] if isinstance(layout, SparseLayout) else layout)])


def compare(q: Tensor, k: Tensor, v: Tensor, layout: SparseLayout | Sequence[SparseLayout], *, kind: str = "stepped") -> None:
    key = layouts.joined([one.key for one in ([layout] if isinstance(layout, SparseLayout) else layout)])
    grad = testing.make_input(q.shape, dtype=q.dtype, seed=9, memory=kind)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return sparse.sparse_forward(q, k, v, key, 0.3, "torch")

    kit.compare_attention(ours, (q, k, v), scale=0.3, mask=mask_of(layout), grad=grad)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (11, 19), (24, 24)])
@pytest.mark.parametrize("text", TEXTS)
def test_patterns(text: str, height: int, width: int, causal: bool, dtype: torch.dtype, path: str) -> None:
    width = 12 if text.startswith("fixed") and width < 10 else width
    compare(*inputs(height * width, dtype=dtype), layouts.parse(text, height, width, causal=causal))


@pytest.mark.parametrize("head_dim", [1, 16, 64, 96, 128, 256])
def test_head_dims(head_dim: int, path: str) -> None:
    compare(*inputs(130, head_dim), layouts.parse("local2d:3+column", 10, 13))


@pytest.mark.parametrize("kind", testing.MEMORY_FORMATS)
def test_strides(kind: str, path: str) -> None:
    compare(*inputs(130, kind=kind), layouts.parse("strided:9", 10, 13), kind=kind)


@pytest.mark.parametrize("seed", range(20))
def test_random_predicates(seed: int, path: str) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(1, 20), rng.randint(1, 20)
    tokens = height * width
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(seed)) < rng.choice([0.01, 0.2])
    layout = layouts.from_predicate(height, width, lambda q, k: seen[q, k], causal=rng.random() < 0.7)
    each = [rng.choice([layout, layouts.row_column(height, width, causal=layout.causal)]) for _ in range(3)]
    compare(*inputs(tokens, heads=3), each)
    some = rng.randint(1, tokens)
    compare(*inputs(some, heads=3), layout.prefix(some))


def test_rows_that_see_nothing(path: str) -> None:
    compare(*inputs(120), layouts.from_predicate(10, 12, lambda q, k: (q % 3 > 0) & (k % 5 == 0)))
    compare(*inputs(120), layouts.from_predicate(10, 12, lambda q, k: q < k))


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sparse, "DENSE_BYTES", 0)
    torch_sparse._dense_bias.cache_clear()
    layout = layouts.local2d(24, 24, 3)
    q, k, v = (x.requires_grad_() for x in inputs(576))
    runs = []
    for size in (1, 1 << 20):
        monkeypatch.setattr(torch_sparse, "CHUNK_BYTES", size)
        out = block_sparse_attention(q, k, v, layout)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_other_devices_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without torch's CPU kernel take matrix products; here by making the CPU look like one."""
    layout = layouts.parse("local2d:3+column", 17, 13)
    q, k, v = (x.double() for x in inputs(221))
    grad = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
    groups = [(layout.key, [0, 1])]
    out, lse = torch_sparse.sparse_forward(q, k, v, groups, 0.3)
    wanted = (out, lse, *torch_sparse.sparse_backward(grad, q, k, v, out, lse, groups, 0.3))
    monkeypatch.setattr(torch_sparse, "FUSED", ())
    monkeypatch.setattr(torch_sparse, "DENSE_BYTES", 0)
    torch_sparse._dense_bias.cache_clear()
    out, lse = torch_sparse.sparse_forward(q, k, v, groups, 0.3)
    got = (out, lse, *torch_sparse.sparse_backward(grad, q, k, v, out, lse, groups, 0.3))
    torch_sparse._dense_bias.cache_clear()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cheaper_way_is_taken() -> None:
    assert torch_sparse._dense_bias(layouts.local2d(8, 8, 7).key) is not None, "most tiles of a small image are touched"
    assert torch_sparse._dense_bias(layouts.local2d(64, 64, 7).key) is None, "few are"
    assert torch_sparse._dense_bias(layouts.from_predicate(80, 80, lambda q, k: q - k != 1).key) is None, "too large a mask"


# --- operators -----------------------------------------------------------------------------------------------------------


def leaves(tokens: int, dtype: torch.dtype, kind: str = "contiguous", head_dim: int = 8) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs(tokens, head_dim, dtype, kind=kind)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    layout = layouts.row_column(4, 5).key
    q, k, v = leaves(20, dtype, kind)
    torch.library.opcheck(sparse.sparse_forward, (q, k, v, f"{layout};{layouts.local2d(4, 5, 1).key}", 0.3, "torch"))
    out, lse = (x.detach() for x in sparse.sparse_forward(q, k, v, layout, 0.3, "torch"))
    data = [x.detach() for x in (q, q, k, v)]
    torch.library.opcheck(sparse.sparse_backward, (*data, out, lse, layout, 0.3, "torch"))
    query = q[:, :, :1].detach().clone().requires_grad_()
    for lengths, length in ((None, 20), (None, 0), (torch.tensor([20, 0]), 0)):
        torch.library.opcheck(decode.sparse_decode, (query, k, v, lengths, length, layout, 0.3, "torch"))
        torch.library.opcheck(decode.sparse_decode, (query, k, v, lengths, length, layout, 0.3, "ext"))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["local2d:1", "row_column", "strided:3", "fixed:4,1"])
def test_gradcheck(text: str) -> None:
    layout = layouts.parse(text, 3, 4)
    x = leaves(12, torch.float64, head_dim=3)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, layout), x)
    query = x[0][:, :, 5:6].detach().clone().requires_grad_()
    for length in (7, torch.tensor([12, 3])):

        def row(q: Tensor, k: Tensor, v: Tensor, length: int | Tensor = length) -> Tensor:
            return decode_attention(q, k, v, length, layout=layout)

        assert torch.autograd.gradcheck(row, (query, *x[1:]))
        assert torch.autograd.gradgradcheck(row, (query, *x[1:]))


def test_second_derivative_is_a_clear_error() -> None:
    q, k, v = leaves(12, torch.float32)
    out = block_sparse_attention(q, k, v, layouts.row(3, 4))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        dq.sum().backward()


def test_backward_is_the_same_bit_for_bit() -> None:
    layout = layouts.parse("local2d:3+column", 25, 24)
    operators.check_same_bits(block_sparse_attention, [*leaves(600, torch.float32), layout])


@pytest.mark.parametrize("length", [5, torch.tensor([5, 3])], ids=["one length", "lengths"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_decoding_compiles_without_breaks(length: int | Tensor, sparse: bool) -> None:
    layout = layouts.local2d(4, 4, radius=1) if sparse else None
    q, k, v = (torch.randn(2, 2, tokens, 8) for tokens in (1, 16, 16))

    def last(q: Tensor) -> Tensor:
        return decode_attention(q, k, v, length, layout=layout)

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(last, fullgraph=True, backend="aot_eager")(q), last(q))
    torch.compiler.reset()


def test_compile_without_breaks_and_anew_for_another_pattern() -> None:
    x = leaves(20, torch.float32)
    patterns = [layouts.parse(text, 4, 5) for text in ("local2d:1", "row_column", "local2d:1")]
    # A forward and a backward graph for each of two patterns, none for the one that comes back.
    operators.check_compiled(block_sparse_attention, [[*x, layout] for layout in patterns], graphs=4, dynamic=None)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    layout = layouts.local2d(4, 5, 1)
    operators.check_checkpointing(block_sparse_attention, [*leaves(20, torch.float32), layout], reentrant=reentrant)


def test_autocast_takes_its_dtype() -> None:
    q, k, v = leaves(20, torch.float32)
    layout = layouts.local2d(4, 5, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(q, k, v, layout)
        assert decode_attention(q[:, :, -1:], k, v, 20, layout=layout).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_operations_are_counted_by_visible_pairs() -> None:
    q, k, v = leaves(20, torch.float32)
    each = [layouts.local2d(4, 5, 1), layouts.row_column(4, 5)]
    unit = 2 * 8 * sum(layout.pairs for layout in each)
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(q, k, v, each)
    assert counter.get_total_flops() == 4 * unit
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * unit
    with FlopCounterMode(display=False) as counter:
        decode_attention(q[:, :, :1], k, v, 8, layout=each)
    keys = sum(len(layout.keys_of(7)) for layout in each)
    assert counter.get_total_flops() == 4 * 2 * 8 * keys


# --- public functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.7, 0.0, -0.4])
def test_backends_agree(scale: float | None) -> None:
    q, k, v = leaves(130, torch.float64)
    each = [layouts.local2d(10, 13, 2), layouts.strided(10, 13)]
    for layout in (each[0], each):
        runs = []
        for backend in ("torch", "reference", "auto"):
            out = block_sparse_attention(q, k, v, layout, scale=scale, backend=backend)
            runs.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_dense_is_flash_attention() -> None:
    q, k, v = inputs(42)
    for causal in (True, False):
        out = block_sparse_attention(q, k, v, layouts.dense(6, 7, causal=causal))
        assert torch.equal(out, flash_attention(q, k, v, causal=causal))


@pytest.mark.parametrize("shape", [(0, 2, 42, 8), (2, 0, 42, 8)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    out = block_sparse_attention(x, x, x, layouts.local2d(6, 7, 1))
    assert out.shape == shape
    out.sum().backward()


def test_a_hidden_key_cannot_spoil_the_result() -> None:
    layout = layouts.local2d(24, 24, 2)
    q, k, v = inputs(576)
    clean = block_sparse_attention(q, k, v, layout)
    k[:, :, 300], v[:, :, 300] = math.nan, math.inf
    dirty = block_sparse_attention(q, k, v, layout)
    sees = layout.dense_mask()[:, 300]
    bad = ~torch.isfinite(dirty).all(-1)
    assert bad[:, :, sees].all()
    # Tiles are gathered whole: those of the same tile of queries may suffer, no others.
    assert not bad[:, :, :128].any()
    torch.testing.assert_close(dirty[:, :, :128], clean[:, :, :128])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for name in ("torch", "reference") for dtype in (*DTYPES, torch.float64)]
    + [("ext", dtype) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("text", ["local2d:2", "row_column", "strided:5", "fixed:6,2", "column"])
def test_decode(text: str, backend: str, dtype: torch.dtype) -> None:
    """Keys that the pattern hides are NaN: they may not be read into the result."""
    layout = layouts.parse(text, 9, 8)
    mask = layout.dense_mask()
    q = testing.make_input((2, 3, 1, 16), dtype=dtype, seed=1)
    k, v = (testing.make_input((2, 3, 80, 16), dtype=dtype, seed=seed, memory="heads_last") for seed in (2, 3))
    for length in (1, 2, 40, 72, torch.tensor([72, 33]), torch.tensor([0, 5], dtype=torch.int32)):
        lengths = [length] * 2 if isinstance(length, int) else length.tolist()
        seen = torch.stack([mask[n - 1] if n else torch.zeros(72, dtype=torch.bool) for n in lengths])
        seen = torch.cat([seen, torch.zeros(2, 8, dtype=torch.bool)], 1)
        ck, cv = (x.masked_fill(~seen[:, None, :, None], math.nan) for x in (k, v))
        out = decode_attention(q, ck, cv, length, layout=layout, scale=0.3, backend=backend)
        kept = [x.masked_fill(~seen[:, None, :, None], 0.0) for x in (k, v)]
        oracle = {"causal": False, "scale": 0.3, "mask": seen[:, None, None]}
        exact = attention_reference(q.double(), *(x.double() for x in kept), **oracle)[0]
        eager = attention_reference(q, *kept, **oracle)[0]
        testing.error_ratio(out, exact, eager, factor=2, floor=4 * float(v.abs().max()), name="decode")


@pytest.mark.parametrize("backend", ["torch", "ext"])
def test_decode_is_a_row_of_the_whole(backend: str) -> None:
    q, k, v = inputs(72)
    each = [layouts.local2d(9, 8, 2), layouts.strided(9, 8)]
    whole = block_sparse_attention(q, k, v, each)
    for n in (1, 30, 72):
        row = decode_attention(q[:, :, n - 1 : n], k, v, n, layout=each, backend=backend)
        torch.testing.assert_close(row, whole[:, :, n - 1 : n])
    assert (decode_attention(q[:, :, :1], k, v, 0, layout=each, backend=backend) == 0).all()


def test_bad_arguments_are_named() -> None:
    q, k, v = inputs(42)
    layout = layouts.local2d(6, 7, 1)
    sparse, other = block_sparse_attention, layouts.row(7, 8)
    query = q[:, :, :1]
    names = "layout must be a SparseLayout or a sequence of them, got "
    for kind, words, call in (
        (TypeError, names + "str", lambda: sparse(q, k, v, "row")),
        (TypeError, names + "int in it", lambda: sparse(q, k, v, [layout, 3])),  # type: ignore[list-item]
        (ValueError, "one for each of 2 heads; got 3", lambda: sparse(q, k, v, [layout] * 3)),
        (ValueError, r"layout must have 42 tokens, got 56.*prefix", lambda: sparse(q, k, v, other)),
        (ValueError, "must have 42 tokens, got 56", lambda: decode_attention(query, k, v, 1, layout=[layout, other])),
        (ValueError, "k must have as many tokens as q, 42, got 41", lambda: sparse(q, k[:, :, 1:], v[:, :, 1:], layout)),
        (ValueError, "backend must be auto, triton, torch, reference", lambda: sparse(q, k, v, layout, backend="ext")),
        (backends.BackendUnavailable, "device cpu", lambda: sparse(q, k, v, layout, backend="triton")),
        (ValueError, "the layout's 30, got 31", lambda: decode_attention(query, k, v, 31, layout=layouts.row(5, 6))),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_auto_refuses_a_square_it_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(42)
    layout = layouts.local2d(6, 7, 1)
    monkeypatch.setattr("igpt_kernels.memory.free_memory", lambda device: 1000)
    monkeypatch.setitem(backends.IMPLEMENTATIONS, "block_sparse_attention", (backends.Implementation("reference"),))
    with pytest.raises(MemoryError, match="42 x 42 scores"):
        block_sparse_attention(q, k, v, layout)
    block_sparse_attention(q, k, v, layout, backend="reference")


@pytest.mark.slow
def test_memory_is_linear_in_tokens() -> None:
    """Peak memory of forward and backward beyond the inputs, in a process each: 4 times the tokens, at most 5 times as much."""
    code = """
        import sys, torch
        from pathlib import Path
        from igpt_kernels import layouts
        from igpt_kernels.attention import block_sparse_attention
        torch.set_num_threads(1)
        def kib(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name))
        def run(side):
            q, k, v = (torch.randn(1, 2, side * side, 32, requires_grad=True) for _ in range(3))
            before = kib("VmRSS:")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            block_sparse_attention(q, k, v, layouts.local2d(side, side, 7)).square().sum().backward()
            return kib("VmHWM:") - before
        run(16)
        print(run(int(sys.argv[1])))
    """
    peaks = []
    for side in (96, 192):
        command = [sys.executable, "-c", textwrap.dedent(code), str(side)]
        peaks.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    square = 4 * 96**4 * 2 >> 10  # float32 scores of two heads
    assert 1000 < peaks[0] < square // 4, f"{peaks} KiB at 96 and 192 squared"
    assert peaks[1] <= 5 * peaks[0], f"{peaks} KiB at 96 and 192 squared"
