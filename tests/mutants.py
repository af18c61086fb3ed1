"""Break the kernels one line at a time, in a copy, and show which test catches each break: ``make mutants``.

A suite that stays green with a broken kernel is no suite. Each row names the one test that must fail; a break that gets
through, or a line that is no longer there, makes the command fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/interpreter/test_attention_kernels.py"
SPARSE = "tests/interpreter/test_sparse_kernels.py"
LOSS = "tests/interpreter/test_loss_kernels.py"
FUSED = "tests/interpreter/test_fused_kernels.py"
CSRC = "tests/igpt_kernels/test_csrc.py"
DEVICE = "../../csrc/palette_device.h"


@dataclass(frozen=True)
class Mutant:
    """One break: replace `old` (all its places) by `new` in a file, its path from igpt_kernels/_triton, and run `test`."""

    what: str
    file: str
    old: str
    new: str
    test: str
    tests: str = TESTS


MUTANTS = (
    Mutant("causal mask off by one", "flash_forward.py", "<= (rows + offset)", "< (rows + offset)", "test_sizes"),
    Mutant("no mask beyond the last key", "flash_forward.py", "visible = col_ok[None, :] & ", "visible = ", "test_sizes"),
    Mutant(
        "unmasked loop one tile too long",
        "flash_forward.py",
        "first + offset + 1, 0)",
        "first + offset + BLOCK_N, 0)",
        "test_sizes",
    ),
    Mutant("accumulator not rescaled", "flash_forward.py", "acc0 = acc0 * shrink[:, None]", "acc0 = acc0", "test_sizes"),
    Mutant("second part not rescaled", "flash_forward.py", "acc1 = acc1 * shrink[:, None]", "acc1 = acc1", "test_head_dims"),
    Mutant("sum not rescaled", "flash_forward.py", "l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", "test_sizes"),
    Mutant("lse in units of log2", "flash_forward.py", "tl.math.log2(l)) * LN2", "tl.math.log2(l))", "test_sizes"),
    Mutant(
        "stride of v taken from k",
        "flash_forward.py",
        "cols.to(tl.int64) * stride_vt",
        "cols.to(tl.int64) * stride_kt",
        "test_strides",
    ),
    Mutant(
        "32-bit row offsets",
        "flash_forward.py",
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
    Mutant("delta left out", "flash_backward.py", "- delta[None, :])", "- 0 * delta[None, :])", "test_sizes"),
    Mutant("delta left out of dQ", "flash_backward.py", "- delta[:, None])", "- 0 * delta[:, None])", "test_sizes"),
    Mutant("dK without the scale", "flash_backward.py", "dk0 * scale", "dk0", "test_sizes"),
    Mutant("dQ without the scale", "flash_backward.py", "dq0 * scale", "dq0", "test_sizes"),
    Mutant("backward mask off by one", "flash_backward.py", "cols[:, None] <= (start", "cols[:, None] < (start", "test_sizes"),
    Mutant(
        "backward starts a tile late",
        "flash_backward.py",
        "// BLOCK_M * BLOCK_M, Tq, BLOCK_M)",
        "// BLOCK_M * BLOCK_M + BLOCK_M, Tq, BLOCK_M)",
        "test_sizes",
    ),
    Mutant(
        "rows beyond the end loaded",
        "flash_backward.py",
        "row_ok = start + rows < Tq",
        "row_ok = start + rows < Tq + 1",
        "test_sizes",
    ),
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
        "sparse: mask bits of the neighbour",
        "sparse_forward.py",
        "(word >> (cols % 32)[None, :])",
        "(word >> (cols % 31)[None, :])",
        "test_blocks",
        SPARSE,
    ),
    Mutant(
        "sparse: transposed bits of the neighbour",
        "sparse_forward.py",
        "(word >> (cols % 32)[:, None])",
        "(word >> (cols % 31)[:, None])",
        "test_blocks",
        SPARSE,
    ),
    Mutant(
        "sparse: first word for all keys",
        "sparse_forward.py",
        "(cols // 32 == i)[None, :]",
        "(cols // 32 == 99)[None, :]",
        "test_blocks",
        SPARSE,
    ),
    Mutant(
        "sparse: first word for all keys, transposed",
        "sparse_forward.py",
        "(cols // 32 == i)[:, None]",
        "(cols // 32 == 99)[:, None]",
        "test_blocks",
        SPARSE,
    ),
    Mutant(
        "sparse: mask ignored",
        "sparse_forward.py",
        "        if mask >= 0:",
        "        if mask >= 1000000:",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: keys of the next grid row",
        "sparse_forward.py",
        "(first % pitch + col < pitch) & (token < T)",
        "token < T",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: tokens beyond the image",
        "sparse_forward.py",
        "(first % pitch + col < pitch) & (token < T)",
        "first % pitch + col < pitch",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: rows of a tile at a wrong pitch",
        "sparse_forward.py",
        "slots // cols * pitch + col",
        "slots // cols * (pitch + 1) + col",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: last tile of a list left out",
        "sparse_forward.py",
        "tl.range(tl.load(Ptr + tile), tl.load(Ptr + tile + 1))",
        "tl.range(tl.load(Ptr + tile), tl.load(Ptr + tile + 1) - 1)",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: parts merged without weight",
        "sparse_forward.py",
        "before0 * theirs[:, None]",
        "before0",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: parts' sum forgotten", "sparse_forward.py", "l = l * mine + theirs", "l = l * mine", "test_patterns", SPARSE
    ),
    Mutant(
        "sparse: second column part of parts forgotten",
        "sparse_forward.py",
        "acc1 = acc1 * mine[:, None] + before1 * theirs[:, None]",
        "acc1 = acc1 * mine[:, None]",
        "test_head_dims",
        SPARSE,
    ),
    Mutant(
        "sparse: accumulator not rescaled",
        "sparse_forward.py",
        "acc0 = acc0 * shrink[:, None]",
        "acc0 = acc0",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: head map ignored",
        "sparse_forward.py",
        "h = tl.load(Heads + head % G).to(tl.int64)",
        "h = (head % G).to(tl.int64)",
        "test_every_head_its_own_pattern",
        SPARSE,
    ),
    Mutant(
        "sparse: stride of v taken from k",
        "sparse_forward.py",
        "there * stride_vt",
        "there * stride_kt",
        "test_strides",
        SPARSE,
    ),
    Mutant(
        "sparse: 32-bit row offsets",
        "sparse_forward.py",
        "there = token.to(tl.int64)",
        "there = token",
        "test_offsets_beyond_32_bits",
        SPARSE,
    ),
    Mutant(
        "sparse: earlier parts of dK forgotten",
        "sparse_backward.py",
        "if BeforeK is not None:",
        "if BeforeK is None and False:",
        "test_patterns",
        SPARSE,
    ),
    Mutant(
        "sparse: earlier parts of dQ forgotten",
        "sparse_backward.py",
        "if Before is not None:",
        "if Before is None and False:",
        "test_patterns",
        SPARSE,
    ),
    Mutant("sparse: dK scaled in every part", "sparse_backward.py", "scale if last else 1.0", "scale", "test_patterns", SPARSE),
    Mutant(
        "sparse: delta left out", "sparse_backward.py", "- delta[:, None])", "- 0 * delta[:, None])", "test_patterns", SPARSE
    ),
    Mutant(
        "sparse: backward mask ignored",
        "sparse_backward.py",
        "visible_pairs(Masks, mask, BLOCK_M, BLOCK_N, True)",
        "visible_pairs(Masks, -1, BLOCK_M, BLOCK_N, True)",
        "test_patterns",
        SPARSE,
    ),
    Mutant("sparse: second column part not added", "sparse_backward.py", "x1 = x1 + y1", "x1 = x1", "test_head_dims", SPARSE),
    Mutant(
        "sparse decode: keys after the query",
        "sparse_decode.py",
        " & (token < n)",
        "",
        "test_decode_is_causal_without_a_causal_pattern",
        SPARSE,
    ),
    Mutant(
        "sparse decode: row of bits of another query",
        "sparse_decode.py",
        "element = y % q_rows * q_cols + x % q_cols",
        "element = x % q_cols",
        "test_decode",
        SPARSE,
    ),
    Mutant(
        "sparse decode: hidden keys read",
        "sparse_decode.py",
        "seen = exists & (((word >> (cols % 32)) & 1) != 0) & (token < n)",
        "seen = exists & (token < n)",
        "test_decode",
        SPARSE,
    ),
    Mutant(
        "sparse decode: splits overlap",
        "sparse_decode.py",
        "first = begin + split * chunk",
        "first = begin + split * chunk // 2",
        "test_decode_splits_long_lists",
        SPARSE,
    ),
    Mutant(
        "sparse decode: lengths not clamped",
        "sparse_decode.py",
        "tl.minimum(tl.maximum(tl.load(Lengths + batch).to(tl.int32), 0), T)",
        "tl.load(Lengths + batch).to(tl.int32)",
        "test_decode_clamps",
        SPARSE,
    ),
    Mutant(
        "loss: last class of a tile left out",
        "linear_cross_entropy.py",
        "cols < V)[None, :], s",
        "cols < V - 1)[None, :], s",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: classes beyond the last counted",
        "linear_cross_entropy.py",
        's = tl.where((cols < V)[None, :], s, float("-inf"))',
        "s = s",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: sum not rescaled",
        "linear_cross_entropy.py",
        "l = l * tl.math.exp2((m - finite) * LOG2E) + ",
        "l = l + ",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: a first tile of -inf",
        "linear_cross_entropy.py",
        'tl.where(m_new == float("-inf"), 0.0, m_new)',
        "m_new",
        "test_classes_switched_off",
        LOSS,
    ),
    Mutant(
        "loss: target of another column",
        "linear_cross_entropy.py",
        "cols[None, :] == target[:, None], s, 0.0",
        "cols[None, :] == target[:, None] + 1, s, 0.0",
        "test_sizes",
        LOSS,
    ),
    Mutant("loss: z-loss not squared", "linear_cross_entropy.py", "z_loss * lse * lse", "z_loss * lse", "test_z_loss", LOSS),
    Mutant(
        "loss: z-loss without its gradient",
        "linear_cross_entropy.py",
        "(1.0 + 2.0 * z_loss * lse)",
        "(1.0 + z_loss * lse)",
        "test_z_loss",
        LOSS,
    ),
    Mutant(
        "loss: one-hot not subtracted",
        "linear_cross_entropy.py",
        "target[:, None], grad[:, None], 0.0",
        "target[:, None], 0.0, 0.0",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: ignored rows not masked",
        "linear_cross_entropy.py",
        "d = tl.where(counts[:, None], d, 0.0)",
        "d = d",
        "test_no_row_counts",
        LOSS,
    ),
    Mutant(
        "loss: no class taken for class 0",
        "linear_cross_entropy.py",
        "(target < V), target, -1)",
        "(target < V), target, 0)",
        "test_a_target_that_is_no_class",
        LOSS,
    ),
    Mutant(
        "loss: target narrowed before it is looked at",
        "linear_cross_entropy.py",
        "stride_t, mask=row_ok, other=0)\n",
        "stride_t, mask=row_ok, other=0).to(tl.int32)\n",
        "test_a_target_that_is_no_class",
        LOSS,
    ),
    Mutant(
        "loss: end of a row not masked",
        "linear_cross_entropy.py",
        "            w = tl.load(w_ptrs, mask=ok, other=0.0)",
        "            w = tl.load(w_ptrs)",
        "test_widths",
        LOSS,
    ),
    Mutant(
        "loss: stride of the target ignored",
        "linear_cross_entropy.py",
        "rows.to(tl.int64) * stride_t",
        "rows.to(tl.int64)",
        "test_strides",
        LOSS,
    ),
    Mutant(
        "loss: stride of weight taken from hidden",
        "linear_cross_entropy.py",
        "at * stride_wc",
        "at * stride_hc",
        "test_strides",
        LOSS,
    ),
    Mutant(
        "loss: 32-bit row offsets",
        "linear_cross_entropy.py",
        "(rows.to(tl.int64) * stride_hm)",
        "(rows * stride_hm)",
        "test_offsets_beyond_32_bits",
        LOSS,
    ),
    Mutant(
        "loss: rows of the next tile of classes",
        "linear_cross_entropy.py",
        "tl.program_id(0) // tiles * BLOCK_M",
        "tl.program_id(0) % tiles * BLOCK_M",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: columns beyond the last written",
        "linear_cross_entropy.py",
        "row_ok[:, None] & (cols < V)[None, :]",
        "row_ok[:, None]",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: rows beyond the last written",
        "linear_cross_entropy.py",
        "tl.store(Lse + rows, lse, mask=row_ok)",
        "tl.store(Lse + rows, lse)",
        "test_sizes",
        LOSS,
    ),
    Mutant(
        "loss: part of dweight forgotten",
        "linear_cross_entropy.py",
        "add_product(total, out.t(), some)",
        "add_product(total.zero_(), out.t(), some)",
        "test_chunks",
        LOSS,
    ),
    Mutant(
        "loss: dhidden of the first rows only",
        "linear_cross_entropy.py",
        "out=dhidden[part]",
        "out=dhidden[:size]",
        "test_chunks",
        LOSS,
    ),
    Mutant(
        "loss: stride of the gradient ignored",
        "linear_cross_entropy.py",
        "rows.to(tl.int64) * stride_g",
        "rows.to(tl.int64)",
        "test_strides",
        LOSS,
    ),
    Mutant(
        "loss: 32-bit offsets of classes",
        "linear_cross_entropy.py",
        "(cols.to(tl.int64) * stride_wv)",
        "(cols * stride_wv)",
        "test_offsets_beyond_32_bits",
        LOSS,
    ),
    Mutant(
        "loss: 32-bit offsets of columns",
        "linear_cross_entropy.py",
        "(k.to(tl.int64) * stride_hc)",
        "(k * stride_hc)",
        "test_offsets_beyond_32_bits",
        LOSS,
    ),
    Mutant(
        "norm: weight left out",
        "rms_norm.py",
        "C, normed * weight[None, :], FULL",
        "C, normed, FULL",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "norm: sum instead of mean",
        "rms_norm.py",
        "tl.sum(s * s, 1) / C + eps",
        "tl.sum(s * s, 1) + eps",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "norm: mean over the tile, not the row",
        "rms_norm.py",
        "tl.sum(s * s, 1) / C + eps",
        "tl.sum(s * s, 1) / BLOCK_N + eps",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "norm: eps outside of the root",
        "rms_norm.py",
        "tl.rsqrt(tl.sum(s * s, 1) / C + eps)",
        "tl.rsqrt(tl.sum(s * s, 1) / C) + eps",
        "test_norm_eps",
        FUSED,
    ),
    Mutant(
        "norm: sum not rounded as it is stored",
        "rms_norm.py",
        "s = s.to(Summed.dtype.element_ty).to(tl.float32)",
        "s = s + 0.0",
        "test_norm_is_that_of_the_sum",
        FUSED,
    ),
    Mutant(
        "norm: projection left out of dx",
        "rms_norm.py",
        "grad - normed * (tl.sum(grad * normed, 1) / C)[:, None]",
        "grad",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "norm: dx without rstd",
        "rms_norm.py",
        "(tl.sum(grad * normed, 1) / C)[:, None]) * rstd",
        "(tl.sum(grad * normed, 1) / C)[:, None])",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "norm: gradient of the sum left out",
        "rms_norm.py",
        "            ds += more",
        "            ds += 0 * more",
        "test_norm_with_a_residual",
        FUSED,
    ),
    Mutant("norm: programs walk over the same rows", "rms_norm.py", "tl.num_programs(0)):", "1):", "test_norm_rows", FUSED),
    Mutant(
        "norm: stride of the gradient taken from s",
        "rms_norm.py",
        "load_rows(Grad, at * stride_g,",
        "load_rows(Grad, at * stride_s,",
        "test_norm_strides",
        FUSED,
    ),
    Mutant("norm: 32-bit rows", "rms_norm.py", "at = row.to(tl.int64)", "at = row", "test_offsets_beyond_32_bits", FUSED),
    Mutant(
        "rows: columns beyond the width written",
        "rows.py",
        "mask = mask & (cols < C)[None, :]\n    tl.store",
        "mask = mask & (cols <= C)[None, :]\n    tl.store",
        "test_norm_widths",
        FUSED,
    ),
    Mutant(
        "rows: last partial sum left out",
        "rows.py",
        "ok = (part < parts)[:, None]",
        "ok = (part < parts - 1)[:, None]",
        "test_sums_of_partials",
        FUSED,
    ),
    Mutant(
        "gelu: factor 1.7",
        "quick_gelu.py",
        "tl.math.exp2(z * (-1.702 * LOG2E))",
        "tl.math.exp2(z * (-1.7 * LOG2E))",
        "test_gelu_widths",
        FUSED,
    ),
    Mutant(
        "gelu: slope without its second term",
        "quick_gelu.py",
        "t * (1.0 + 1.702 * z * (1.0 - t))",
        "t",
        "test_gelu_widths",
        FUSED,
    ),
    Mutant(
        "gelu: bias left out backward",
        "quick_gelu.py",
        "            z += bias",
        "            z += 0 * bias",
        "test_gelu_widths",
        FUSED,
    ),
    Mutant(
        "gelu: bias of the first columns for all",
        "quick_gelu.py",
        "z += tl.load(Bias + cols, mask",
        "z += tl.load(Bias + cols % BLOCK_N, mask",
        "test_gelu_rows or test_random_shapes",
        FUSED,
    ),
    Mutant(
        "gelu: walkers start at the same tile",
        "quick_gelu.py",
        "range(walker, tl.cdiv",
        "range(0, tl.cdiv",
        "test_gelu_rows",
        FUSED,
    ),
    Mutant(
        "CUDA lookup: reads beyond a run",
        DEVICE,
        "begin + kUnit + 4 <= view.run",
        "begin + kUnit <= view.run",
        "test_fuzz",
        CSRC,
    ),
    Mutant(
        "CUDA lookup: last unit taken as whole",
        DEVICE,
        "if (begin + kUnit > view.run) {",
        "if (begin + kUnit >= view.run + 2) {",
        "test_fuzz",
        CSRC,
    ),
    Mutant(
        "CUDA lookup: wide stores to odd places",
        DEVICE,
        "if (misalignment(to, 16) == 0) {",
        "if (misalignment(to, 8) == 0) {",
        "test_fuzz",
        CSRC,
    ),
    Mutant("CUDA lookup: red and blue exchanged", DEVICE, "<< (16 - 8 * channel)", "<< (8 * channel)", "test_fuzz", CSRC),
    Mutant(
        "CUDA pixels: one too many at the end", DEVICE, "if (i < length - begin)", "if (i <= length - begin)", "test_fuzz", CSRC
    ),
    Mutant(
        "CUDA pixels: a token of V let through",
        DEVICE,
        "< static_cast<uint64_t>(size);",
        "<= static_cast<uint64_t>(size);",
        "test_fuzz",
        CSRC,
    ),
    Mutant("CUDA table: ties to the highest index", DEVICE, "far < own.least[i]", "far <= own.least[i]", "test_fuzz", CSRC),
    Mutant(
        "CUDA table: candidates dropped too soon",
        DEVICE,
        "- 2 * half * spread > slack",
        "- half * spread > slack",
        "test_fuzz",
        CSRC,
    ),
    Mutant("CUDA table: sum in another order", DEVICE, "(r * r + g * g) + b * b", "r * r + (g * g + b * b)", "test_fuzz", CSRC),
    Mutant(
        "CUDA table: room for candidates overrun",
        DEVICE,
        "if (kept <= kKept - kTeam &&",
        "if (kept <= kKept &&",
        "test_fuzz",
        CSRC,
    ),
    Mutant(
        "CPU lookup: reads beyond the pixels",
        "../../csrc/palette.cpp",
        "i < count - 1; ++i",
        "i < count; ++i",
        "test_fuzz",
        CSRC,
    ),
)


def caught(mutant: Mutant, copy: Path) -> str:
    """The first test that fails with this break, or an empty string. The copy is whole again afterwards."""
    path = copy / "igpt_kernels" / "_triton" / mutant.file
    source = path.read_text(encoding="utf-8")
    if mutant.old not in source:
        raise SystemExit(f"{mutant.file} has no {mutant.old!r} to break ({mutant.what})")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        mutant.tests,
        "-k",
        mutant.test,
    ]
    try:
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, check=False,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise SystemExit(f"{mutant.what}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line.split(" - ")[0].rpartition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0] if failed else "the process died" if done.returncode < 0 else ""


def main() -> int:
    """Print the table; 1 if a break got through."""
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("igpt_kernels", "tests", "igpt", "csrc", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "Makefile"):
            shutil.copy(ROOT / name, copy)
        for mutant in MUTANTS:
            test = caught(mutant, copy)
            survived += not test
            print(f"{Path(mutant.file).name:18} {mutant.what:38} {'caught by ' + test if test else 'SURVIVED'}", flush=True)
    print(f"{len(MUTANTS) - survived} of {len(MUTANTS)} breaks caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
