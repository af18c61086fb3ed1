"""Cross-entropy of a linear layer by C++: between torch's products, one pass over some rows of logits.

It reads a row of logits and leaves the row's gradient in its place, in the dtype of the logits. With p = softmax::

    loss = lse - logit[target] + z·lse²      dlogit = factor·(p·(1 + 2·z·lse) - onehot(target))

How gradients follow from that, and why they are made in the forward pass: igpt_kernels/_torch/loss.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from igpt_kernels._torch.loss import Gradients, mean_is_folded, parts_of, product_into, sum_dtype


def _between(
    logits: Tensor, target: Tensor, factor: Tensor | float, ignore_index: int, z_loss: float, loss: Tensor, lse: Tensor
) -> None:
    """Loss and log-sum-exp of rows of logits; with a factor [R], or one for all, the gradient in the logits' place."""
    own, every = (None, factor) if isinstance(factor, float) else (factor, 0.0)
    torch.ops.igpt_kernels.cpu_cross_entropy(logits, target, own, every, ignore_index, z_loss, loss, lse)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [R,V] in the dtype of hidden; of float16 in float32, in which they are computed (see `product_into`)."""
    if hidden.dtype == torch.float16:
        hidden, weight = hidden.float(), weight.float()
    return product_into(hidden.new_empty(hidden.shape[0], weight.shape[0]), hidden, weight.t())


def _parts(hidden: Tensor, weight: Tensor, *rows: Tensor) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Which rows go together, and those of the tensors given; all at once where they are few, as slices take microseconds.

    In bfloat16, 2²² logits (8 MiB): with half as many, the products of 9,216 rows of 512 take 1.5 % longer.
    """
    parts = parts_of(hidden, weight, 1 << (22 if hidden.dtype == torch.bfloat16 else 20))
    for part in parts:
        yield part, rows if len(parts) == 1 else [x[part] for x in rows]


def cross_entropy_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The operator ``igpt_kernels::cross_entropy_rows``: loss and log-sum-exp of each row, [M]."""
    loss, lse = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    for _, (some, labels, *out) in _parts(hidden, weight, hidden, target.contiguous(), loss, lse):
        _between(_logits(some, weight), labels, 0.0, ignore_index, z_loss, *out)
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
    again = torch.empty_like(lse), torch.empty_like(lse)
    for part, (some, labels, factor, *out) in _parts(hidden, weight, hidden, target.contiguous(), grad, *again):
        logits = _logits(some, weight)
        _between(logits, labels, factor, ignore_index, z_loss, *out)
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
    loss, lse = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    target = target.contiguous()
    count = torch.ops.igpt_kernels.cpu_count(target, ignore_index) if mean else 1
    factor = 1.0 / max(count, 1) if mean_is_folded(hidden.dtype) else 1.0
    for part, (some, labels, *out) in _parts(hidden, weight, hidden, target, loss, lse):
        logits = _logits(some, weight)
        _between(logits, labels, factor if need_hidden or need_weight else 0.0, ignore_index, z_loss, *out)
        gradients.add(part, logits)
    return loss.sum() / count, gradients.dhidden, gradients.dweight(sum_dtype(weight.dtype, "ext"))
