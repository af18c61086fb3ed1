"""The attention kernels in Triton's interpreter, on the CPU, against the oracle in float64.

Runs in a process of its own with TRITON_INTERPRET=1 (tests/igpt_kernels/_triton/test_interpreter.py starts it): kernels are
interpreted or compiled from the moment they are decorated. bfloat16 tiles are widened after the load, because the
interpreter's bfloat16 products are wrong (triton-lang/triton#11584).
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from igpt_kernels import testing
from igpt_kernels._triton.attention_backward import launch_flash_backward, launch_flash_delta
from igpt_kernels._triton.attention_forward import launch_flash_forward
from igpt_kernels._triton.common import place_tile, split_head_dim
from igpt_kernels._triton.decode import launch_decode
from igpt_kernels._triton.descriptors import read_by
from igpt_kernels.reference import attention_reference, decode_attention_reference
from igpt_kernels.tuning import Config
from tests import kit

SMALL = Config(32, 16, 4, 1)
WIDE = Config(16, 32, 4, 1)
DTYPES = kit.DTYPES


class Flash(torch.autograd.Function):
    """The two launchers as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, config):  # type: ignore[no-untyped-def]
        out, lse = launch_flash_forward(q, k, v, causal=causal, scale=scale, config=config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = causal, scale, config
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        causal, scale, config = ctx.how
        swapped = replace(config, block_m=config.block_n, block_n=config.block_m)
        grads = launch_flash_backward(
            grad, *ctx.saved_tensors, causal=causal, scale=scale, key_config=config, query_config=swapped
        )
        return *grads, None, None, None


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    config: Config = SMALL,
    seed: int = 9,
    far: float = 1.0,
) -> None:
    """Out, lse and gradients of the kernels within their budgets, with nothing written outside of the outputs.

    `far` is how much larger than 1 the keys are after scaling: dQ sums them with weights that cancel.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    grad = testing.make_input(q.shape, dtype=q.dtype, seed=seed)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return Flash.apply(q, k, v, causal, scale, config)

    guarded = 6 if q.numel() and k.numel() else 0
    kit.compare_attention(ours, (q, k, v), causal=causal, scale=scale, grad=grad, guarded=guarded, far=far)


SIZES = [
    (1, 1),
    (2, 2),
    (15, 15),
    (16, 16),
    (17, 17),
    (31, 33),
    (32, 32),
    (33, 31),
    (47, 47),
    (64, 64),
    (65, 65),
    (1, 40),
    (40, 1),
    (5, 67),
    (67, 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_sizes(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    q = testing.make_input((1, 2, queries, 24), dtype=dtype, seed=1, memory="offset")
    k, v = (testing.make_input((1, 2, keys, 24), dtype=dtype, seed=seed, memory="fused_qkv") for seed in (2, 3))
    compare(q, k, v, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 16, 17, 32, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (testing.make_input((1, 1, 37, head_dim), dtype=dtype, seed=seed, memory="heads_last") for seed in range(3))
    compare(q, k, v, causal=True)


@pytest.mark.parametrize("layouts", [(a, b) for a in testing.MEMORY_FORMATS for b in testing.MEMORY_FORMATS], ids="-".join)
def test_strides(layouts: tuple[str, str]) -> None:
    first, second = layouts
    q = testing.make_input((2, 3, 19, 24), dtype=torch.float32, seed=1, memory=first)
    k = testing.make_input((2, 3, 23, 24), dtype=torch.float32, seed=2, memory=second)
    v = testing.make_input((2, 3, 23, 24), dtype=torch.float32, seed=3, memory=first)
    compare(q, k, v, causal=True)


@pytest.mark.parametrize("config", [Config(m, n, 4, 1) for m in (16, 32, 64) for n in (16, 32, 64)], ids=str)
@pytest.mark.parametrize("tokens", [50, 64, 97])
def test_tiles(config: Config, tokens: int) -> None:
    q, k, v = (testing.make_input((1, 2, tokens, 16), dtype=torch.float32, seed=seed) for seed in range(3))
    compare(q, k, v, causal=True, config=config)
    compare(q, k[:, :, :-7], v[:, :, :-7], causal=True, config=config)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype"),
    [(40, 40, 64, torch.bfloat16), (37, 52, 96, torch.float16), (52, 17, 24, torch.float16), (1, 33, 128, torch.bfloat16)],
    ids=str,
)
def test_descriptors(queries: int, keys: int, head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    # Two heads side by side in memory: a box that reached beyond the last row would read the next head.
    q = testing.make_input((2, 2, queries, head_dim), dtype=dtype, seed=1)
    k, v = (testing.make_input((2, 2, keys, head_dim), dtype=dtype, seed=seed, memory="fused_qkv") for seed in (2, 3))
    config = Config(32, 16, 4, 3, descriptors=True)
    assert read_by(config, (q, k, v), [(1, 16)] * 3, (queries, keys, keys), (16, 0))[0]
    compare(q, k, v, causal=causal, config=config)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("causal", [True, False])
def test_scales(scale: float, causal: bool) -> None:
    q, k, v = (testing.make_input((1, 2, 33, 16), dtype=torch.float32, seed=seed) for seed in range(3))
    compare(q, k, v, causal=causal, scale=scale)


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_scores_far_from_zero(shift: float) -> None:
    """The running maximum: scores of ±1000 overflow exp2 without it."""
    q, k, v = (testing.make_input((1, 1, 40, 16), dtype=torch.float32, seed=seed) for seed in range(3))
    compare(q + shift / 16, k * 4 + shift, v, causal=True, far=18.0)  # |k| < 72, scale 1/4


@pytest.mark.parametrize("seed", range(120))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed)
    queries, keys = rng.randint(1, 60), rng.randint(1, 60)
    batch, heads, head_dim = rng.randint(1, 2), rng.randint(1, 2), rng.choice([3, 16, 20, 32, 40, 64, 96])
    dtype = rng.choice(DTYPES)
    config = Config(rng.choice([16, 32]), rng.choice([16, 32]), 4, 1)
    layouts = [rng.choice(testing.MEMORY_FORMATS) for _ in range(3)]
    shapes = [(batch, heads, count, head_dim) for count in (queries, keys, keys)]
    q, k, v = (
        testing.make_input(shape, dtype=dtype, seed=seed * 3 + i, memory=layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    )
    compare(q, k, v, causal=rng.random() < 0.7, config=config, seed=seed + 1000)


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    compare(x, x, x, causal=True)


def test_no_keys() -> None:
    q, k = torch.ones(1, 2, 5, 16), torch.ones(1, 2, 0, 16)
    out, lse = launch_flash_forward(q, k, k, causal=False, scale=1.0, config=SMALL)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    grads = launch_flash_backward(out, q, k, k, out, lse, causal=False, scale=1.0, key_config=SMALL, query_config=SMALL)
    assert (grads[0] == 0).all()


def test_not_a_number_stays_in_its_row() -> None:
    q, k, v = (testing.make_input((1, 1, 40, 16), dtype=torch.float32, seed=seed) for seed in range(3))
    clean, _ = launch_flash_forward(q, k, v, causal=True, scale=0.25, config=SMALL)
    q[0, 0, 21] = math.nan
    dirty, lse = launch_flash_forward(q, k, v, causal=True, scale=0.25, config=SMALL)
    assert dirty[0, 0, 21].isnan().all()
    assert lse[0, 0, 21].isnan()
    keep = torch.arange(40) != 21
    assert torch.equal(dirty[:, :, keep], clean[:, :, keep])


def test_gradient_of_any_strides() -> None:
    q, k, v = (testing.make_input((2, 2, 19, 16), dtype=torch.float32, seed=seed) for seed in range(3))
    out, lse = launch_flash_forward(q, k, v, causal=True, scale=0.25, config=SMALL)

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        return launch_flash_backward(grad, q, k, v, out, lse, causal=True, scale=0.25, key_config=SMALL, query_config=WIDE)

    wanted = backward(torch.ones(2, 2, 19, 16))
    for got, want in zip(backward(torch.ones(()).expand(2, 2, 19, 16)), wanted, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(
        backward(testing.make_input(q.shape, dtype=torch.float32, seed=5, memory="stepped")),
        backward(testing.make_input(q.shape, dtype=torch.float32, seed=5)),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_delta_is_the_row_sum() -> None:
    for head_dim in (1, 24, 96, 256):
        grad, out = (testing.make_input((2, 3, 77, head_dim), dtype=torch.float32, seed=i, memory="stepped") for i in range(2))
        torch.testing.assert_close(launch_flash_delta(grad, out), (grad * out).sum(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("longest", [1, 17, 33, 64, 130])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 96])
def test_decode(head_dim: int, longest: int, splits: int, dtype: torch.dtype) -> None:
    shape = (3, 1, longest, head_dim)
    q = testing.make_input((3, 1, 1, head_dim), dtype=dtype, seed=1, memory="heads_last")
    k, v = (testing.make_input(shape, dtype=dtype, seed=seed, memory="fused_qkv") for seed in (2, 3))
    config = Config(1, 16, 4, 1)
    scale = 1 / math.sqrt(head_dim)
    for length in (0, longest // 2, torch.tensor([longest, 1, longest // 2])):
        lengths = [length] * 3 if isinstance(length, int) else length.tolist()
        ck, cv = k.clone(), v.clone()
        for b, n in enumerate(lengths):
            ck[b, :, n:], cv[b, :, n:] = math.nan, math.nan
        with testing.GuardBands() as guards:
            out, lse = launch_decode(q, ck, cv, length, scale=scale, config=config, splits=splits)
        assert guards.check() >= 2
        exact = decode_attention_reference(q.double(), k.double(), v.double(), length)
        eager = decode_attention_reference(q, k, v, length)
        # The kernel's sums are float32 whatever the dtype: their rounding, of sums of up to max|v|, is the floor.
        testing.error_ratio(out, exact, eager, factor=2, floor=4 * float(v.abs().max()), name="decode")
        for b, n in enumerate(lengths):
            _, true = attention_reference(
                q[b : b + 1].double(), k[b : b + 1, :, :n].double(), v[b : b + 1, :, :n].double(), causal=False
            )
            torch.testing.assert_close(lse[b : b + 1].double(), true, atol=1e-5, rtol=1e-5)


def test_decode_clamps_lengths_to_the_cache() -> None:
    q, k, v = (testing.make_input((2, 1, n, 16), dtype=torch.float32, seed=n) for n in (1, 20, 20))
    out, _ = launch_decode(q, k, v, torch.tensor([1000, -3]), scale=1.0, config=Config(1, 16, 4, 1), splits=2)
    exact, _ = launch_decode(q, k, v, torch.tensor([20, 0]), scale=1.0, config=Config(1, 16, 4, 1), splits=2)
    assert torch.equal(out, exact)


def test_decode_is_the_last_row_of_flash_attention() -> None:
    q, k, v = (testing.make_input((2, 2, 50, 64), dtype=torch.float32, seed=seed) for seed in range(3))
    flash, _ = launch_flash_forward(q, k, v, causal=True, scale=0.125, config=SMALL)
    row, _ = launch_decode(q[:, :, -1:], k, v, 50, scale=0.125, config=Config(1, 16, 4, 1))
    torch.testing.assert_close(row, flash[:, :, -1:])


def test_offsets_beyond_32_bits() -> None:
    """Rows 2³¹ elements apart, in memory never touched: a 32-bit product would read (or write) elsewhere."""
    step = 2**31 // 16 + 8
    storage = torch.empty(17 * step + 16, dtype=torch.float16)
    x = storage.as_strided((1, 1, 17, 16), (0, 0, step, 1))
    small = testing.make_input((1, 1, 17, 16), dtype=torch.float16, seed=1)
    x.copy_(small)
    wanted, _ = launch_flash_forward(small, small, small, causal=True, scale=0.25, config=SMALL)
    got, lse = launch_flash_forward(x, x, x, causal=True, scale=0.25, config=SMALL)
    assert torch.equal(got, wanted)
    grads = launch_flash_backward(x, x, x, x, got, lse, causal=True, scale=0.25, key_config=SMALL, query_config=SMALL)
    true = launch_flash_backward(
        small, small, small, small, got, lse, causal=True, scale=0.25, key_config=SMALL, query_config=SMALL
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, true, strict=True))
    row, _ = launch_decode(small[:, :, -1:], x, x, 17, scale=0.25, config=Config(1, 16, 4, 1))
    torch.testing.assert_close(row, wanted[:, :, -1:])


def test_every_tile_of_every_head_has_one_program() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def place(Out, tiles, heads, group, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
        tile, head = place_tile(tl.program_id(0), tiles, heads, group, LAST)
        tl.store(Out + head * tiles + tile, tl.program_id(0))

    for tiles, heads, group, last in [(5, 7, 3, True), (4, 6, 6, True), (1, 5, 2, False), (9, 1, 1, True), (3, 8, 4, False)]:
        out = torch.full((heads, tiles), -1, dtype=torch.int32)
        place[(tiles * heads,)](out, tiles, heads, group, LAST=last)
        assert sorted(out.flatten().tolist()) == list(range(tiles * heads))
        first = out[0].argsort().tolist()
        assert first == sorted(first, reverse=last)


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float32), (96, torch.bfloat16)], ids=str)
def test_a_whole_head(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = kit.qkv((1, 2, 41, head_dim), dtype, "offset")
    compare(q, k, v, causal=True, config=Config(32, 16, 4, 1, whole_head=True))


def test_a_whole_head_is_one_part() -> None:
    assert [split_head_dim(size, whole=True) for size in (1, 80, 96, 128, 160)] == [
        (16, 0),
        (128, 0),
        (128, 0),
        (128, 0),
        (256, 0),
    ]


def test_head_dims_are_cut_with_little_padding() -> None:
    assert split_head_dim(96) == (64, 32)
    assert split_head_dim(80) == (64, 16)
    assert split_head_dim(64) == (64, 0)
    for head_dim in range(1, 257):
        part_a, part_b = split_head_dim(head_dim)
        assert part_a + part_b >= head_dim
        assert part_a >= 16
        assert part_b == 0 or part_b >= 16
        assert part_a + part_b <= max(16, 2 ** math.ceil(math.log2(head_dim)))
