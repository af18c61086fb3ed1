"""Cross-entropy of a linear layer by C++: torch's products, and one pass between them over some rows of logits.

The pass reads a row of logits and leaves the row's gradient in its place, in the dtype of the logits. With p = softmax::

    loss = lse - logit[target] + z·lse²      dlogit = factor·(p·(1 + 2·z·lse) - onehot(target))

How gradients follow from that, and why they are made in the forward pass: igpt_kernels/_torch/loss.py. A call of Python is one
call of C++ (csrc/cpu/binding_loss.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels._torch.loss import mean_is_folded


def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows``: loss and log-sum-exp of each row, [M]."""
    run = torch.ops.igpt_kernels.cpu_cross_entropy_rows
    loss, lse, *_ = run(hidden, weight, target.contiguous(), None, ignore_index, z_loss, False, False)
    return loss, lse


def cross_entropy_rows_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows_backward``: the logits once more, and what follows from them."""
    run = torch.ops.igpt_kernels.cpu_cross_entropy_rows
    *_, dhidden, dweight = run(hidden, weight, target.contiguous(), grad, ignore_index, z_loss, need_hidden, need_weight)
    return dhidden, dweight.to(weight.dtype)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    z_loss: float,
    mean: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_sum``: see `igpt_kernels._torch.loss.cross_entropy_sum`."""
    how = ignore_index, z_loss, mean, mean_is_folded(hidden.dtype), need_hidden, need_weight
    loss, dhidden, dweight = torch.ops.igpt_kernels.cpu_cross_entropy_sum(hidden, weight, target.contiguous(), *how)
    return loss, dhidden, dweight


def cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    """The operator ``igpt_kernels::cross_entropy_scale_``: see `igpt_kernels._torch.loss.cross_entropy_scale_`."""
    torch.ops.igpt_kernels.cpu_scale(gradient, float(factor.detach()))
