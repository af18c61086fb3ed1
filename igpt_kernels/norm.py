"""RMSNorm in one pass: documents, checks, and chooses a backend. Letters: C width of a row."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from igpt_kernels import backends, reference
from igpt_kernels._ops import norm as ops
from igpt_kernels._ops.transforms import call
from igpt_kernels.checks import check_companion, check_eps, check_memory, check_rows


@overload
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: None = None, backend: str = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of each row: ``s * rsqrt(mean(s^2) + eps) * weight``, with ``s = x`` or ``x + residual``.

    Half dtypes are computed in float32; the normed row is rounded to the dtype of s; the product with the weight to the
    dtype that both promote to. So float32 weights give float32 rows, as in Image GPT's own code, whose residual stream
    torch.autocast leaves in float32: autocast casts nothing here.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64; any strides.
        weight: [C]. Its dtype may differ from that of x (float64 goes with float64 only).
        eps: added to the mean of the squares; not negative.
        residual: of the shape of x, added first; its dtype may differ too.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA, C up to 8192); ``"torch"`` (a few passes of torch,
            any device) or ``"reference"`` (eager). A name never falls back; `igpt_kernels.explain` says what auto takes.

    Returns:
        [..., C], contiguous; with a residual, that and s (in the dtype that x and residual promote to); the next layer adds to
        it. Gradients flow through both.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        RuntimeError: in a second derivative; only the reference has one.

    The backward pass is deterministic, bit for bit, the weight's gradient too (partial sums in float32 in a fixed order).

    Cost: bound by memory: reads x once and writes once, backward reads twice and writes once. Kept for the backward pass:
    s and one number a row; plain torch keeps two tensors, at half dtypes one of them in float32. Inputs are copied first if
    their rows are not at one distance, or their values not adjacent. Zhang and Sennrich, "Root Mean
    Square Layer Normalization", 2019.
    """
    x = check_rows(x)
    weight = check_companion("weight", weight, x, x.shape[-1:])
    eps = check_eps(eps)
    if residual is not None:
        residual = check_companion("residual", residual, x, x.shape)
    check_memory({"x": x, "weight": weight, "residual": residual})
    chosen = backends.select("rms_norm", backend, (x, weight) if residual is None else (x, weight, residual), x.shape[-1])
    if chosen == "reference":
        return reference.rms_norm_reference(x, weight, eps=eps, residual=residual)
    if residual is None:
        return call(ops.rms_norm_forward, x, weight, eps, chosen)[0]
    return call(ops.add_rms_norm_forward, x, residual, weight, eps, chosen)[:2]
