"""The block-sparse kernels in Triton's interpreter, against the oracle in float64; see test_attention.py."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from igpt_kernels import layouts, testing
from igpt_kernels._triton import common, sparse_forward
from igpt_kernels._triton.attention_forward import launch_flash_forward
from igpt_kernels._triton.descriptors import read_by
from igpt_kernels._triton.sparse_backward import launch_sparse_backward
from igpt_kernels._triton.sparse_decode import launch_sparse_decode
from igpt_kernels._triton.sparse_forward import launch_sparse_forward
from igpt_kernels.checks import check_layout
from igpt_kernels.layouts import SparseLayout, groups_of
from igpt_kernels.reference import attention_reference
from igpt_kernels.tuning import Config
from tests import kit

SMALL = Config(16, 16, 4, 1)
DTYPES = kit.DTYPES
PATTERNS = ["local2d:0", "local2d:2", "row", "column", "row_column", "strided", "strided:5", "fixed", "fixed:4,2"]
COMBINED = ["local2d:1+column", "local2d:3&row_column", "strided:3+fixed:5,1", "local2d:2+strided:7"]


def pattern(text: str, height: int, width: int, causal: bool = True) -> SparseLayout:
    """`parse`, with a default of c for `fixed` that narrow images can take."""
    text = f"fixed:{width},{min(2, width)}" if text == "fixed" else text
    return layouts.parse(text, height, width, causal=causal)


class Sparse(torch.autograd.Function):
    """The two launchers as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, groups, scale, config):  # type: ignore[no-untyped-def]
        out, lse = launch_sparse_forward(q, k, v, groups, scale=scale, config=config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = groups, scale, config
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        groups, scale, config = ctx.how
        swapped = replace(config, block_m=config.block_n, block_n=config.block_m)
        grads = launch_sparse_backward(grad, *ctx.saved_tensors, groups, scale=scale, key_config=swapped, query_config=config)
        return *grads, None, None, None


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SparseLayout | Sequence[SparseLayout],
    *,
    scale: float = 0.3,
    config: Config = SMALL,
    far: float = 1.0,
) -> None:
    """Out, lse and gradients of the kernels within their budgets, with nothing written outside of the outputs.

    `far` is how much larger than 1 the keys are after scaling: dQ sums them with weights that cancel.
    """
    groups = groups_of(check_layout(layout, heads=q.shape[1], tokens=q.shape[2]), q.shape[1])
    each = [layout] * q.shape[1] if isinstance(layout, SparseLayout) else layout
    mask = torch.stack([one.dense_mask() for one in each])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return Sparse.apply(q, k, v, groups, scale, config)

    kit.compare_attention(ours, (q, k, v), scale=scale, mask=mask, guarded=6 if q.numel() else 0, far=far)


def inputs(tokens: int, head_dim: int, dtype: torch.dtype, *, heads: int = 1, layout: str = "fused_qkv") -> list[Tensor]:
    return [testing.make_input((1, heads, tokens, head_dim), dtype=dtype, seed=seed, memory=layout) for seed in range(3)]


