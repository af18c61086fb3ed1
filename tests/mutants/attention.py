"""Breaks of the kernels of dense attention."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_attention.py"

MUTANTS = (
    Mutant("causal mask off by one", "attention_forward.py", "<= (rows + offset)", "< (rows + offset)", "test_sizes"),
    Mutant("no mask beyond the last key", "attention_forward.py", "visible = col_ok[None, :] & ", "visible = ", "test_sizes"),
    Mutant(
        "unmasked loop one tile too long",
        "attention_forward.py",
        "first + offset + 1, 0)",
        "first + offset + BLOCK_N, 0)",
        "test_sizes",
    ),
    Mutant("accumulator not rescaled", "attention_forward.py", "acc0 = acc0 * shrink[:, None]", "acc0 = acc0", "test_sizes"),
    Mutant(
        "second part not rescaled", "attention_forward.py", "acc1 = acc1 * shrink[:, None]", "acc1 = acc1", "test_head_dims"
    ),
    Mutant("sum not rescaled", "attention_forward.py", "l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", "test_sizes"),
    Mutant("lse in units of log2", "attention_forward.py", "tl.math.log2(l)) * LN2", "tl.math.log2(l))", "test_sizes"),
    Mutant(
        "stride of v taken from k",
        "attention_forward.py",
        "cols.to(tl.int64) * stride_vt",
        "cols.to(tl.int64) * stride_kt",
        "test_strides",
    ),
    Mutant(
        "32-bit row offsets",
        "attention_forward.py",
        "rows.to(tl.int64) * stride_qt",
        "rows * stride_qt",
        "test_offsets_beyond_32_bits",
    ),
    Mutant(
        "second product of scores dropped",
        "common.py",
        "        s = tl.dot(a1, tl.trans(b1), s",
        "        s = tl.dot(a1, tl.trans(b1), 0 * s",
        "test_head_dims",
    ),
    Mutant(
        "column bound dropped",
        "common.py",
        "mask=row_ok[:, None] & (cols < D)[None, :]",
        "mask=row_ok[:, None]",
        "test_head_dims",
    ),
    Mutant(
        "output columns beyond D written", "common.py", "mask = mask & (cols < D)[None, :]", "mask = mask", "test_head_dims"
    ),
    Mutant(
        "a tile given to two programs",
        "common.py",
        "pid - first * tiles",
        "pid - first",
        "test_every_tile_of_every_head_has_one_program",
    ),
    Mutant("delta left out", "attention_backward.py", "- delta[None, :])", "- 0 * delta[None, :])", "test_sizes"),
    Mutant("delta left out of dQ", "attention_backward.py", "- delta[:, None])", "- 0 * delta[:, None])", "test_sizes"),
    Mutant("dK without the scale", "attention_backward.py", "dk0 * scale", "dk0", "test_sizes"),
    Mutant("dQ without the scale", "attention_backward.py", "dq0 * scale", "dq0", "test_sizes"),
    Mutant(
        "backward mask off by one", "attention_backward.py", "cols[:, None] <= (start", "cols[:, None] < (start", "test_sizes"
    ),
    Mutant(
        "backward starts a tile late",
        "attention_backward.py",
        "// BLOCK_M * BLOCK_M, Tq, BLOCK_M)",
        "// BLOCK_M * BLOCK_M + BLOCK_M, Tq, BLOCK_M)",
        "test_sizes",
    ),
    Mutant(
        "rows beyond the end loaded",
        "attention_backward.py",
        "row_ok = start + rows < Tq",
        "row_ok = start + rows < Tq + 1",
        "test_sizes",
    ),
    Mutant(
        "one box of queries for all",
        "attention_backward.py",
        "load_box(Q, Q1, batch, h, 0, start,",
        "load_box(Q, Q1, batch, h, 0, first,",
        "test_descriptors",
    ),
    Mutant(
        "one box of values for all",
        "attention_backward.py",
        "load_box(V, V1, batch, h, 0, start,",
        "load_box(V, V1, batch, h, 0, first,",
        "test_descriptors",
    ),
    Mutant("delta from the box of lse", "attention_backward.py", "load_rows(Delta, ", "load_rows(Lse, ", "test_descriptors"),
    Mutant("second part of a box is the first", "common.py", "y, x, DA])", "y, x, 0])", "test_descriptors"),
    Mutant("boxes of rows that are not aligned", "descriptors.py", " or pitch * 4 % ALIGNMENT:", ":", "test_descriptors"),
    Mutant(
        "decode reads one key too many",
        "decode.py",
        "seen = start + slots < last",
        "seen = start + slots <= last",
        "test_decode",
    ),
    Mutant("splits overlap", "decode.py", "first = split * chunk", "first = split * chunk // 2", "test_decode"),
    Mutant("merge without weights", "decode.py", "acc * weight[:, None]", "acc", "test_decode"),
    Mutant(
        "lengths not clamped",
        "decode.py",
        "tl.minimum(tl.maximum(tl.load(Lengths + batch).to(tl.int32), 0), Tmax)",
        "tl.load(Lengths + batch).to(tl.int32)",
        "test_decode_clamps",
    ),
    Mutant(
        "memory: queries beyond the last read",
        "attention_forward.py",
        "stride_qt, row_ok, stride_qd, D, DA, DB, DOT, True)",
        "stride_qt, row_ok, stride_qd, D, DA, DB, DOT, False)",
        "test_sizes",
    ),
    Mutant(
        "memory: lse beyond the last row read",
        "attention_backward.py",
        "tl.load(Lse + head.to(tl.int64) * Tq + rows, mask=row_ok, other=0.0)",
        "tl.load(Lse + head.to(tl.int64) * Tq + rows)",
        "test_sizes",
    ),
    Mutant(
        "memory: gradients beyond the last row read",
        "attention_backward.py",
        "row_offset * stride_gt, row_ok, stride_gd, D, 0, WIDTH, True)",
        "row_offset * stride_gt, row_ok, stride_gd, D, 0, WIDTH, False)",
        "test_sizes",
    ),
)
