"""Breaks of the kernels of the norm."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_norm.py"

MUTANTS = (
    Mutant("norm: weight left out", "norm.py", "C, normed * weight[None, :], FULL", "C, normed, FULL", "test_widths"),
    Mutant("norm: sum instead of mean", "norm.py", "tl.sum(s * s, 1) / C + eps", "tl.sum(s * s, 1) + eps", "test_widths"),
    Mutant(
        "norm: mean over the tile, not the row",
        "norm.py",
        "tl.sum(s * s, 1) / C + eps",
        "tl.sum(s * s, 1) / BLOCK_N + eps",
        "test_widths",
    ),
    Mutant(
        "norm: eps outside of the root",
        "norm.py",
        "tl.rsqrt(tl.sum(s * s, 1) / C + eps)",
        "tl.rsqrt(tl.sum(s * s, 1) / C) + eps",
        "test_eps",
    ),
    Mutant(
        "norm: sum not rounded as it is stored",
        "norm.py",
        "s = s.to(Summed.dtype.element_ty).to(tl.float32)",
        "s = s + 0.0",
        "test_norm_is_that_of_the_sum",
    ),
    Mutant(
        "norm: projection left out of dx",
        "norm.py",
        "grad - normed * (tl.sum(grad * normed, 1) / C)[:, None]",
        "grad",
        "test_widths",
    ),
    Mutant(
        "norm: dx without rstd",
        "norm.py",
        "(tl.sum(grad * normed, 1) / C)[:, None]) * rstd",
        "(tl.sum(grad * normed, 1) / C)[:, None])",
        "test_widths",
    ),
    Mutant(
        "norm: gradient of the sum left out",
        "norm.py",
        "            ds += more",
        "            ds += 0 * more",
        "test_with_a_residual",
    ),
    Mutant("norm: programs walk over the same rows", "norm.py", "tl.num_programs(0)):", "1):", "test_rows"),
    Mutant(
        "norm: stride of the gradient taken from s",
        "norm.py",
        "load_rows(Grad, row_offset * stride_g,",
        "load_rows(Grad, row_offset * stride_s,",
        "test_strides",
    ),
    Mutant("norm: 32-bit rows", "norm.py", "row_offset = row.to(tl.int64)", "row_offset = row", "test_offsets_beyond_32_bits"),
    Mutant(
        "rows: columns beyond the width written",
        "rows.py",
        "mask = mask & (cols < C)[None, :]\n    tl.store",
        "mask = mask & (cols <= C)[None, :]\n    tl.store",
        "test_widths",
    ),
    Mutant(
        "memory: weights beyond the row read",
        "norm.py",
        "tl.load(Weight + cols, mask=cols < C, other=0.0)",
        "tl.load(Weight + cols)",
        "test_widths",
    ),
    Mutant(
        "memory: last tile of rows stored over the one before",
        "norm.py",
        "row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "row = tl.maximum(tl.minimum(tl.program_id(0) * BLOCK_M, rows - BLOCK_M), 0) + tl.arange(0, BLOCK_M)",
        "test_rows",
    ),
)
