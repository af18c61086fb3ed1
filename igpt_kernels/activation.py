"""QuickGELU in one pass: documents, checks, and chooses a backend. Letters: C width of a row."""

from __future__ import annotations

from torch import Tensor

from igpt_kernels import backends, reference
from igpt_kernels._ops import activation as ops
from igpt_kernels._ops.transforms import call
from igpt_kernels.checks import check_companion, check_memory, check_rows


def quick_gelu(x: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Image GPT's activation: ``z * sigmoid(1.702 * z)`` with ``z = x`` or ``x + bias``.

    Half dtypes are computed in float32 and rounded once. torch.autocast casts nothing here: a linear layer before it gives
    its dtype already.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64; any strides.
        bias: [C], for a linear layer that left its own to this function; its dtype may differ from that of x (float64 goes
            with float64 only); the result has the dtype of x all the same.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA), ``"torch"`` (a few passes of torch, any device) or
            ``"reference"`` (eager). A name never falls back; `igpt_kernels.explain` says what auto takes.

    Returns:
        [..., C], dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        RuntimeError: in a second derivative; only the reference has one.

    The backward pass is deterministic, bit for bit, the bias's gradient too (partial sums in float32 in a fixed order).

    Cost: bound by memory: reads x once and writes once, backward reads twice and writes once. Kept for the backward pass: x
    and bias; the sigmoid is computed again, plain torch keeps it. Inputs are copied first if their rows are not at one
    distance, or their values not adjacent. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    x = check_rows(x)
    if bias is not None:
        bias = check_companion("bias", bias, x, x.shape[-1:])
    check_memory({"x": x, "bias": bias})
    chosen = backends.select("quick_gelu", backend, (x,) if bias is None else (x, bias), x.shape[-1])
    if chosen == "reference":
        return reference.quick_gelu_reference(x, bias=bias)
    return call(ops.quick_gelu_forward, x, bias, chosen)
