"""Cross-entropy of a linear layer by C++: between torch's products, one pass over some rows of logits.

It reads a row of logits and leaves the row's gradient in its place, in the dtype of the logits. With p = softmax::

    loss = lse - logit[target] + z·lse²      dlogit = factor·(p·(1 + 2·z·lse) - onehot(target))

How gradients follow from that, and why they are made in the forward pass: igpt_kernels/_torch/loss.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igpt_kernels._torch.loss import Gradients, mean_is_folded, parts_of, product_into, rows_that_count, sum_dtype


def _between(
    logits: Tensor, target: Tensor, factor: Tensor | None, ignore_index: int, z_loss: float, loss: Tensor, lse: Tensor
) -> None:
    """Loss and log-sum-exp of rows of logits; where there is a factor [] or [R], the gradient in the logits' place."""
    torch.ops.igpt_kernels.cpu_cross_entropy(logits, target, factor, ignore_index, z_loss, loss, lse)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    return parts_of(hidden, weight, 2 if hidden.dtype == torch.bfloat16 else 4)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [R,V] in the dtype of hidden; of float16 in float32, in which they are computed (see `product_into`)."""
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return product_into(hidden.new_empty(hidden.shape[0], weight.shape[0]), hidden, weight.t())


def _losses(rows: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows), torch.empty(rows)


def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows``: loss and log-sum-exp of each row, [M]."""
    loss, lse = _losses(hidden.shape[0])
    target = target.contiguous()
    for part in _parts(hidden, weight):
        logits = _logits(hidden[part], weight)
        _between(logits, target[part], None, ignore_index, z_loss, loss[part], lse[part])
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
    gradients = Gradients(hidden, weight, need_hidden, need_weight)
    loss, lse = _losses(hidden.shape[0])
    target = target.contiguous()
    for part in _parts(hidden, weight):
        logits = _logits(hidden[part], weight)
        _between(logits, target[part], grad[part], ignore_index, z_loss, loss[part], lse[part])
        gradients.add(part, logits)
    return gradients.dhidden, gradients.dweight(weight.dtype)


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
    gradients = Gradients(hidden, weight, need_hidden, need_weight)
    loss, lse = _losses(hidden.shape[0])
    target = target.contiguous()
    count = rows_that_count(target, ignore_index, loss.dtype, mean)
    factor = count.reciprocal() if mean_is_folded(hidden.dtype) else torch.ones_like(count)
    for part in _parts(hidden, weight):
        logits = _logits(hidden[part], weight)
        _between(logits, target[part], factor, ignore_index, z_loss, loss[part], lse[part])
        gradients.add(part, logits)
    return loss.sum() / count, gradients.dhidden, gradients.dweight(sum_dtype(weight.dtype, "ext"))
