"""The registered operators of RMSNorm. No operation counts: torch's counter counts products of matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igpt_kernels import backends
from igpt_kernels._ops.shared import register
from igpt_kernels._ops.transforms import call, in_rows
from igpt_kernels.tensors import accumulation_dtype


def _norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    out, _, rstd = backends.step("rms_norm", backend, "forward")(x, None, weight, eps)
    return out, rstd


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = backends.step("rms_norm", backend, "forward")(x, residual, weight, eps)
    return result


def _backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ds, low, dweight = backends.step("rms_norm", backend, "backward")(grad, grad_summed, s, weight, rstd, narrow)
    return ds, s.new_empty(0) if low is None else low, dweight


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


def _norm_fake(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), _rstd_like(x)


def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=torch.promote_types(summed.dtype, weight.dtype)), summed, _rstd_like(summed)


def _backward_fake(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    low = s.new_empty(0) if narrow is None else s.new_empty(s.shape, dtype=narrow)
    return s.new_empty(s.shape), low, weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.backend = backend
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, _, dweight = call(rms_norm_backward, grad, None, *ctx.saved_tensors, None, ctx.backend)
    return dx, dweight, None, None


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, backend = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)
    ctx.how = (x.dtype, residual.dtype, backend)
    ctx.mark_non_differentiable(rstd)
    # Where only one of the outputs is used, the other's gradient is not worth a tensor of zeros.
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx: Any, grad: Tensor | None, grad_summed: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors
    of_x, of_residual, backend = ctx.how
    if grad is None:
        if grad_summed is None:
            return None, None, None, None, None
        return grad_summed.to(of_x), grad_summed.to(of_residual), None, None, None
    others = [dtype for dtype in (of_x, of_residual) if dtype != summed.dtype]
    narrow = others[0] if others else None
    ds, low, dweight = call(rms_norm_backward, grad, grad_summed, summed, weight, rstd, narrow, backend)
    dx, dresidual = (low if dtype == narrow else ds.to(dtype) for dtype in (of_x, of_residual))
    return dx, dresidual, dweight, None, None


rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, str backend) -> (Tensor out, Tensor rstd)",
    _norm,
    _norm_fake,
    save=_save_norm,
    backward=_norm_gradients,
    rule=in_rows,
)
add_rms_norm_forward = register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, str backend)"
    " -> (Tensor out, Tensor summed, Tensor rstd)",
    _add_norm,
    _add_norm_fake,
    save=_save_add_norm,
    backward=_add_norm_gradients,
    rule=in_rows,
)
rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor? grad_summed, Tensor s, Tensor weight, Tensor rstd, ScalarType? narrow, str backend)"
    " -> (Tensor ds, Tensor low, Tensor dweight)",
    _backward,
    _backward_fake,
    second="rms_norm",
)
