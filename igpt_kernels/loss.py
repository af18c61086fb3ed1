"""Cross-entropy of a linear layer without its logits: documents, checks, and chooses a backend. M rows, C width, V classes."""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels import backends, reference
from igpt_kernels._ops import loss as ops
from igpt_kernels._ops.transforms import call
from igpt_kernels.checks import autocast, check_loss


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
        target: integers [...], each a class or `ignore_index`.
        ignore_index: target of rows that do not count: their loss and gradients are 0.
        reduction: ``"mean"`` over the rows that count (NaN where none does, as F.cross_entropy has it, with zero gradients),
            ``"sum"``, or ``"none"``.
        z_loss: factor of the squared lse, 0 or more.
        backend: ``"auto"``, or by name ``"triton"`` (fused kernels, CUDA); ``"ext"`` (C++ between torch's products, CPU, no
            float64); ``"torch"`` (some rows at a time, any device) or ``"reference"`` (eager, all logits in memory). A name
            never falls back.

    Returns:
        A scalar, or [...] for ``"none"``; float32, float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, named in the message; on the CPU also a
            target that is no class. On a GPU, and while torch.compile traces, targets are not read: such a row gets the loss
            NaN and NaN gradients, and nothing beyond the tensors is read. (The reference fails as torch's gather does.)
        BackendUnavailable: the backend asked for cannot run, with its reasons.
        RuntimeError: in a second derivative; only the reference has one.

    Under torch.autocast hidden and weight are cast to its dtype; the loss stays float32. Sums are float32 whatever the dtype.
    Logits are rounded to it, as a linear layer does; but not where Triton makes no gradients, nor float16 in C++.
    Deterministic, bit for bit.
    In float32, products follow torch's setting for TF32, which is off by default; those of Triton's kernel are true float32.

    Cost: 2·M·C·V floating point operations, M rows, and twice that for the gradients. Where grad mode is on, ``"mean"`` and
    ``"sum"`` make those in the forward pass, and in every further backward call. ``"none"`` computes the logits again in the
    backward pass, three times 2·M·C·V. Memory beyond inputs and gradients, with Triton: 32 MiB of logits (64 in float32);
    sums of weight's gradient in float32, 9 MB and more; a few values a row. On the CPU: some parts of 2²⁰ logits in float32
    (64 rows at least; in bfloat16 with C++ 2²²), and such sums. torch.compile keeps a second hidden's gradient.
    """
    hidden, weight = autocast(hidden, weight)
    checked = check_loss(hidden, weight, target, ignore_index, reduction, z_loss)
    hidden, weight, target, ignore_index, z_loss = checked
    chosen = backends.select("linear_cross_entropy", backend, (hidden, weight), weight.shape[0])
    if chosen == "reference":
        return reference.linear_cross_entropy_reference(
            hidden, weight, target, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss
        )
    rows, labels = (hidden, target) if hidden.dim() == 2 else (hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1))
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    # One number's gradient: three products. Every row's own wants the logits again in the backward pass: four. Without
    # gradients, Triton's rows need no logits in memory. Gradients made beside a sum are one tensor, used in place; a transform
    # of torch.func wants functions of tensors.
    together = reduction != "none" and (any(needed) or chosen != "triton")
    if together and not torch._C._are_functorch_transforms_active():
        return call(ops.cross_entropy_sum, rows, weight, labels, ignore_index, z_loss, reduction == "mean", *needed, chosen)[0]
    loss = call(ops.cross_entropy_rows, rows, weight, labels, ignore_index, z_loss, chosen)[0]
    if reduction == "none":
        return loss.view(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()
