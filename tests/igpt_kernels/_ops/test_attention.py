"""The registered operators: schemas, fakes, derivatives, compilation, checkpointing, autocast, costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from igpt_kernels import testing
from igpt_kernels._ops import attention, decode
from igpt_kernels._torch.attention import merge
from igpt_kernels.attention import decode_attention, flash_attention
from igpt_kernels.reference import attention_reference, decode_attention_reference
from tests import kit, operators

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1, 1, 1, 1), (2, 3, 9, 16), (1, 2, 33, 24), (2, 1, 1, 8), (0, 2, 4, 8), (2, 2, 0, 8)]


def leaves(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    return [testing.make_input(shape, dtype=dtype, seed=seed, memory=layout).requires_grad_() for seed in range(3)]


# Each layout with every shape, and each dtype once: opcheck takes a second or two a case.
CASES = [(shape, layout, torch.float32) for shape in SHAPES[:3] for layout in testing.MEMORY_FORMATS]
CASES += [(shape, "contiguous", torch.float32) for shape in SHAPES[3:]] + [
    (SHAPES[1], "fused_qkv", dtype) for dtype in DTYPES[1:]
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=str)
def test_opcheck_flash(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    q, k, v = leaves(shape, dtype, layout)
    for causal, keys in ((False, k.shape[2]), (True, max(0, k.shape[2] - 2))):
        torch.library.opcheck(attention.flash_forward, (q, k[:, :, :keys], v[:, :, :keys], causal, 0.3, "torch"))
    out, lse = attention.flash_forward(q, k, v, True, 0.3, "torch")
    torch.library.opcheck(
        attention.flash_backward, (q.detach(), q.detach(), k.detach(), v.detach(), out.detach(), lse, True, 0.3, "torch")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, torch.float32) for layout in testing.MEMORY_FORMATS] + [("contiguous", dtype) for dtype in DTYPES[1:]],
    ids=str,
)
def test_opcheck_decode(layout: str, dtype: torch.dtype) -> None:
    q = testing.make_input((2, 3, 1, 16), dtype=dtype, seed=0, memory=layout).requires_grad_()
    k, v = (testing.make_input((2, 3, 9, 16), dtype=dtype, seed=seed, memory=layout).requires_grad_() for seed in (1, 2))
    for lengths, length in ((None, 9), (None, 0), (torch.tensor([9, 0]), 0)):
        for backend in ("torch", "ext") if dtype != torch.float64 else ("torch",):
            torch.library.opcheck(decode.decode, (q, k, v, lengths, length, 0.3, backend))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (17, 17), (5, 30), (30, 5), (1, 12), (64, 65), (130, 130)])
def test_budget_and_lse(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    q = testing.make_input((2, 2, queries, 24), dtype=dtype, seed=1, memory="fused_qkv")
    k, v = (testing.make_input((2, 2, keys, 24), dtype=dtype, seed=seed, memory="fused_qkv") for seed in (2, 3))
    grad = testing.make_input(q.shape, dtype=dtype, seed=4, memory="stepped")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention.flash_forward(q, k, v, causal, 0.3, "torch")

    found = kit.compare_attention(ours, (q, k, v), causal=causal, scale=0.3, grad=grad)
    assert found.outputs[1].dtype == torch.float32


def test_merge_of_disjoint_keys() -> None:
    q, k, v = (x.detach() for x in leaves((2, 2, 9, 16), torch.float64, "contiguous"))
    whole = attention_reference(q, k, v, causal=False, scale=0.3)
    parts = [attention_reference(q, k[:, :, cut], v[:, :, cut], causal=False, scale=0.3) for cut in (slice(4), slice(4, None))]
    nothing = (torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype))
    for got, want in (
        (merge(*parts[0], *parts[1]), whole),
        (merge(*whole, *nothing), whole),
        (merge(*nothing, *nothing), nothing),
    ):
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_flash(queries: int, keys: int, causal: bool) -> None:
    q = leaves((1, 2, queries, 3), torch.float64, "contiguous")[0]
    k, v = leaves((1, 2, keys, 3), torch.float64, "contiguous")[1:]
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, causal=causal), (q, k, v))


@pytest.mark.parametrize("length", [0, 3, 5, torch.tensor([5, 0]), torch.tensor([2, 4])], ids=str)
def test_gradcheck_decode(length: int | Tensor) -> None:
    q = leaves((2, 1, 1, 3), torch.float64, "contiguous")[0]
    k, v = leaves((2, 1, 5, 3), torch.float64, "contiguous")[1:]
    assert torch.autograd.gradcheck(lambda *x: decode_attention(*x, length), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: decode_attention(*x, length), (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_decode_gradients_are_within_the_budget(dtype: torch.dtype) -> None:
    q = testing.make_input((2, 2, 1, 24), dtype=dtype, seed=1)
    k, v = (testing.make_input((2, 2, 50, 24), dtype=dtype, seed=seed) for seed in (2, 3))
    grad = testing.make_input(q.shape, dtype=dtype, seed=4)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention_reference(q, k, v, 40, scale=0.3)

    exact = testing.attention_result(oracle, [x.double() for x in (q, k, v)], grad.double())
    eager = testing.attention_result(oracle, (q, k, v), grad)
    ours = testing.attention_result(lambda *x: decode_attention(*x, 40, scale=0.3), (q, k, v), grad)
    testing.check_attention(ours, exact, eager)


def test_decode_gradients_ignore_the_rest_of_the_cache() -> None:
    q = leaves((2, 1, 1, 8), torch.float32, "contiguous")[0]
    k, v = (torch.full((2, 1, 5, 8), math.nan) for _ in range(2))
    k[:, :, :3], v[:, :, :3] = 1.0, 2.0
    k.requires_grad_()
    v.requires_grad_()
    for length in (3, torch.tensor([3, 2])):
        grads = torch.autograd.grad(decode_attention(q, k, v, length).sum(), (q, k, v))
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert (grads[1][:, :, 3:] == 0).all()


def test_second_derivative_is_a_clear_error_and_saved_tensors_serve_twice() -> None:
    q, k, v = leaves((1, 2, 9, 8), torch.float32, "contiguous")
    out = flash_attention(q, k, v)
    first = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        dq.sum().backward()


def test_lse_is_not_differentiable() -> None:
    q, k, v = leaves((1, 2, 9, 8), torch.float32, "contiguous")
    _, lse = attention.flash_forward(q, k, v, True, 0.3, "torch")
    assert not lse.requires_grad


def test_backward_is_the_same_bit_for_bit() -> None:
    operators.check_same_bits(flash_attention, leaves((2, 3, 70, 24), torch.float32, "fused_qkv"))


def test_compile_without_breaks_and_once_for_all_lengths() -> None:
    operators.check_compiled(flash_attention, [leaves((2, 2, tokens, 16), torch.float32, "contiguous") for tokens in (33, 50)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    x = leaves((2, 2, 17, 16), torch.float32, "contiguous")
    operators.check_checkpointing(flash_attention, x, reentrant=reentrant)


def test_autocast_takes_its_dtype() -> None:
    q, k, v = leaves((2, 2, 17, 16), torch.float32, "contiguous")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attention(q, k.bfloat16(), v)
        assert decode_attention(q[:, :, -1:], k, v, 17).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flash_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize(("queries", "keys", "causal"), [(9, 9, True), (9, 9, False), (4, 9, True), (9, 4, True)])
def test_operations_are_counted_by_visible_pairs(queries: int, keys: int, causal: bool) -> None:
    q = leaves((2, 3, queries, 8), torch.float32, "contiguous")[0]
    k, v = leaves((2, 3, keys, 8), torch.float32, "contiguous")[1:]
    visible = torch.ones(queries, keys).tril(keys - queries) if causal else torch.ones(queries, keys)
    unit = 2 * 3 * 8 * int(visible.sum())
    with FlopCounterMode(display=False) as counter:
        out = flash_attention(q, k, v, causal=causal)
    assert counter.get_total_flops() == 4 * unit
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * unit
    with FlopCounterMode(display=False) as counter:
        decode_attention(q[:, :, :1], k, v, 3)
    assert counter.get_total_flops() == 4 * 2 * 3 * 8 * 3
