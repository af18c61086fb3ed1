"""The registered operators of norm and activation: schemas, shapes without data, derivatives. Torch only; kernels come late.

No operation counts: torch's counter counts products of matrices, and here are none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from igpt_kernels._torch import fused as torch_fused

_library = Library("igpt_kernels", "FRAGMENT")
_library.define("rms_norm_forward(Tensor x, Tensor weight, float eps, bool triton) -> (Tensor out, Tensor rstd)")
_library.define(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, bool triton)"
    " -> (Tensor out, Tensor summed, Tensor rstd)"
)
_library.define(
    "rms_norm_backward(Tensor grad, Tensor? grad_summed, Tensor s, Tensor weight, Tensor rstd, ScalarType? narrow, bool triton)"
    " -> (Tensor ds, Tensor low, Tensor dweight)"
)
_library.define("quick_gelu_forward(Tensor x, Tensor? bias, bool triton) -> Tensor")
_library.define("quick_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool triton) -> (Tensor dx, Tensor dbias)")

rms_norm_forward = torch.ops.igpt_kernels.rms_norm_forward
add_rms_norm_forward = torch.ops.igpt_kernels.add_rms_norm_forward
rms_norm_backward = torch.ops.igpt_kernels.rms_norm_backward
quick_gelu_forward = torch.ops.igpt_kernels.quick_gelu_forward
quick_gelu_backward = torch.ops.igpt_kernels.quick_gelu_backward


def _run_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, triton: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    if triton:
        from igpt_kernels._triton.rms_norm import launch_rms_norm_forward

        return launch_rms_norm_forward(x, residual, weight, eps=eps)
    return torch_fused.rms_norm_forward(x, residual, weight, eps)


def _norm(x: Tensor, weight: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor]:
    out, _, rstd = _run_norm(x, None, weight, eps, triton)
    return out, rstd


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    return _run_norm(x, residual, weight, eps, triton)


def _norm_backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if triton:
        from igpt_kernels._triton.rms_norm import launch_rms_norm_backward

        ds, low, dweight = launch_rms_norm_backward(grad, grad_summed, s, weight, rstd, narrow=narrow)
    else:
        ds, low, dweight = torch_fused.rms_norm_backward(grad, grad_summed, s, weight, rstd, narrow)
    return ds, s.new_empty(0) if low is None else low, dweight


def _gelu(x: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
    if triton:
        from igpt_kernels._triton.quick_gelu import launch_quick_gelu_forward

        return launch_quick_gelu_forward(x, bias)
    return torch_fused.quick_gelu_forward(x, bias)


def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    if triton:
        from igpt_kernels._triton.quick_gelu import launch_quick_gelu_backward

        dx, dbias = launch_quick_gelu_backward(grad, x, bias)
    else:
        dx, dbias = torch_fused.quick_gelu_backward(grad, x, bias)
    return dx, x.new_empty(0) if dbias is None else dbias


def _rstd_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _norm_fake(x: Tensor, weight: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), _rstd_like(x)


def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=torch.promote_types(summed.dtype, weight.dtype)), summed, _rstd_like(summed)


def _norm_backward_fake(
    grad: Tensor,
    grad_summed: Tensor | None,
    s: Tensor,
    weight: Tensor,
    rstd: Tensor,
    narrow: torch.dtype | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    low = s.new_empty(0) if narrow is None else s.new_empty(s.shape, dtype=narrow)
    return s.new_empty(s.shape), low, weight.new_empty(weight.shape)


def _gelu_fake(x: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save_norm(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, triton = inputs
    ctx.save_for_backward(x, weight, output[1])  # type: ignore[arg-type]
    ctx.how = triton  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])


def _norm_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, _, dweight = rms_norm_backward(grad, None, *ctx.saved_tensors, None, ctx.how)  # type: ignore[attr-defined]
    return dx, dweight, None, None


def _save_add_norm(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, weight, _, triton = inputs
    _, summed, rstd = output
    ctx.save_for_backward(summed, weight, rstd)  # type: ignore[arg-type]
    ctx.how = (x.dtype, residual.dtype, triton)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(rstd)
    # Where only one of the outputs is used, the other's gradient is not worth a tensor of zeros.
    ctx.set_materialize_grads(False)


def _add_norm_gradients(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, grad_summed: Tensor | None, _: Tensor
) -> tuple[Tensor | None, ...]:
    summed, weight, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
    of_x, of_residual, triton = ctx.how  # type: ignore[attr-defined]
    if grad is None:
        if grad_summed is None:
            return None, None, None, None, None
        return grad_summed.to(of_x), grad_summed.to(of_residual), None, None, None
    others = [dtype for dtype in (of_x, of_residual) if dtype != summed.dtype]
    narrow = others[0] if others else None
    ds, low, dweight = rms_norm_backward(grad, grad_summed, summed, weight, rstd, narrow, triton)
    dx, dresidual = (low if dtype == narrow else ds.to(dtype) for dtype in (of_x, of_residual))
    return dx, dresidual, dweight, None, None


def _save_gelu(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, bias, triton = inputs
    ctx.save_for_backward(x, bias)  # type: ignore[arg-type]
    ctx.how = triton  # type: ignore[attr-defined]


def _gelu_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dbias = quick_gelu_backward(grad, x, bias, ctx.how)  # type: ignore[attr-defined]
    return dx, None if bias is None else dbias, None


def _save_nothing(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """A second derivative is an error, so nothing is kept for it."""


def _no_second_derivative(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("rms_norm and quick_gelu have no second derivative; use backend='reference' where one is needed")


for _name, _run, _fake, _save, _backward in (
    ("rms_norm_forward", _norm, _norm_fake, _save_norm, _norm_gradients),
    ("add_rms_norm_forward", _add_norm, _add_norm_fake, _save_add_norm, _add_norm_gradients),
    ("rms_norm_backward", _norm_backward, _norm_backward_fake, _save_nothing, _no_second_derivative),
    ("quick_gelu_forward", _gelu, _gelu_fake, _save_gelu, _gelu_gradients),
    ("quick_gelu_backward", _gelu_backward, _gelu_backward_fake, _save_nothing, _no_second_derivative),
):
    # One function for every device: the argument says whether kernels are launched.
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"igpt_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"igpt_kernels::{_name}", _backward, setup_context=_save, lib=_library)
