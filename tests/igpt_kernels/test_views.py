"""Every operand of every operation may be any view: rows that overlap, steps of 0, negated memory, odd strides of size 1."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from igpt_kernels import (
    block_sparse_attention,
    decode_attention,
    flash_attention,
    layouts,
    linear_cross_entropy,
    quick_gelu,
    rms_norm,
)

LAYOUT = layouts.local2d(4, 6, 1)
B, H, T, D, C, V = 2, 3, 24, 8, 12, 7


def as_strided(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """A view with strides at random, 0 and overlaps among them."""
    strides = [rng.choice([0, 1, 1, 2, 3, size, size + 1]) for size in shape]
    offset = rng.randrange(4)
    need = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.randn(max(need, 1)).as_strided(shape, strides, offset)


def window(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """Rows of a sliding window: each begins one value behind the one before."""
    if len(shape) < 2:
        return torch.randn(shape)
    return torch.randn(*shape[:-2], shape[-2] + shape[-1] - 1).unfold(-1, shape[-1], 1)


def expanded(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    dim = rng.randrange(len(shape))
    return torch.randn([1 if i == dim else size for i, size in enumerate(shape)]).expand(shape)


def permuted(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    order = rng.sample(range(len(shape)), len(shape))
    back = [order.index(i) for i in range(len(shape))]
    return torch.randn([shape[i] for i in order]).permute(back)


def stepped(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    steps = [rng.choice([1, 2, 3]) for _ in shape]
    whole = torch.randn([size * step for size, step in zip(shape, steps, strict=True)])
    return whole[tuple(slice(None, None, step) for step in steps)]


def negated(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    """The imaginary part of a conjugate: torch keeps the sign as a bit."""
    part = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert part.is_neg()
    return part


VIEWS = [as_strided, as_strided, window, expanded, permuted, stepped, negated]

OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "flash": (flash_attention, [(B, H, T, D)] * 3),
    "flash, all keys": (lambda *x, **o: flash_attention(*x, causal=False, **o), [(B, H, T, D)] * 3),
    "flash, fewer queries": (flash_attention, [(B, H, 5, D), (B, H, T, D), (B, H, T, D)]),
    "flash, more queries": (flash_attention, [(B, H, T, D), (B, H, 5, D), (B, H, 5, D)]),
    "flash, one token": (flash_attention, [(B, H, 1, D)] * 3),
    "sparse": (lambda *x, **o: block_sparse_attention(*x, LAYOUT, **o), [(B, H, T, D)] * 3),
    "decode": (lambda *x, **o: decode_attention(*x, 13, **o), [(B, H, 1, D), (B, H, T, D), (B, H, T, D)]),
    "decode, lengths": (
        lambda *x, **o: decode_attention(*x, torch.tensor([5, 20]), **o),
        [(B, H, 1, D), (B, H, T, D), (B, H, T, D)],
    ),
    "decode, layout": (
        lambda *x, **o: decode_attention(*x, 13, layout=LAYOUT, **o),
        [(B, H, 1, D), (B, H, T, D), (B, H, T, D)],
    ),
    "norm": (lambda x, w, **o: rms_norm(x, w, **o), [(B, T, C), (C,)]),
    "norm of a sum": (lambda x, w, r, **o: sum(rms_norm(x, w, residual=r, **o)), [(B, T, C), (C,), (B, T, C)]),
    "gelu": (lambda x, b, **o: quick_gelu(x, bias=b, **o), [(B, T, C), (C,)]),
    "loss": (
        lambda h, w, **o: linear_cross_entropy(h, w, torch.arange(B * T).view(B, T) % V, **o),
        [(B, T, C), (V, C)],
    ),
    "loss of each row": (
        lambda h, w, **o: linear_cross_entropy(h, w, torch.arange(B * T).view(B, T) % V, reduction="none", **o),
        [(B, T, C), (V, C)],
    ),
}


CASES = [(name, "auto") for name in OPERATIONS]
CASES += [(name, "torch") for name in OPERATIONS if name.startswith(("decode", "loss"))]  # "auto" takes C++


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_any_view_of_any_operand(name: str, backend: str) -> None:
    function, shapes = OPERATIONS[name]
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        views = [rng.choice(VIEWS)(shape, rng) for shape in shapes]
        leaves = [view.detach().requires_grad_() for view in views]
        exact = [view.double().contiguous().requires_grad_() for view in views]
        out, want = function(*leaves, backend=backend), function(*exact, backend="reference")
        torch.testing.assert_close(out, want.float(), rtol=1e-4, atol=1e-4)
        grad = rng.choice(VIEWS)(tuple(out.shape), rng) if out.dim() else torch.randn(())
        found = torch.autograd.grad(out, leaves, grad)
        for mine, true in zip(found, torch.autograd.grad(want, exact, grad.double()), strict=True):
            scale = max(1.0, float(true.abs().max()))
            assert float((mine - true).abs().max()) < 1e-4 * scale * math.sqrt(T), name
