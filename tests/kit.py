"""One comparison for kernels on the CPU, in Triton's interpreter and on a GPU: ours, the oracle in float64, and plain PyTorch.

No tolerance is chosen by hand. Plain PyTorch runs at the dtype of the inputs; its error against float64 is the budget
(`igpt_kernels.testing.error_ratio`). A floor is the size of the terms that cancel where the exact result is nearly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igpt_kernels import decode_attention, testing
from igpt_kernels.reference import attention_reference, linear_cross_entropy_reference, quick_gelu_reference, rms_norm_reference

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
ALL_DTYPES = [*DTYPES, torch.float64]
IGNORED = -100


@dataclass(frozen=True)
class Result:
    """Outputs of a function and the gradients of its inputs, detached."""

    outputs: list[Tensor]
    gradients: list[Tensor]


def matrix(
    rows: int, width: int, dtype: torch.dtype, seed: int, memory: str = "contiguous", device: torch.device | str = "cpu"
) -> Tensor:
    """Normal values [rows, width] with NaN around them; see `igpt_kernels.testing.make_input`."""
    return testing.make_input((1, 1, rows, width), dtype=dtype, seed=seed, memory=memory, device=device)[0, 0]


def vector(width: int, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Normal values [width]."""
    return matrix(1, width, dtype, seed, device=device)[0]


