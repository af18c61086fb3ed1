"""The small cases of `igpt_kernels.self_check`: what each step of an operation runs on, and its oracle.

Sizes of memory are multiples of 16 where the head dim is one. Kernels then compile as they do for a model, and are compiled
once. Values come from generators of their own, so the user's random state stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igpt_kernels import layouts, reference, testing
from igpt_kernels.checks import check_layout

Load = Callable[[str], Callable[..., Any]]
ROWS = 203
"""Rows of a case: odd, and more than one tile of every configuration."""
HEIGHT, WIDTH = 14, 15
IGNORED = -100
WIDEST = 8192


def _values(*size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def _compare(
    ours: Sequence[Tensor],
    ours_gradients: Sequence[Tensor],
    oracle: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor | None = None,
    *,
    output_floor: float = 0.0,
    floor: float = 0.0,
) -> None:
    """Compare an output and gradients with the oracle on the CPU, at float64 and at the dtype of the inputs."""

    def run(dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = [x.detach().to(dtype).requires_grad_(grad is not None) for x in inputs]
        out = oracle(*leaves)
        return out.detach(), () if grad is None else torch.autograd.grad(out, leaves, grad.to(out.dtype))

    (exact, exact_gradients), (eager, eager_gradients) = run(torch.float64), run(inputs[0].dtype)
    for mine in ours:
        testing.error_ratio(mine.cpu(), exact, eager, factor=testing.OUTPUT_FACTOR, floor=output_floor, name="the output")
    for number, (mine, true, low) in enumerate(zip(ours_gradients, exact_gradients, eager_gradients, strict=True)):
        name = f"the gradient of input {number}"
        testing.error_ratio(mine.cpu(), true, low, factor=testing.GRADIENT_FACTOR, floor=floor, name=name)


def _heads(tokens: int, dtype: torch.dtype, size: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the output's gradient on the CPU and on the device: one sequence, two heads."""
    made = [_values(1, 2, tokens, size, dtype=dtype, seed=seed) for seed in range(4)]
    return made, [x.to(device) for x in made]


