"""Device functions that `tools.kernel_plan` puts in place of those that ship, to see which are faster."""

from __future__ import annotations

import triton
import triton.language as tl

from igpt_kernels._triton.common import accumulate, scores


@triton.jit
def key_step(
    q0, q1, g0, g1, k0, k1, v0, v1, lse, delta, dk0, dk1, dv0, dv1, visible, scale_log2, DB: tl.constexpr
):  # fmt: skip
    """`igpt_kernels._triton.flash_backward.key_step` with dP before the exponential, which then overlaps a product."""
    s = scores(k0, k1, q0, q1, DB)
    dp = scores(v0, v1, g0, g1, DB)
    p = tl.math.exp2(s * scale_log2 - lse[None, :])
    p = tl.where(visible, p, 0.0)
    dv0, dv1 = accumulate(p, g0, g1, dv0, dv1, DB)
    ds = p * (dp - delta[None, :])
    dk0, dk1 = accumulate(ds, q0, q1, dk0, dk1, DB)
    return dk0, dk1, dv0, dv1


@triton.jit
def query_step(
    q0, q1, g0, g1, k0, k1, v0, v1, lse, delta, dq0, dq1, visible, scale_log2, DB: tl.constexpr
):  # fmt: skip
    """`igpt_kernels._triton.flash_backward.query_step` with dP before the exponential."""
    s = scores(q0, q1, k0, k1, DB)
    dp = scores(g0, g1, v0, v1, DB)
    p = tl.math.exp2(s * scale_log2 - lse[:, None])
    p = tl.where(visible, p, 0.0)
    ds = p * (dp - delta[:, None])
    return accumulate(ds, k0, k1, dq0, dq1, DB)
