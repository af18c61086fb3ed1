"""Breaks of the kernels of norm and activation."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_fused_kernels.py"

MUTANTS = (
    Mutant("norm: weight left out", "rms_norm.py", "C, normed * weight[None, :], FULL", "C, normed, FULL", "test_norm_widths"),
    Mutant(
        "norm: sum instead of mean", "rms_norm.py", "tl.sum(s * s, 1) / C + eps", "tl.sum(s * s, 1) + eps", "test_norm_widths"
    ),
    Mutant(
        "norm: mean over the tile, not the row",
        "rms_norm.py",
        "tl.sum(s * s, 1) / C + eps",
        "tl.sum(s * s, 1) / BLOCK_N + eps",
        "test_norm_widths",
    ),
    Mutant(
        "norm: eps outside of the root",
        "rms_norm.py",
        "tl.rsqrt(tl.sum(s * s, 1) / C + eps)",
        "tl.rsqrt(tl.sum(s * s, 1) / C) + eps",
        "test_norm_eps",
    ),
    Mutant(
        "norm: sum not rounded as it is stored",
        "rms_norm.py",
        "s = s.to(Summed.dtype.element_ty).to(tl.float32)",
        "s = s + 0.0",
        "test_norm_is_that_of_the_sum",
    ),
    Mutant(
        "norm: projection left out of dx",
        "rms_norm.py",
        "grad - normed * (tl.sum(grad * normed, 1) / C)[:, None]",
        "grad",
        "test_norm_widths",
    ),
    Mutant(
        "norm: dx without rstd",
        "rms_norm.py",
        "(tl.sum(grad * normed, 1) / C)[:, None]) * rstd",
        "(tl.sum(grad * normed, 1) / C)[:, None])",
        "test_norm_widths",
    ),
    Mutant(
        "norm: gradient of the sum left out",
        "rms_norm.py",
        "            ds += more",
        "            ds += 0 * more",
        "test_norm_with_a_residual",
    ),
    Mutant("norm: programs walk over the same rows", "rms_norm.py", "tl.num_programs(0)):", "1):", "test_norm_rows"),
    Mutant(
        "norm: stride of the gradient taken from s",
        "rms_norm.py",
        "load_rows(Grad, at * stride_g,",
        "load_rows(Grad, at * stride_s,",
        "test_norm_strides",
    ),
    Mutant("norm: 32-bit rows", "rms_norm.py", "at = row.to(tl.int64)", "at = row", "test_offsets_beyond_32_bits"),
    Mutant(
        "rows: columns beyond the width written",
        "rows.py",
        "mask = mask & (cols < C)[None, :]\n    tl.store",
        "mask = mask & (cols <= C)[None, :]\n    tl.store",
        "test_norm_widths",
    ),
    Mutant(
        "rows: last partial sum left out",
        "rows.py",
        "ok = (part < parts)[:, None]",
        "ok = (part < parts - 1)[:, None]",
        "test_sums_of_partials",
    ),
    Mutant(
        "gelu: factor 1.7",
        "quick_gelu.py",
        "tl.math.exp2(z * (-1.702 * LOG2E))",
        "tl.math.exp2(z * (-1.7 * LOG2E))",
        "test_gelu_widths",
    ),
    Mutant(
        "gelu: slope without its second term", "quick_gelu.py", "t * (1.0 + 1.702 * z * (1.0 - t))", "t", "test_gelu_widths"
    ),
    Mutant(
        "gelu: bias left out backward",
        "quick_gelu.py",
        "            z += bias",
        "            z += 0 * bias",
        "test_gelu_widths",
    ),
    Mutant(
        "gelu: bias of the first columns for all",
        "quick_gelu.py",
        "z += tl.load(Bias + cols, mask",
        "z += tl.load(Bias + cols % BLOCK_N, mask",
        "test_gelu_rows or test_random_shapes",
    ),
    Mutant(
        "gelu: walkers start at the same tile", "quick_gelu.py", "range(walker, tl.cdiv", "range(0, tl.cdiv", "test_gelu_rows"
    ),
    Mutant(
        "memory: weights beyond the row read",
        "rms_norm.py",
        "tl.load(Weight + cols, mask=cols < C, other=0.0)",
        "tl.load(Weight + cols)",
        "test_norm_widths",
    ),
    Mutant(
        "memory: last tile of rows stored over the one before",
        "rms_norm.py",
        "row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "row = tl.maximum(tl.minimum(tl.program_id(0) * BLOCK_M, rows - BLOCK_M), 0) + tl.arange(0, BLOCK_M)",
        "test_norm_rows",
    ),
    Mutant(
        "memory: values beyond the last read",
        "quick_gelu.py",
        "z = tl.load(X + at, mask=ok, other=0.0)",
        "z = tl.load(X + at)",
        "test_gelu",
    ),
)