def _dense(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    scale = size**-0.5
    (q, k, v, grad), moved = _heads(ROWS, dtype, size, device)
    floor = testing.cancelling_terms(q, k, v, grad, scale)
    for causal in (True, False):

        def oracle(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return reference.attention_reference(q, k, v, causal=causal, scale=scale)[0]

        out, lse = load("forward")(*moved[:3], causal, scale)
        gradients = load("backward")(moved[3], *moved[:3], out, lse, causal, scale)
        _compare([out], gradients, oracle, [q, k, v], grad, floor=floor)


def _patterns() -> tuple[Sequence[layouts.SparseLayout], Any]:
    """A head whose pattern is one part and one with two parts, and both as a launcher takes them."""
    each = [layouts.parse("local2d:3", HEIGHT, WIDTH), layouts.parse("row_column", HEIGHT, WIDTH)]
    key = check_layout(each, heads=2, tokens=HEIGHT * WIDTH)
    return each, layouts.groups_of(key, 2)


def _sparse(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    scale = size**-0.5
    each, groups = _patterns()
    mask = torch.stack([one.dense_mask(torch.device("cpu")) for one in each])
    (q, k, v, grad), moved = _heads(HEIGHT * WIDTH, dtype, size, device)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_reference(q, k, v, causal=False, scale=scale, mask=mask)[0]

    out, lse = load("forward")(*moved[:3], groups, scale)
    gradients = load("backward")(moved[3], *moved[:3], out, lse, groups, scale)
    _compare([out], gradients, oracle, [q, k, v], grad, floor=testing.cancelling_terms(q, k, v, grad, scale))


def _decode(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    scale = size**-0.5
    (_, k, v, _), (_, k_cache, v_cache, _) = _heads(400, dtype, size, device)
    q = _values(1, 2, 1, size, dtype=dtype, seed=4)

    for length in (100, 397):  # one split of the keys, and several

        def oracle(q: Tensor, k: Tensor, v: Tensor, length: int = length) -> Tensor:
            return reference.decode_attention_reference(q, k, v, length, scale=scale)

        out, _ = load("dense")(q.to(device), k_cache, v_cache, length, scale)
        _compare([out], (), oracle, [q, k, v], output_floor=4 * float(v.abs().max()))


def _sparse_decode(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    scale, length = size**-0.5, HEIGHT * WIDTH - 3
    each, groups = _patterns()
    visible = torch.stack([one.dense_mask(torch.device("cpu"))[length - 1 : length] for one in each])
    (_, k, v, _), (_, k_cache, v_cache, _) = _heads(HEIGHT * WIDTH, dtype, size, device)
    q = _values(1, 2, 1, size, dtype=dtype, seed=4)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_reference(q, k, v, causal=False, scale=scale, mask=visible)[0]

    out, _ = load("sparse")(q.to(device), k_cache, v_cache, length, groups, scale)
    _compare([out], (), oracle, [q, k, v], output_floor=4 * float(v.abs().max()))


def _norm(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    x, residual, grad = (_values(ROWS, size, dtype=dtype, seed=seed) for seed in range(3))
    weight = _values(size, dtype=dtype, seed=3)
    floor = 4 * float(grad.abs().max())
    out, _, rstd = load("forward")(x.to(device), None, weight.to(device), 1e-5)
    ds, _, dweight = load("backward")(grad.to(device), None, x.to(device), weight.to(device), rstd, None)

    def oracle(x: Tensor, weight: Tensor) -> Tensor:
        found = reference.rms_norm_reference(x, weight, eps=1e-5)
        return found if isinstance(found, Tensor) else found[0]

    _compare([out], [ds, dweight], oracle, [x, weight], grad, floor=floor)

    out, summed, rstd = load("forward")(x.to(device), residual.to(device), weight.to(device), 1e-5)
    zero = torch.zeros_like(summed)
    ds, _, dweight = load("backward")(grad.to(device), zero, summed, weight.to(device), rstd, None)
    _compare([out], [ds, dweight], oracle, [x + residual, weight], grad, floor=floor)


def _gelu(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    width = min(size, WIDEST)
    x, grad = (_values(ROWS, width, dtype=dtype, seed=seed) for seed in range(2))
    bias = _values(width, dtype=dtype, seed=2)
    floor = 4 * float(grad.abs().max())
    there, upstream = x.to(device), grad.to(device)

    def oracle(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.quick_gelu_reference(x, bias=bias)

    dx, _ = load("backward")(upstream, there, None)
    _compare([load("forward")(there, None)], [dx], oracle, [x], grad, output_floor=1.0, floor=floor)
    gradients = load("backward")(upstream, there, bias.to(device))
    _compare([load("forward")(there, bias.to(device))], gradients, oracle, [x, bias], grad, output_floor=1.0, floor=floor)


def _rows_and_classes(dtype: torch.dtype, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target on the CPU; some rows do not count."""
    width = 512
    hidden, weight = _values(ROWS, width, dtype=dtype, seed=0), _values(size, width, dtype=dtype, seed=1) / math.sqrt(width)
    target = torch.randint(size, (ROWS,), generator=torch.Generator("cpu").manual_seed(2), device="cpu")
    target[::7] = IGNORED
    return hidden, weight, target


_TF32 = 2**13
"""Torch's products may follow its setting for TF32, which rounds to 2⁻¹¹ where float32 rounds to 2⁻²⁴."""


def _loss_rows(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    hidden, weight, target = _rows_and_classes(dtype, size)
    grad = _values(ROWS, dtype=torch.float32, seed=3)
    floor = 4 * float(grad.abs().max()) * (_TF32 if dtype == torch.float32 else 1)

    def oracle(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_cross_entropy_reference(hidden, weight, target, reduction="none")

    tensors = hidden.to(device), weight.to(device), target.to(device)
    loss, lse = load("rows")(*tensors, IGNORED, 0.0)
    gradients = load("rows_backward")(grad.to(device), *tensors, lse, IGNORED, 0.0, True, True)
    output_floor = testing.largest_logit(hidden, weight)
    _compare([loss], gradients, oracle, [hidden, weight], grad, output_floor=output_floor, floor=floor)


def _loss_mean(load: Load, dtype: torch.dtype, size: int, device: torch.device) -> None:
    hidden, weight, target = _rows_and_classes(dtype, size)
    counting = int((target != IGNORED).sum())
    wide = _TF32 if dtype == torch.float32 else 1

    def oracle(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_cross_entropy_reference(hidden, weight, target)

    loss, dhidden, dweight = load("sum")(*(x.to(device) for x in (hidden, weight, target)), IGNORED, 0.0, True, True, True)
    factor = torch.full((), 3.0 / (counting if dtype == torch.float16 else 1), device=device)
    load("scale_")(dhidden, factor)
    gradients = [dhidden, load("scaled")(dweight, factor, dtype)]
    output_floor = testing.largest_logit(hidden, weight) * wide
    grad = torch.tensor(3.0)
    _compare([loss], gradients, oracle, [hidden, weight], grad, output_floor=output_floor, floor=12.0 / counting * wide)


CASES: dict[tuple[str, str], Callable[[Load, torch.dtype, int, torch.device], None]] = {
    ("flash_attention", "forward"): _dense,
    ("block_sparse_attention", "forward"): _sparse,
    ("decode_attention", "dense"): _decode,
    ("decode_attention", "sparse"): _sparse_decode,
    ("rms_norm", "forward"): _norm,
    ("quick_gelu", "forward"): _gelu,
    ("linear_cross_entropy", "rows"): _loss_rows,
    ("linear_cross_entropy", "sum"): _loss_mean,
}
"""(operation, step) -> its case, which raises AssertionError where a kernel is wrong, forward or backward."""