# Every dtype at one size; images that tiles divide, and wide ones, in float32.
@pytest.mark.parametrize(
    ("height", "width", "dtype"), [(8, 8, torch.float32), (3, 19, torch.float32), *((5, 7, dtype) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("text", PATTERNS + COMBINED)
def test_patterns(text: str, height: int, width: int, causal: bool, dtype: torch.dtype) -> None:
    compare(*inputs(height * width, 16, dtype), pattern(text, height, width, causal))


@pytest.mark.parametrize("config", [Config(m, n, 4, 1) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)], ids=str)
@pytest.mark.parametrize("text", ["local2d:2", "row_column", "fixed:6,2"])
def test_blocks(text: str, config: Config) -> None:
    compare(*inputs(108, 16, torch.float32), layouts.parse(text, 9, 12), config=config)


@pytest.mark.parametrize(
    ("text", "head_dim", "dtype", "blocks", "height", "width"),
    [
        ("local2d:2", 64, torch.float16, (16, 16), 6, 12),
        ("local2d:3+column", 96, torch.bfloat16, (32, 16), 5, 8),
        ("row_column", 24, torch.float16, (16, 32), 6, 12),
        ("strided:6", 40, torch.bfloat16, (64, 64), 9, 8),
        ("fixed:4,2", 128, torch.float16, (32, 32), 4, 12),
    ],
    ids=str,
)
def test_descriptors(text: str, head_dim: int, dtype: torch.dtype, blocks: tuple[int, int], height: int, width: int) -> None:
    # Images that tiles do not divide: boxes reach beyond the right edge and the last row, where they must read zeros.
    q, k, v = inputs(height * width, head_dim, dtype, heads=2)
    config = Config(*blocks, 4, 3, descriptors=True)
    assert read_by(config, (q, k, v), [(8, 8)] * 3, [width] * 3, (16, 0))[0]
    compare(q, k, v, layouts.parse(text, height, width), config=config)


@pytest.mark.parametrize("kind", ["contiguous", "stepped"])
def test_descriptors_yield_to_pointers(kind: str) -> None:
    config = Config(16, 16, 4, 1, descriptors=True)
    layout = layouts.local2d(5, 6, 2)
    for tokens in (30, 29):  # the last row of 29 is cut
        some = inputs(tokens, 24, torch.float16, layout=kind)
        assert read_by(config, some, [(8, 8)] * 3, [6] * 3, (16, 0))[0] == (kind == "contiguous" and tokens == 30)
        compare(*some, layout.prefix(tokens), config=config)


def test_an_odd_address_yields_to_pointers() -> None:
    config = Config(16, 16, 4, 1, descriptors=True)
    aligned = inputs(30, 24, torch.float16, layout="contiguous")
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in aligned]  # strides of 16 bytes, as before
    for number in range(3):
        some = [odd[i] if i == number else x for i, x in enumerate(aligned)]
        assert not read_by(config, some, [(8, 8)] * 3, [6] * 3, (16, 0))[0]
    compare(*odd, layouts.local2d(5, 6, 2), config=config)


@pytest.mark.parametrize("head_dim", [24, 72])
def test_what_pointers_read_may_have_any_strides(head_dim: int) -> None:
    # Up to head dim 64 only keys and values are boxes for dQ, so a gradient of a sum, with strides 0, does not forbid them.
    config = Config(16, 16, 4, 1, descriptors=True)
    groups = groups_of(check_layout(layouts.local2d(5, 6, 2), heads=1, tokens=30), 1)
    q, k, v = inputs(30, head_dim, torch.float16)
    grad = torch.ones((), dtype=torch.float16).expand(q.shape)
    boxed, operands = read_by(config, (q, k, v, grad), [None, (8, 8), (8, 8), None], [6] * 4, (16, 8))
    assert boxed
    assert operands[0] is q
    assert operands[3] is grad
    assert operands[4] is operands[7] is None
    assert not read_by(config, (q, k, v, grad), [(8, 8)] * 4, [6] * 4, (16, 8))[0]
    out, lse = launch_sparse_forward(q, k, v, groups, scale=0.3, config=config)
    each = (
        launch_sparse_backward(g, q, k, v, out, lse, groups, scale=0.3, key_config=config, query_config=config)
        for g in (grad, grad.contiguous())
    )
    for strided, contiguous in zip(*each, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("tile", [(4, 4), (2, 8), (1, 16), (16, 1), (8, 8), (4, 16), (1, 64), (64, 1), (8, 16)], ids=str)
@pytest.mark.parametrize("text", ["local2d:3", "column", "strided:9"])
def test_tiles(text: str, tile: tuple[int, int]) -> None:
    config = Config(32, 16, 4, 1)
    compare(*inputs(130, 16, torch.float16), layouts.parse(text, 13, 10).with_tile(*tile), config=config)


@pytest.mark.parametrize(
    ("text", "dtype"), [("row_column", torch.float32), *(("local2d:2", dtype) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("head_dim", [1, 8, 16, 17, 32, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256])
def test_head_dims(text: str, head_dim: int, dtype: torch.dtype) -> None:
    compare(*inputs(42, head_dim, dtype, layout="heads_last"), layouts.parse(text, 6, 7))


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float32), (96, torch.bfloat16)], ids=str)
def test_a_whole_head(head_dim: int, dtype: torch.dtype) -> None:
    config = Config(32, 16, 4, 1, whole_head=True)
    assert common.head_arguments(torch.empty(1, 1, 1, head_dim), config)["DB"] == 0
    compare(*inputs(42, head_dim, dtype, layout="offset"), layouts.parse("row_column", 6, 7), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["row", "row_column", "column+strided:5+local2d:2"])
def test_no_part_writes_what_it_reads(text: str, dtype: torch.dtype) -> None:
    layout = layouts.parse(text, 6, 7)
    q, k, v = inputs(42, 16, dtype)
    parts = len(layouts.lists_of(layout.key, 16, 16))
    assert parts == {"row": 1, "row_column": 2}.get(text, parts)
    assert parts >= text.count("+") + 1
    for final in (q, q.new_empty(1, 1, 42, dtype=torch.float32)):
        made = sparse_forward.buffers(final, parts)
        pointers = [buffer.data_ptr() for buffer in made]
        assert made[0] is final
        assert len(made) == parts
        assert all(one != other for one, other in itertools.pairwise(pointers))
        assert all(buffer.dtype == torch.float32 for buffer in made[1:])
        assert len(set(pointers)) == min(parts, 2 if final.dtype == torch.float32 else 3)
    compare(q, k, v, layout)  # under the watch over memory, which finds a program that stores to what it has loaded


@pytest.mark.parametrize("kinds", [(a, b) for a in testing.MEMORY_FORMATS for b in testing.MEMORY_FORMATS], ids="-".join)
def test_strides(kinds: tuple[str, str]) -> None:
    q, k, v = (testing.make_input((2, 2, 30, 24), dtype=torch.float32, seed=i, memory=kinds[i % 2]) for i in range(3))
    compare(q, k, v, layouts.parse("local2d:2+column", 5, 6))


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(1, 11), rng.randint(1, 11)
    tokens = height * width
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(seed)) < rng.choice([0.02, 0.2, 0.9])
    some = layouts.from_predicate(height, width, lambda q, k: seen[q, k], causal=rng.random() < 0.7)
    other = pattern(rng.choice(PATTERNS), height, width, some.causal)
    layout = rng.choice([some, other, some | other, other & some, (some | other).prefix(rng.randint(1, tokens))])
    heads = rng.randint(1, 3)
    kinds = [rng.choice(testing.MEMORY_FORMATS) for _ in range(3)]
    shape = (rng.randint(1, 2), heads, layout.tokens, rng.choice([3, 16, 20, 40, 96]))
    dtype = rng.choice(DTYPES)
    q, k, v = (testing.make_input(shape, dtype=dtype, seed=seed + i, memory=kind) for i, kind in enumerate(kinds))
    each = [rng.choice([layout, other.prefix(layout.tokens)]) for _ in range(heads)]
    config = Config(rng.choice([16, 32]), rng.choice([16, 32]), 4, 1)
    compare(q, k, v, rng.choice([layout, each]), config=config)


def test_every_head_its_own_pattern() -> None:
    each = [layouts.local2d(6, 8, 2), layouts.column(6, 8), layouts.row_column(6, 8), layouts.column(6, 8)]
    compare(*inputs(48, 16, torch.float16, heads=4), each)


def test_rows_that_see_nothing() -> None:
    layout = layouts.from_predicate(6, 7, lambda q, k: (q % 3 > 0) & (k % 5 == 0))
    compare(*inputs(42, 16, torch.float32), layout)
    compare(*inputs(42, 16, torch.float32), layout | (layouts.column(6, 7) & layout))
    nothing = layouts.from_predicate(6, 7, lambda q, k: q < k)
    compare(*inputs(42, 16, torch.float32), nothing)


# Scores of size S are known to eps·S in float32, and so is the log-sum-exp by which parts are merged.
@pytest.mark.parametrize(
    ("text", "scale"), [("local2d:2", 10.0), ("row_column", 1e-3), ("row_column", 1.0), ("row_column", 5.0)]
)
def test_scales(text: str, scale: float) -> None:
    compare(*inputs(42, 16, torch.float32), layouts.parse(text, 6, 7), scale=scale)


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_scores_far_from_zero(shift: float) -> None:
    q, k, v = inputs(42, 16, torch.float32)
    compare(q + shift / 16, k * 4 + shift, v, layouts.row_column(6, 7), scale=0.25, far=18.0)


@pytest.mark.parametrize("shape", [(0, 2, 12, 16), (2, 0, 12, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    out, lse = launch_sparse_forward(x, x, x, [(layouts.row(3, 4).key, range(shape[1]))], scale=1.0, config=SMALL)
    assert out.shape == shape
    grads = launch_sparse_backward(x, x, x, x, out, lse, [(layouts.row(3, 4).key, range(shape[1]))], scale=1.0)
    assert all(grad.shape == shape for grad in grads)


def test_the_dense_pattern_is_flash_attention() -> None:
    q, k, v = inputs(60, 16, torch.float32)
    out, lse = launch_sparse_forward(q, k, v, [(layouts.dense(6, 10).key, [0])], scale=0.25, config=SMALL)
    flash, flash_lse = launch_flash_forward(q, k, v, causal=True, scale=0.25, config=SMALL)
    torch.testing.assert_close(out, flash)
    torch.testing.assert_close(lse, flash_lse)


def test_not_a_number_stays_where_it_is_seen() -> None:
    layout = layouts.local2d(6, 7, 1)
    q, k, v = inputs(42, 16, torch.float32)
    groups = [(layout.key, [0])]
    clean, _ = launch_sparse_forward(q, k, v, groups, scale=0.25, config=SMALL)
    q[0, 0, 21] = math.nan
    dirty, lse = launch_sparse_forward(q, k, v, groups, scale=0.25, config=SMALL)
    assert dirty[0, 0, 21].isnan().all()
    assert lse[0, 0, 21].isnan()
    keep = torch.arange(42) != 21
    assert torch.equal(dirty[:, :, keep], clean[:, :, keep])


@pytest.mark.parametrize("size", [(3, 6), (9, 2)], ids=str)
def test_offsets_beyond_32_bits(size: tuple[int, int]) -> None:
    """Rows 2³¹ / 16 elements apart, in memory never touched: a product of 32 bits would read elsewhere.

    In 9 rows of 2 a tile begins at token 16; in 3 rows of 6 such tokens are inside a tile.
    """
    step = 2**31 // 16 + 8
    storage = torch.empty(17 * step + 16, dtype=torch.float16)
    x = storage.as_strided((1, 1, 18, 16), (0, 0, step, 1))
    small = testing.make_input((1, 1, 18, 16), dtype=torch.float16, seed=1)
    x.copy_(small)
    groups = [(layouts.row_column(*size).key, [0])]
    wanted, lse = launch_sparse_forward(small, small, small, groups, scale=0.25, config=SMALL)
    got, _ = launch_sparse_forward(x, x, x, groups, scale=0.25, config=SMALL)
    assert torch.equal(got, wanted)
    configs = {"key_config": SMALL, "query_config": SMALL}
    grads = launch_sparse_backward(x, x, x, x, got, lse, groups, scale=0.25, **configs)
    true = launch_sparse_backward(small, small, small, small, got, lse, groups, scale=0.25, **configs)
    assert all(torch.equal(a, b) for a, b in zip(grads, true, strict=True))
    row, _ = launch_sparse_decode(small[:, :, -1:], x, x, 18, groups, scale=0.25, config=SMALL)
    torch.testing.assert_close(row, wanted[:, :, -1:])


def decode_oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], each: Sequence[SparseLayout]) -> Tensor:
    """Row by row: the attention of one query over the keys that its pattern lists."""
    out = torch.zeros_like(q)
    for b, n in enumerate(lengths):
        for h, layout in enumerate(each):
            if n:
                keys = layout.dense_mask()[n - 1].nonzero()[:, 0]
                keys = keys[keys < n]
                one = (slice(b, b + 1), slice(h, h + 1))
                out[one] = attention_reference(q[one], k[one][:, :, keys], v[one][:, :, keys], causal=False, scale=0.3)[0]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 96])