def qkv(
    shape: Sequence[int], dtype: torch.dtype, memory: str = "fused_qkv", device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Queries, keys and values [B,H,T,D] with NaN around them."""
    return [testing.make_input(shape, dtype=dtype, seed=seed, memory=memory, device=device) for seed in range(3)]


def classes(
    rows: int, vocab: int, seed: int, *, ignored: float = 0.2, ignore_index: int = IGNORED, device: torch.device | str = "cpu"
) -> Tensor:
    """Random targets [rows], a share of which is `ignore_index`."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(vocab, (rows,), generator=generator)
    return target.masked_fill(torch.rand(rows, generator=generator) < ignored, ignore_index).to(device)


def run(function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> Result:
    """Call `function` on leaves made of `inputs`; outputs beyond `grads` have no gradient of their own."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    heads = outputs[: len(grads)]
    given = [grad.to(out.dtype) for grad, out in zip(grads, heads, strict=True)]
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(heads, wanted, given, allow_unused=True, materialize_grads=True)
    return Result([out.detach() for out in outputs], list(gradients))


def compare(
    ours: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    *,
    guarded: int | None = None,
    output_floors: Sequence[float] = (),
    gradient_floor: float | None = None,
) -> Result:
    """Check outputs and gradients of `ours` against their budgets.

    Args:
        ours: what is tested; it may have more outputs than the oracle.
        oracle: the same in plain PyTorch, at any dtype.
        inputs: of both; None where there is none.
        grads: of the first outputs.
        guarded: how many new tensors must lie between guard bands (CPU only); poisoned memory when None.
        output_floors: of the outputs; 0 for those without one.
        gradient_floor: of the gradients; four times the largest value of `grads` when None.

    Returns:
        What `ours` gave.

    Raises:
        AssertionError: an error beyond its budget, another dtype than plain PyTorch gives, or a write outside of a tensor.
    """
    with testing.poisoned_memory() if guarded is None else testing.GuardBands() as guards:
        actual = run(ours, inputs, grads)
    if guards is not None and any(x is not None and x.numel() for x in inputs):
        assert guards.check() >= (guarded or 0)
    eager = run(oracle, inputs, grads)
    exact = run(oracle, [None if x is None else x.double() for x in inputs], [grad.double() for grad in grads])
    if gradient_floor is None:
        gradient_floor = 4 * max((float(grad.double().abs().max()) for grad in grads if grad.numel()), default=0.0)
    floors = [*output_floors, *[0.0] * len(exact.outputs)]
    for index, (mine, low, true) in enumerate(zip(actual.outputs, eager.outputs, exact.outputs, strict=False)):
        assert mine.dtype == low.dtype, f"output {index}"
        unseen = true == -math.inf  # the log-sum-exp of no key
        assert torch.equal(mine == -math.inf, unseen), f"output {index}"
        values = (x.masked_fill(unseen, 0) for x in (mine, true, low))
        testing.error_ratio(*values, factor=testing.OUTPUT_FACTOR, floor=floors[index], name=f"output {index}")
    for index, (mine, low, true) in enumerate(zip(actual.gradients, eager.gradients, exact.gradients, strict=True)):
        assert mine.dtype == low.dtype, f"gradient {index}"
        testing.error_ratio(mine, true, low, factor=testing.GRADIENT_FACTOR, floor=gradient_floor, name=f"gradient {index}")
    return actual


def compare_attention(
    ours: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    grad: Tensor | None = None,
    guarded: int | None = None,
    far: float = 1.0,
) -> Result:
    """Check ``out``, the log-sum-exp if `ours` gives it, and the gradients of q, k and v; see `compare`.

    Args:
        ours: ``(q, k, v) -> out`` or ``-> (out, lse)``.
        tensors: q, k and v.
        scale: of the scores.
        causal: as for `igpt_kernels.flash_attention`.
        mask: True where a query sees a key, [H or 1, T, T].
        grad: of out; normal values when None.
        guarded: see `compare`.
        far: how much larger than 1 the keys are after scaling: dQ sums them with weights that cancel.
    """
    q = tensors[0]
    if grad is None:
        grad = testing.make_input(q.shape, dtype=q.dtype, seed=9, device=q.device)
    floor = testing.cancelling_terms(*tensors, grad, scale) * far

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(q, k, v, causal=causal, scale=scale, mask=mask)
        return out, lse.float() if q.dtype != torch.float64 else lse

    actual = compare(ours, oracle, tensors, [grad], guarded=guarded, output_floors=(0.0, 8.0), gradient_floor=floor)
    if len(actual.outputs) > 1:
        out, lse = actual.outputs
        assert (out.masked_select((lse == -math.inf)[..., None]) == 0).all()
    return actual


def compare_decode(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *, layout: Any = None
) -> None:
    """Check ``decode_attention(q, k_cache, v_cache, length, layout=layout)`` without gradients."""
    eager = decode_attention(q, k_cache, v_cache, length, layout=layout, backend="reference")
    wide = (x.double() for x in (q, k_cache, v_cache))
    exact = decode_attention(*wide, length, layout=layout, backend="reference")
    floor = 4 * float(v_cache.nan_to_num().abs().max())
    testing.error_ratio(out, exact, eager, factor=testing.OUTPUT_FACTOR, floor=floor, name="decode")


def compare_norm(
    ours: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    grads: Sequence[Tensor] | None = None,
    guarded: int | None = None,
) -> Result:
    """Check ``(x, weight, residual) -> norm`` or, with a residual, ``-> (norm, sum)``, and the gradients; see `compare`."""

    def oracle(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
        return rms_norm_reference(x, weight, eps=eps, residual=residual)

    if grads is None:
        grads = _gradients_like(x, 1 if residual is None else 2)
    return compare(ours, oracle, [x, weight, residual], grads, guarded=guarded)


def compare_gelu(
    ours: Callable[..., Any],
    x: Tensor,
    bias: Tensor | None = None,
    *,
    grad: Tensor | None = None,
    guarded: int | None = None,
) -> Result:
    """Check ``(x, bias) -> out`` and the gradients; see `compare`."""
    grads = _gradients_like(x, 1) if grad is None else [grad]
    return compare(ours, lambda x, bias: quick_gelu_reference(x, bias=bias), [x, bias], grads, guarded=guarded)


def _gradients_like(x: Tensor, count: int) -> list[Tensor]:
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return [matrix(*flat.shape, x.dtype, 9 + i, device=x.device).view(x.shape) for i in range(count)]  # type: ignore[misc]


def compare_loss(
    ours: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "none",
    z_loss: float = 0.0,
    ignore_index: int = IGNORED,
    grad: Tensor | None = None,
    guarded: int | None = None,
) -> Result:
    """Check ``(hidden, weight) -> loss``, or ``-> (loss, lse)``, and both gradients; see `compare`."""
    if grad is None:
        shape = target.shape if reduction == "none" else ()
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(hidden.device)

    def oracle(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss = linear_cross_entropy_reference(
            hidden, weight, target, reduction=reduction, z_loss=z_loss, ignore_index=ignore_index
        )
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return loss, torch.logsumexp(hidden.detach().to(wide) @ weight.detach().to(wide).t(), -1)

    largest = testing.largest_logit(hidden, weight)
    # A logit of size S is known to eps·S of float32, and so is its exponential.
    size = max(1.0, largest) if hidden.dtype == torch.float32 else 1.0
    upstream = float(grad.abs().max()) if grad.numel() else 0.0
    if reduction == "mean":
        floor = size * upstream / max(1, int((target != ignore_index).sum()))
    else:
        floor = size * max(1.0, upstream)
    logits = max(8.0, largest)
    return compare(
        ours, oracle, [hidden, weight], [grad], guarded=guarded, output_floors=(logits, logits), gradient_floor=floor
    )
