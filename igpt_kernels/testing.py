"""Tools for tests and benchmarks of kernels: error budgets, inputs in awkward memory, poisoned allocation.

The tolerance of a test is never chosen by hand. It is the error that plain PyTorch makes at the same dtype, times a small
factor, plus one rounding. It is measured against float64 on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
MEMORY_FORMATS = ("contiguous", "heads_last", "fused_qkv", "stepped", "offset")


def error_ratio(
    actual: Tensor, exact: Tensor, eager: Tensor, *, factor: float, floor: float = 0.0, name: str = "output"
) -> float:
    """The largest error of `actual` as a share of its budget, ``factor·max|eager - exact| + eps·max(max|exact|, floor)``.

    Args:
        actual: what is tested.
        exact: the same computation in float64.
        eager: the same computation in plain PyTorch at the dtype of `actual`.
        factor: 2 for outputs, 3 for gradients.
        floor: size of the terms that cancel, where the exact result is (nearly) 0: one key only makes dQ and dK exactly 0.
        name: what to call it in the message.

    Returns:
        At most 1.

    Raises:
        AssertionError: shapes differ, a value is not finite, or an error is beyond the budget; the message names the place.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    # An oracle that is not finite would give a budget that nothing exceeds.
    for what, values in ((name, actual), (f"the oracle of {name}", exact), (f"plain PyTorch's {name}", eager)):
        bad = ~torch.isfinite(values)
        if bad.any():
            raise AssertionError(f"{what} has {int(bad.sum())} of {bad.numel()} values not finite, first at {_first(bad)}")
    error = (actual.double() - exact.double()).abs()
    rounding = torch.finfo(actual.dtype).eps
    budget = factor * float((eager.double() - exact.double()).abs().max()) + rounding * max(float(exact.abs().max()), floor)
    beyond = error > budget
    if beyond.any():
        place = _first(error == error.max())
        raise AssertionError(
            f"{name} is {float(actual[place]):.6g} at {place}, exact {float(exact[place]):.6g}: error {float(error.max()):.3g} "
            f"over the budget {budget:.3g}; {int(beyond.sum())} of {beyond.numel()} values are beyond it"
        )
    return float(error.max()) / budget if budget else 0.0


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


@dataclass(frozen=True)
class AttentionResult:
    """Output, log-sum-exp and gradients of one attention, detached."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention_result(
    run: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]], inputs: Sequence[Tensor], grad: Tensor
) -> AttentionResult:
    """Run ``run(q, k, v)`` forward and backward with the gradient `grad`; `run` gives out, or out and lse."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = run(*leaves)
    out, lse = result if isinstance(result, tuple) else (result, None)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
    return AttentionResult(out.detach(), None if lse is None else lse.detach(), dq, dk, dv)


def check_attention(actual: AttentionResult, exact: AttentionResult, eager: AttentionResult, *, floor: float = 0.0) -> float:
    """Check output and gradients against their budgets; the largest share of a budget that was used.

    Raises:
        AssertionError: see `error_ratio`.
    """
    worst = error_ratio(actual.out, exact.out, eager.out, factor=OUTPUT_FACTOR, name="out")
    for name in ("dq", "dk", "dv"):
        mine, true, low = (getattr(result, name) for result in (actual, exact, eager))
        worst = max(worst, error_ratio(mine, true, low, factor=GRADIENT_FACTOR, floor=floor, name=name))
    return worst


def largest_logit(hidden: Tensor, weight: Tensor) -> float:
    """The size that a logit may have: max‖hidden[i]‖·max‖weight[j]‖ (Cauchy-Schwarz); 0 where there is none.

    A product of sums this size is known to a rounding of it, and so are the log-sum-exp and the loss: a floor of `error_ratio`.

    Args:
        hidden: [..., C].
        weight: [V,C].
    """
    if not hidden.numel() or not weight.numel():
        return 0.0
    return math.prod(float(x.detach().double().norm(dim=-1).max()) for x in (hidden, weight))


def cancelling_terms(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> float:
    """A floor for `check_attention`: the size of the terms that cancel in dQ and dK of a row that sees one key.

    And a score of size S is known to eps·S only, so its exponential is no better.
    """
    if not (q.numel() and k.numel()):
        return 0.0
    sizes = [float(x.detach().double().norm(dim=-1).max()) for x in (q, k, v, grad)]
    return max(8.0, scale * sizes[0] * sizes[1]) * sizes[3] * max(1.0, scale * sizes[2])


def make_input(
    shape: Sequence[int], *, dtype: torch.dtype, seed: int, memory: str = "contiguous", device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal values [B,H,T,D], the same for every format, in memory where all else is NaN.

    Args:
        shape: B, H, T, D.
        dtype: floating point.
        seed: of the values.
        memory: ``contiguous``; ``heads_last`` (memory [B,T,H,D]); ``fused_qkv`` (one of three in [B,T,3,H,D]); ``stepped``
            (every second value of the last dimension); ``offset`` (starts 5 elements in, rows 3 elements apart).
        device: where.

    Raises:
        ValueError: unknown memory format.
    """
    batch, heads, tokens, head_dim = shape
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    def nan(*size: int) -> Tensor:
        return torch.full(size, math.nan, dtype=dtype, device=device)

    if memory == "contiguous":
        view = nan(batch, heads, tokens, head_dim)
    elif memory == "heads_last":
        view = nan(batch, tokens, heads, head_dim).transpose(1, 2)
    elif memory == "fused_qkv":
        view = nan(batch, tokens, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
    elif memory == "stepped":
        view = nan(batch, heads, tokens, 2 * head_dim)[..., ::2]
    elif memory == "offset":
        flat = nan(5 + batch * heads * tokens * (head_dim + 3))
        view = flat[5:].view(batch, heads, tokens, head_dim + 3)[..., :head_dim]
    else:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_FORMATS)}; got {memory!r}")
    return view.copy_(values)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised allocations are filled with NaN (integers: their largest value).

    So unwritten output, or a read of uninitialised memory, fails the test.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class GuardBands:
    """While active, ``torch.empty`` and ``torch.empty_strided`` on the CPU lie between two bands; `check` looks at them.

    The Triton interpreter writes through raw pointers and beyond a tensor's end without a word. So tests allocate the outputs
    of kernels with guards.
    """

    BAND = 256
    SENTINEL = 1234.0

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._empty, self._empty_strided = torch.empty, torch.empty_strided

    def __enter__(self) -> GuardBands:
        def empty(*size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
            count = math.prod(size)
            buffer = torch.full((count + 2 * self.BAND,), self.SENTINEL, dtype=dtype, device=device)
            self._buffers.append(buffer)
            inner = buffer[self.BAND : self.BAND + count]
            return inner.fill_(math.nan if inner.is_floating_point() else 0).view(size)

        def empty_strided(size: tuple[int, ...], stride: tuple[int, ...], **options: Any) -> Tensor:
            extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
            return empty(extent, **options).as_strided(size, stride)

        torch.empty = empty  # type: ignore[assignment]
        torch.empty_strided = empty_strided  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        torch.empty, torch.empty_strided = self._empty, self._empty_strided

    def check(self) -> int:
        """The number of guarded tensors.

        Raises:
            AssertionError: a band was written to.
        """
        for buffer in self._buffers:
            for end, band in (("before", buffer[: self.BAND]), ("behind", buffer[-self.BAND :])):
                if not bool((band == self.SENTINEL).all()):
                    raise AssertionError(f"{int((band != self.SENTINEL).sum())} values {end} a tensor were written to")
        return len(self._buffers)
