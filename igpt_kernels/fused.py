"""What surrounds attention in Image GPT, each in one pass: public functions that document, check, and choose a backend.

Letters: C width of a row, M rows (all dimensions but the last), V classes.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from igpt_kernels import _ops_fused, _ops_loss, backends, reference
from igpt_kernels.checks import autocast, check_beside, check_eps, check_loss, check_rows


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

    Half dtypes are computed in float32; the normed row is rounded to the dtype of s, and the product with the weight to the
    dtype that both promote to. So float32 weights give float32 rows, as in Image GPT's own code, whose residual stream
    torch.autocast leaves in float32: autocast casts nothing here.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64; any strides.
        weight: [C]. Its dtype may differ from that of x (float64 goes with float64 only).
        eps: added to the mean of the squares; not negative.
        residual: of the shape of x, added first; its dtype may differ too.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA, C up to 8192), ``"torch"`` (a few passes of torch,
            any device) or ``"reference"`` (eager). A name never falls back; `igpt_kernels.explain` says what auto takes.

    Returns:
        [..., C], contiguous; with a residual, that and s (in the dtype that x and residual promote to), which is what the
        next layer adds to. Gradients flow through both.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message.
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        RuntimeError: in a second derivative; only the reference has one.

    The backward pass is deterministic, bit for bit, the weight's gradient too (partial sums in float32 in a fixed order).

    Cost: bound by memory: reads x once and writes once, backward reads twice and writes once. Kept for the backward pass:
    s and one number a row; plain torch keeps two tensors, at half dtypes one of them in float32. Inputs whose rows do not
    lie at one distance from each other, or whose values are not adjacent, are copied first. Zhang and Sennrich, "Root Mean
    Square Layer Normalization", 2019.
    """
    x = check_rows(x)
    weight = check_beside("weight", weight, x, x.shape[-1:])
    eps = check_eps(eps)
    if residual is not None:
        residual = check_beside("residual", residual, x, x.shape)
    table = backends.explain("rms_norm", dtype=x.dtype, device=x.device, width=x.shape[-1])
    chosen = backends.choose(backend, table, "rms_norm")
    if chosen == "reference":
        return reference.rms_norm_reference(x, weight, eps=eps, residual=residual)
    if residual is None:
        return _ops_fused.rms_norm_forward(x, weight, eps, chosen == "triton")[0]
    return _ops_fused.add_rms_norm_forward(x, residual, weight, eps, chosen == "triton")[:2]


def quick_gelu(x: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Image GPT's activation: ``z * sigmoid(1.702 * z)`` with ``z = x`` or ``x + bias``.

    Half dtypes are computed in float32 and rounded once. torch.autocast casts nothing here: a linear layer before it gives
    its dtype already.

    Args:
        x: [..., C], float16, bfloat16, float32 or float64; any strides.
        bias: [C], for a linear layer that left its own to this function; its dtype may differ from that of x (float64 goes
            with float64 only), the result has the dtype of x all the same.
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
    and bias; the sigmoid is computed again, plain torch keeps it. Inputs whose rows do not lie at one distance from each
    other, or whose values are not adjacent, are copied first. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    x = check_rows(x)
    if bias is not None:
        bias = check_beside("bias", bias, x, x.shape[-1:])
    table = backends.explain("quick_gelu", dtype=x.dtype, device=x.device, width=x.shape[-1])
    chosen = backends.choose(backend, table, "quick_gelu")
    if chosen == "reference":
        return reference.quick_gelu_reference(x, bias=bias)
    return _ops_fused.quick_gelu_forward(x, bias, chosen == "triton")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear layer, without its logits in memory: ``F.cross_entropy(hidden @ weight.T, target)``.

    Of each row ``lse(logits) - logits[target] + z_loss * lse(logits)^2``, in nats, where ``logits = hidden @ weight.T`` and
    lse is the logarithm of the sum of their exponentials. A z-loss keeps that sum near 1 (Chowdhery et al., "PaLM", 2022).

    Args:
        hidden: [..., C], float16, bfloat16, float32 or float64; any strides (copied where its rows do not lie at one
            distance from each other).
        weight: [V,C], of hidden's dtype and device; Triton takes 2 to 8192 classes.
        target: int64 [...], each a class or `ignore_index`.
        ignore_index: target of rows that do not count: their loss and gradients are 0.
        reduction: ``"mean"`` over the rows that count (NaN where none does, as F.cross_entropy has it, with zero gradients),
            ``"sum"``, or ``"none"``.
        z_loss: factor of the squared lse, 0 or more.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA), ``"torch"`` (some rows at a time, any device) or
            ``"reference"`` (eager, all logits in memory). A name never falls back.

    Returns:
        A scalar, or [...] for ``"none"``; float32, float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message; on the CPU also a
            target that is no class. On a GPU, and while torch.compile traces, targets are not read: such a row gets the loss
            NaN and NaN gradients, and nothing beyond the tensors is read. (The reference fails as torch's gather does.)
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        RuntimeError: in a second derivative; only the reference has one.

    Under torch.autocast hidden and weight are cast to its dtype; the loss stays float32. Sums are float32 whatever the dtype
    (the torch backend rounds logits to it, as a linear layer does). Deterministic, bit for bit. Triton's float32 logits are
    true float32; the two products of its backward pass follow torch's setting for TF32, which is off by default.

    Cost: 2·M·C·V floating point operations, M rows, and twice that backward (Triton computes the logits again: three times;
    torch makes both gradients in the forward pass of ``"mean"`` and ``"sum"``, where grad mode is on, and in that of every
    further backward call). Memory beyond inputs and gradients: 4 MiB of logits on the CPU, 16 MiB on a GPU (twice that in
    float32), float32 sums of weight's gradient, and a few values a row.
    """
    hidden, weight = autocast(hidden, weight)
    hidden, weight, target = check_loss(hidden, weight, target, ignore_index, reduction, z_loss)
    table = backends.explain("linear_cross_entropy", dtype=hidden.dtype, device=hidden.device, vocab=weight.shape[0])
    chosen = backends.choose(backend, table, "linear_cross_entropy")
    if chosen == "reference":
        return reference.linear_cross_entropy_reference(
            hidden, weight, target, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss
        )
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    if chosen == "torch" and reduction != "none" and any(needed):
        # One number's gradient: scaling dhidden by it costs less than computing the logits again, 14 times less on a CPU.
        total = _ops_loss.cross_entropy_sum(rows, weight, labels, ignore_index, z_loss, *needed)[0]
    else:
        loss = _ops_loss.cross_entropy_rows(rows, weight, labels, ignore_index, z_loss, chosen == "triton")[0]
        if reduction == "none":
            return loss.view(target.shape)
        total = loss.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()
