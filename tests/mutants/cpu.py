"""Breaks of the CPU kernels in C++, and of how their work is shared."""

from tests.mutants.mutant import Mutant

TESTS = "tests/csrc/test_cpu.py"
_LOSS, _DECODE, _VECTOR, _AVX512 = (f"../../csrc/cpu/{name}.inc" for name in ("loss", "decode", "vector", "avx512"))

MUTANTS = (
    Mutant("exponential: one term less", _VECTOR, "p = multiply_add(p, f, splat(0.0416647755f));", "", "test_fuzz"),
    Mutant("exponential: -inf is not 0", _VECTOR, "x = larger(splat(-104.0f), x);", "", "test_fuzz"),
    Mutant("exponential: low part of ln 2 left out", _VECTOR, "multiply_add(n, splat(-kLn2Low), ", "(", "test_fuzz"),
    Mutant("exponential: another number for ln 2", _VECTOR, "0.693147182f", "0.693359375f", "test_fuzz"),
    Mutant("power: one step for tiny results", _VECTOR, "half = whole >> 1", "half = whole", "test_fuzz"),
    Mutant(
        "load of some lanes: one too many",
        _VECTOR,
        "std::memcpy(some, from, count *",
        "std::memcpy(some, from, (count + 1) *",
        "test_fuzz",
    ),
    Mutant(
        "store of some lanes: one too many",
        _VECTOR,
        "std::memcpy(to, some, count *",
        "std::memcpy(to, some, (count + 1) *",
        "test_fuzz",
    ),
    Mutant("bfloat16: rounded down", _VECTOR, "bits + 0x7FFF + odd", "bits", "test_fuzz"),
    Mutant(
        "bfloat16: NaN lost", _VECTOR, "x == x ? bits + 0x7FFF + odd : Words{} + 0x7FC00000", "bits + 0x7FFF + odd", "test_fuzz"
    ),
    Mutant(
        "bfloat16 of AVX-512: rounded down", _AVX512, "_mm512_srli_epi32(kept, 16)", "_mm512_srli_epi32(bits, 16)", "test_fuzz"
    ),
    Mutant(
        "bfloat16 of AVX-512: halves not to even",
        _AVX512,
        "_mm512_mask_add_epi32(below_half, odd,",
        "_mm512_mask_add_epi32(below_half, 0xFFFF,",
        "test_fuzz",
    ),
    Mutant(
        "bfloat16 of AVX-512: NaN lost",
        _AVX512,
        "_mm512_mask_mov_epi32(rounded, nan,",
        "_mm512_mask_mov_epi32(rounded, 0,",
        "test_fuzz",
    ),
    Mutant("scale: what is 0 is multiplied", _LOSS, "x == 0.0f ? x : x * factor", "x * factor", "test_fuzz"),
    Mutant(
        "scale: begins with the first value",
        _LOSS,
        "static_cast<BFloat16*>(values) + begin",
        "static_cast<BFloat16*>(values)",
        "test_fuzz",
    ),
    Mutant(
        "scale: the last values left out",
        _LOSS,
        "if (whole < count) store_first(values",
        "if (false) store_first(values",
        "test_fuzz",
    ),
    Mutant(
        "rows: one of four lanes left out",
        _VECTOR,
        "for (int lane = 0; lane < 4; ++lane)",
        "for (int lane = 0; lane < 3; ++lane)",
        "test_fuzz",
    ),
    Mutant(
        "half: tiny values lose bits",
        "../../csrc/cpu/portable.inc",
        "as<Floats>(magnitude) + 0.5f",
        "as<Floats>(magnitude) + 1.0f",
        "test_fuzz",
    ),
    Mutant(
        "half: infinity becomes a number",
        "../../csrc/cpu/portable.inc",
        "magnitude >= 0x0F800000",
        "magnitude > 0x7F800000",
        "test_fuzz",
    ),
    Mutant("loss: largest logit left out of the lse", _LOSS, "top + logarithm", "logarithm", "test_fuzz"),
    Mutant("loss: rows that do not count have gradients", _LOSS, "  if (ignored) {", "  if (false) {", "test_fuzz"),
    Mutant(
        "loss: a target beyond the classes is read",
        _LOSS,
        "target >= 0 && target < vocab",
        "target >= 0 && target <= vocab",
        "test_fuzz",
    ),
    Mutant(
        "loss: the target's gradient is rounded before",
        _LOSS,
        "kept[target] * scale - factor",
        "kept[target] * scale",
        "test_fuzz",
    ),
    Mutant("loss: z-loss left out of the gradient", _LOSS, "(1.0f + 2.0f * of.z_loss * lse)", "1.0f", "test_fuzz"),
    Mutant("loss: z-loss once in place of twice", _LOSS, "2.0f * of.z_loss", "of.z_loss", "test_fuzz"),
    Mutant(
        "loss: the last classes count twice",
        _LOSS,
        "if (whole < vocab) {",
        "if (whole <= vocab && vocab >= kLanes) {",
        "test_fuzz",
    ),
    Mutant(
        "decode: the last key stands for more",
        _DECODE,
        "for (key = 0; key < whole; key += kLanes) {",
        "for (key = 0; key < count; key += kLanes) {",
        "test_fuzz",
    ),
    Mutant("decode: a key beyond the end is read", _DECODE, "key + i < count ? key + i : count - 1", "key + i", "test_fuzz"),
    Mutant(
        "decode: pieces not brought to one scale", _DECODE, "weight = std::exp(weight - top);", "weight = 1.0f;", "test_fuzz"
    ),
    Mutant("decode: list of keys not read", _DECODE, "of.keys == nullptr ? begin + i", "true ? begin + i", "test_fuzz"),
    Mutant(
        "decode: values of the last columns left out",
        _DECODE,
        "if (first < head_dim) {",
        "if (first + 1 < head_dim) {",
        "test_fuzz",
    ),
    Mutant("decode: a piece without weight is NaN", _DECODE, "top == -INFINITY ? 0.0f : top", "top", "test_fuzz"),
    Mutant(
        "decode: strides of another tensor",
        _DECODE,
        "batch * of.v_batch + head * of.v_head",
        "batch * of.k_batch + head * of.k_head",
        "test_fuzz",
    ),
)