@pytest.mark.parametrize("text", ["local2d:2", "row_column", "strided:5", "fixed:6,2", "local2d:1+column"])
def test_decode(text: str, head_dim: int, dtype: torch.dtype) -> None:
    """Everything that the pattern does not show is NaN: it may not even be read into the result."""
    layout = layouts.parse(text, 9, 8)
    each = [layout, layouts.local2d(9, 8, 1)]
    groups = groups_of(check_layout(each, heads=2, tokens=None), 2)
    q = testing.make_input((2, 2, 1, head_dim), dtype=dtype, seed=1, memory="heads_last")
    k, v = (testing.make_input((2, 2, 80, head_dim), dtype=dtype, seed=seed, memory="fused_qkv") for seed in (2, 3))
    for length in (0, 1, 40, torch.tensor([72, 33])):
        lengths = [length] * 2 if isinstance(length, int) else length.tolist()
        not_visible = torch.ones(2, 2, 80, dtype=torch.bool)
        for b, n in enumerate(lengths):
            for h, one in enumerate(each):
                if n:
                    not_visible[b, h, : one.tokens] = ~one.dense_mask()[n - 1]
        ck, cv = (x.masked_fill(not_visible[..., None], math.nan) for x in (k, v))
        with testing.GuardBands() as guards:
            out, _ = launch_sparse_decode(q, ck, cv, length, groups, scale=0.3, config=SMALL)
        assert guards.check() >= 2
        exact = decode_oracle(q.double(), k.double(), v.double(), lengths, each)
        eager = decode_oracle(q, k, v, lengths, each)
        testing.error_ratio(out, exact, eager, factor=2, floor=4 * float(v.abs().max()), name="decode")


