"""The C++ of csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, and the code of its GPU threads on the CPU.

Some seconds here; `make soak` runs the same program for longer, with IGPT_FUZZ_SECONDS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "tests" / "csrc" / "fuzz.cpp", ROOT / "csrc" / "palette.cpp"]
SECONDS = os.environ.get("IGPT_FUZZ_SECONDS", "3")


def build(folder: Path, source: Path) -> Path:
    """The program with sanitizers, from `source` in place of csrc/palette_device.h."""
    copy = folder / "tree"
    shutil.copytree(ROOT / "csrc", copy / "csrc", dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests" / "csrc", copy / "tests" / "csrc", dirs_exist_ok=True)
    shutil.copy(source, copy / "csrc" / "palette_device.h")
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [copy / path.relative_to(ROOT) for path in SOURCES]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *files, "-o", folder / "fuzz"], check=True)
    return folder / "fuzz"


def run(program: Path, seconds: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program, seconds, "1"], capture_output=True, text=True, check=False, env=environment)


def test_random_palettes_pixels_and_tokens(tmp_path: Path) -> None:
    done = run(build(tmp_path, ROOT / "csrc" / "palette_device.h"), SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout.strip())


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("a red that lies elsewhere in the table", "table[r << 16", "table[r << 15"),
        ("a tie for the highest index", "if (far < own.least[i])", "if (far <= own.least[i])"),
        ("colours left out that may be nearest", "- 2 * half * spread > slack", "- half * spread > slack"),
        ("a shift of misaligned pixels", ">> (8 * ahead)", ">> (8 * (ahead & 1))"),
        ("a store beyond the tokens", "i < kCount; ++i) to[i]", "i <= kCount; ++i) to[i]"),
    ],
)
def test_it_finds_what_is_broken(what: str, old: str, new: str, tmp_path: Path) -> None:
    text = (ROOT / "csrc" / "palette_device.h").read_text(encoding="utf-8")
    assert old in text, f"{what}: csrc/palette_device.h has no {old!r}"
    broken = tmp_path / "broken.h"
    broken.write_text(text.replace(old, new), encoding="utf-8")
    assert run(build(tmp_path, broken), "20").returncode != 0, what
