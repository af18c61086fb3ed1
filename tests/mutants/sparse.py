"""Breaks of the kernels of block-sparse attention."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_sparse_kernels.py"

MUTANTS = (
    Mutant(
        "sparse: mask bits of the neighbour",
        "sparse_forward.py",
        "(word >> (cols % 32)[None, :])",
        "(word >> (cols % 31)[None, :])",
        "test_blocks",
    ),
    Mutant(
        "sparse: transposed bits of the neighbour",
        "sparse_forward.py",
        "(word >> (cols % 32)[:, None])",
        "(word >> (cols % 31)[:, None])",
        "test_blocks",
    ),
    Mutant(
        "sparse: first word for all keys",
        "sparse_forward.py",
        "(cols // 32 == i)[None, :]",
        "(cols // 32 == 99)[None, :]",
        "test_blocks",
    ),
    Mutant(
        "sparse: first word for all keys, transposed",
        "sparse_forward.py",
        "(cols // 32 == i)[:, None]",
        "(cols // 32 == 99)[:, None]",
        "test_blocks",
    ),
    Mutant(
        "sparse: mask ignored", "sparse_forward.py", "        if mask >= 0:", "        if mask >= 1000000:", "test_patterns"
    ),
    Mutant(
        "sparse: keys of the next grid row",
        "sparse_forward.py",
        "(first % pitch + col < pitch) & (token < T)",
        "token < T",
        "test_patterns",
    ),
    Mutant(
        "sparse: tokens beyond the image",
        "sparse_forward.py",
        "(first % pitch + col < pitch) & (token < T)",
        "first % pitch + col < pitch",
        "test_patterns",
    ),
    Mutant(
        "sparse: rows of a tile at a wrong pitch",
        "sparse_forward.py",
        "slots // cols * pitch + col",
        "slots // cols * (pitch + 1) + col",
        "test_patterns",
    ),
    Mutant(
        "sparse: last tile of a list left out",
        "sparse_forward.py",
        "tl.range(tl.load(Ptr + tile), tl.load(Ptr + tile + 1))",
        "tl.range(tl.load(Ptr + tile), tl.load(Ptr + tile + 1) - 1)",
        "test_patterns",
    ),
    Mutant("sparse: parts merged without weight", "sparse_forward.py", "before0 * theirs[:, None]", "before0", "test_patterns"),
    Mutant("sparse: parts' sum forgotten", "sparse_forward.py", "l = l * mine + theirs", "l = l * mine", "test_patterns"),
    Mutant(
        "sparse: second column part of parts forgotten",
        "sparse_forward.py",
        "acc1 = acc1 * mine[:, None] + before1 * theirs[:, None]",
        "acc1 = acc1 * mine[:, None]",
        "test_head_dims",
    ),
    Mutant(
        "sparse: accumulator not rescaled", "sparse_forward.py", "acc0 = acc0 * shrink[:, None]", "acc0 = acc0", "test_patterns"
    ),
    Mutant(
        "sparse: head map ignored",
        "sparse_forward.py",
        "h = tl.load(Heads + head % G).to(tl.int64)",
        "h = (head % G).to(tl.int64)",
        "test_every_head_its_own_pattern",
    ),
    Mutant("sparse: stride of v taken from k", "sparse_forward.py", "there * stride_vt", "there * stride_kt", "test_strides"),
    Mutant(
        "sparse: 32-bit row offsets",
        "sparse_forward.py",
        "there = token.to(tl.int64)",
        "there = token",
        "test_offsets_beyond_32_bits",
    ),
    Mutant(
        "sparse: earlier parts of dK forgotten",
        "sparse_backward.py",
        "if BeforeK is not None:",
        "if BeforeK is None and False:",
        "test_patterns",
    ),
    Mutant(
        "sparse: earlier parts of dQ forgotten",
        "sparse_backward.py",
        "if Before is not None:",
        "if Before is None and False:",
        "test_patterns",
    ),
    Mutant("sparse: dK scaled in every part", "sparse_backward.py", "scale if last else 1.0", "scale", "test_patterns"),
    Mutant("sparse: delta left out", "sparse_backward.py", "- delta[:, None])", "- 0 * delta[:, None])", "test_patterns"),
    Mutant(
        "sparse: backward mask ignored",
        "sparse_backward.py",
        "visible_pairs(Masks, mask, BLOCK_M, BLOCK_N, True)",
        "visible_pairs(Masks, -1, BLOCK_M, BLOCK_N, True)",
        "test_patterns",
    ),
    Mutant("sparse: second column part not added", "sparse_backward.py", "x1 = x1 + y1", "x1 = x1", "test_head_dims"),
    Mutant(
        "sparse decode: keys after the query",
        "sparse_decode.py",
        " & (token < n)",
        "",
        "test_decode_is_causal_without_a_causal_pattern",
    ),
    Mutant(
        "sparse decode: row of bits of another query",
        "sparse_decode.py",
        "element = y % q_rows * q_cols + x % q_cols",
        "element = x % q_cols",
        "test_decode",
    ),
    Mutant(
        "sparse decode: hidden keys read",
        "sparse_decode.py",
        "seen = exists & (((word >> (cols % 32)) & 1) != 0) & (token < n)",
        "seen = exists & (token < n)",
        "test_decode",
    ),
    Mutant(
        "sparse decode: splits overlap",
        "sparse_decode.py",
        "first = begin + split * chunk",
        "first = begin + split * chunk // 2",
        "test_decode_splits_long_lists",
    ),
    Mutant(
        "sparse decode: lengths not clamped",
        "sparse_decode.py",
        "tl.minimum(tl.maximum(tl.load(Lengths + batch).to(tl.int32), 0), T)",
        "tl.load(Lengths + batch).to(tl.int32)",
        "test_decode_clamps",
    ),
    Mutant(
        "memory: queries beyond the image read",
        "sparse_forward.py",
        "stride_qt, row_ok, stride_qd, D, DA, DB, DOT, True)",
        "stride_qt, row_ok, stride_qd, D, DA, DB, DOT, False)",
        "test_patterns",
    ),
    Mutant(
        "memory: lse beyond the image read",
        "sparse_backward.py",
        "tl.load(Lse + row_base + rows, mask=row_ok, other=0.0)",
        "tl.load(Lse + row_base + rows)",
        "test_patterns",
    ),
)