def test_decode_clamps_lengths_to_the_image() -> None:
    groups = [(layouts.row_column(4, 5).key, [0])]
    q, k, v = (testing.make_input((2, 1, n, 16), dtype=torch.float32, seed=n) for n in (1, 20, 20))
    out, _ = launch_sparse_decode(q, k, v, torch.tensor([1000, -3]), groups, scale=1.0, config=SMALL)
    exact, _ = launch_sparse_decode(q, k, v, torch.tensor([20, 0]), groups, scale=1.0, config=SMALL)
    assert torch.equal(out, exact)


def test_decode_splits_long_lists() -> None:
    layout = layouts.fixed(40, 8, 8, 4)
    groups = [(layout.key, [0, 1])]
    q = testing.make_input((1, 2, 1, 16), dtype=torch.float32, seed=1)
    k, v = (testing.make_input((1, 2, 320, 16), dtype=torch.float32, seed=seed) for seed in (2, 3))
    for length in (1, 77, 320):
        out, _ = launch_sparse_decode(q, k, v, length, groups, scale=0.3, config=SMALL)
        exact = decode_oracle(q.double(), k.double(), v.double(), [length], [layout, layout])
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_decode_is_causal_without_a_causal_pattern() -> None:
    """A cache holds what was drawn so far, whatever else a pattern would show."""
    layout = layouts.local2d(6, 7, 3, causal=False)
    q = testing.make_input((1, 1, 1, 16), dtype=torch.float32, seed=1)
    k, v = (testing.make_input((1, 1, 42, 16), dtype=torch.float32, seed=seed) for seed in (2, 3))
    k[:, :, 20:], v[:, :, 20:] = math.nan, math.nan
    out, _ = launch_sparse_decode(q, k, v, 20, [(layout.key, [0])], scale=0.3, config=SMALL)
    exact = decode_oracle(q.double(), k.double(), v.double(), [20], [layout])
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
