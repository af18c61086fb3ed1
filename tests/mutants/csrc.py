"""Breaks of the C++, and of what GPU threads do."""

from tests.mutants.mutant import Mutant

TESTS = "tests/csrc/test_palette.py"

MUTANTS = (
    Mutant(
        "CUDA lookup: reads beyond a run",
        "../../csrc/palette_device.h",
        "begin + kUnit + 4 <= view.run",
        "begin + kUnit <= view.run",
        "test_fuzz",
    ),
    Mutant(
        "CUDA lookup: last unit taken as whole",
        "../../csrc/palette_device.h",
        "if (begin + kUnit > view.run) {",
        "if (begin + kUnit >= view.run + 2) {",
        "test_fuzz",
    ),
    Mutant(
        "CUDA lookup: wide stores to odd places",
        "../../csrc/palette_device.h",
        "if (misalignment(to, 16) == 0) {",
        "if (misalignment(to, 8) == 0) {",
        "test_fuzz",
    ),
    Mutant(
        "CUDA lookup: red and blue exchanged",
        "../../csrc/palette_device.h",
        "<< (16 - 8 * channel)",
        "<< (8 * channel)",
        "test_fuzz",
    ),
    Mutant(
        "CUDA pixels: one too many at the end",
        "../../csrc/palette_device.h",
        "if (i < length - begin)",
        "if (i <= length - begin)",
        "test_fuzz",
    ),
    Mutant(
        "CUDA pixels: a token of V let through",
        "../../csrc/palette_device.h",
        "< static_cast<uint64_t>(size);",
        "<= static_cast<uint64_t>(size);",
        "test_fuzz",
    ),
    Mutant(
        "CUDA table: ties to the highest index",
        "../../csrc/palette_device.h",
        "far < own.least[i]",
        "far <= own.least[i]",
        "test_fuzz",
    ),
    Mutant(
        "CUDA table: candidates dropped too soon",
        "../../csrc/palette_device.h",
        "- 2 * half * spread > slack",
        "- half * spread > slack",
        "test_fuzz",
    ),
    Mutant(
        "CUDA table: sum in another order",
        "../../csrc/palette_device.h",
        "(r * r + g * g) + b * b",
        "r * r + (g * g + b * b)",
        "test_fuzz",
    ),
    Mutant(
        "CUDA table: space for candidates overrun",
        "../../csrc/palette_device.h",
        "if (kept <= kKept - kTeam &&",
        "if (kept <= kKept &&",
        "test_fuzz",
    ),
    Mutant(
        "CPU lookup: reads beyond the pixels", "../../csrc/palette.cpp", "i < count - 1; ++i", "i < count; ++i", "test_fuzz"
    ),
)
