"""What surrounds attention in Image GPT, each in one pass: public functions that document, check, and choose a backend.

Letters: C width of a row, M rows (all dimensions but the last), V classes.
"""

from __future__ import annotations

from torch import Tensor

from igpt_kernels import backends, reference
from igpt_kernels.checks import check_beside, check_eps, check_rows


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of each row: ``x * rsqrt(mean(x^2) + eps) * weight``, the mean over the last dimension."""
    x = check_rows(x)
    weight = check_beside("weight", weight, x, x.shape[-1:])
    eps = check_eps(eps)
    if residual is not None:
        residual = check_beside("residual", residual, x, x.shape)
    table = backends.explain("rms_norm", dtype=x.dtype, device=x.device, width=x.shape[-1])
    backends.choose(backend, table, "rms_norm")
    return reference.rms_norm_reference(x, weight, eps=eps, residual=residual)


def quick_gelu(x: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Image GPT's activation: ``z * sigmoid(1.702 * z)`` with ``z = x + bias``."""
    x = check_rows(x)
    if bias is not None:
        bias = check_beside("bias", bias, x, x.shape[-1:])
    table = backends.explain("quick_gelu", dtype=x.dtype, device=x.device, width=x.shape[-1])
    backends.choose(backend, table, "quick_gelu")
    return reference.quick_gelu_reference(x, bias=bias)
