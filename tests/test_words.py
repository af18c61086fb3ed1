"""Plain words: no metaphors of the list below in code, tests and documents, short sentences in docstrings and pages."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTEAD = {
    "room": "folder, module; space", "rooms": "folders, modules", "house": "package", "law": "rule", "laws": "rules",
    "blind": "fully masked", "stranger": "untrusted", "strangers": "untrusted", "voice": "console", "kin": "name what is meant",
    "nobody": "name who is meant", "somebody": "name who is meant", "affair": "say what depends on it", "luck": "chance",
    "mended": "fixed, corrected", "inhabits": "is in", "travels": "is sent",
}  # fmt: skip
LONGEST = 20
"""Words of a sentence, or of a part of one between colons and semicolons."""
SUFFIXES = (".py", ".md", ".cpp", ".h", ".cu", ".toml", ".txt")
HERE = "tests/test_words.py"


def files() -> list[Path]:
    """All text files of the project, as git knows them, or what lies there outside a repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or list(ROOT.rglob("*"))
    return [path for path in paths if path.is_file() and path.suffix in SUFFIXES and str(path.relative_to(ROOT)) != HERE]


def test_the_files_are_found() -> None:
    assert len(files()) > 200


@pytest.mark.parametrize("word", INSTEAD)
def test_words_of_the_field(word: str) -> None:
    pattern = re.compile(rf"(?<![\w/-]){word}(?![\w/-])", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {INSTEAD[word]} instead of {word}:\n" + "\n".join(found)


def sentences(text: str) -> list[str]:
    """The parts of sentences between stops, colons and semicolons; items of lists are sentences too. Code is no words."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"``[^`]*``|`[^`]*`", "code", text)).replace("**", "")
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*] )|\n(?=\s*[\w, ]+: )|\n(?=\S+ {2,}\S)", text)
    kept = [" ".join(block.split()) for block in blocks if not block.lstrip().startswith(("#", "|", "<"))]
    return [part for block in kept for part in re.split(r"(?<=[.:;!?])\s+", block) if part]


def too_long(text: str) -> list[str]:
    """The parts with more than 20 words; a word has two letters or more, so that formulas do not count."""
    return [one for one in sentences(text) if len(re.findall(r"[^\W\d_]{2}[\w-]*", one)) > LONGEST]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "docs/patterns.md", "docs/performance.md"])
def test_sentences_of_pages_are_short(page: str) -> None:
    long = too_long((ROOT / page).read_text(encoding="utf-8"))
    assert not long, "more than 20 words:\n" + "\n".join(long)


@pytest.mark.parametrize("package", ["igpt", "igpt_kernels", "benchmarks", "tools"])
def test_sentences_of_docstrings_are_short(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            texts = [node.value.value] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else []
            found += [f"{path.relative_to(ROOT)}: {one}" for text in texts if isinstance(text, str) for one in too_long(text)]
    assert not found, "more than 20 words:\n" + "\n".join(found)


def test_long_sentences_are_seen() -> None:
    assert too_long("Short: " + "word " * 21)
    assert not too_long("One `" + "x " * 30 + "` and (a + b)² + c. " + "word " * 19 + "end.")
