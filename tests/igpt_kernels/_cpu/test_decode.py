"""Decoding in C++: budgets, memory, layouts. What all backends must do is in test_attention.py and test_sparse.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_kernels import backends, decode_attention, layouts, testing
from igpt_kernels._cpu.decode import decode, sparse_decode
from igpt_kernels.reference import attention_reference
from tests import kit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, memory: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,1,D], k and v [B,H,T,D]."""
    batch, heads, _, head_dim = shape
    q = testing.make_input((batch, heads, 1, head_dim), dtype=dtype, seed=1, memory=memory)
    k, v = (testing.make_input(shape, dtype=dtype, seed=seed, memory=memory) for seed in (2, 3))
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 24, 64, 72, 96, 128, 200, 256])
@pytest.mark.parametrize("tokens", [1, 2, 5, 255, 256, 257, 1100])
def test_budget(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = tensors((3, 2, tokens, head_dim), dtype, "heads_last" if tokens % 2 else "stepped")
    for length in (tokens, (tokens + 1) // 2, torch.tensor([0, tokens, tokens // 2])):
        kit.compare_decode(decode_attention(q, k, v, length, backend="ext"), q, k, v, length)


@pytest.mark.parametrize("memory", testing.MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp(memory: str, dtype: torch.dtype) -> None:
    q, k, v = tensors((2, 3, 700, 40), dtype, memory)
    for length in (700, torch.tensor([1, 600])):
        out, lse = decode(q, k, v, length, -0.3)
        assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (2, 3, 1))
        for b, n in enumerate([length] * 2 if isinstance(length, int) else length.tolist()):
            some = (x[b : b + 1].double() for x in (q, k[:, :, :n], v[:, :, :n]))
            exact = attention_reference(*some, causal=False, scale=-0.3)[1]
            torch.testing.assert_close(lse[b : b + 1].double(), exact, atol=1e-5, rtol=1e-5)


class Made(TorchDispatchMode):
    """Values in the largest tensor that an operation made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        memory = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in memory:
                self.values = max(self.values, x.numel())
        return out


def test_caches_are_not_copied() -> None:
    """Nor a part of them: of a view, with lengths, with a layout for each head."""
    q, k, v = tensors((4, 3, 800, 64), memory="heads_last")
    groups = [(layouts.row(40, 20).key, (0, 2)), (layouts.column(40, 20).key, (1,))]
    lengths = torch.tensor([800, 0, 1, 500], dtype=torch.int32)
    for length in (790, lengths):
        with Made() as made:
            decode(q, k, v, length, 0.1)
            sparse_decode(q, k, v, length, groups, 0.1)
        assert made.values <= 4 * 800  # which tokens each sequence sees


def test_defaults_of_torch_do_not_matter() -> None:
    q, k, v = tensors((2, 3, 60, 16))
    groups = [(layouts.row(6, 10).key, (0, 2)), (layouts.column(6, 10).key, (1,))]
    for length in (50, 0, torch.tensor([7, 50])):
        want = [*decode(q, k, v, length, 0.3), *sparse_decode(q, k, v, length, groups, 0.3)]
        try:
            torch.set_default_device("meta")
            got = [*decode(q, k, v, length, 0.3), *sparse_decode(q, k, v, length, groups, 0.3)]
        finally:
            torch.set_default_device(None)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_with_gaps_inside_are_copied() -> None:
    q, k, v = tensors((2, 3, 50, 24))
    want = decode(q, k, v, 40, 0.3)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert turned[1].stride(3) != 1
    for got, true in zip(decode(*turned, 40, 0.3), want, strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layout_for_each_head(dtype: torch.dtype) -> None:
    each = [layouts.local2d(9, 8, 2), layouts.strided(9, 8), layouts.local2d(9, 8, 2), layouts.dense(9, 8)]
    q, k, v = tensors((2, 4, 80, 16), dtype)
    for length in (72, 30, 1, 0, torch.tensor([72, 9]), torch.tensor([0, 1])):
        kit.compare_decode(decode_attention(q, k, v, length, layout=each, backend="ext"), q, k, v, length, layout=each)


def test_patterns_that_see_ahead_end_with_the_cache() -> None:
    layout = layouts.local2d(6, 5, 2, causal=False)
    q, k, v = tensors((2, 2, 30, 16))
    for length in (1, 5, 12, 30, torch.tensor([3, 20])):
        kit.compare_decode(decode_attention(q, k, v, length, layout=layout, backend="ext"), q, k, v, length, layout=layout)


def test_auto_takes_it_and_float64_does_not() -> None:
    q, k, v = tensors((2, 2, 300, 16), torch.bfloat16)
    assert backends.select("decode_attention", "auto", (q, k, v), 16) == "ext"
    assert torch.equal(decode_attention(q, k, v, 290), decode_attention(q, k, v, 290, backend="ext"))
    assert backends.select("decode_attention", "auto", (q.double(),), 16) == "torch"
    with pytest.raises(backends.BackendUnavailable, match=r"ext: dtype torch.float64 is not one of"):
        decode_attention(q.double(), k.double(), v.double(), 3, backend="ext")
