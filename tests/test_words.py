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
    names = {str(path.relative_to(ROOT)) for path in files()}
    assert {"README.md", "csrc/palette.cpp", "csrc/palette.cu", "pyproject.toml", "requirements.txt", "tests/kit.py"} <= names
    assert any(name.endswith(".h") for name in names)


def lines_with(word: str, text: str) -> list[tuple[int, str]]:
    """The lines that hold a word, in capitals too, with their numbers; a part of another word or of a path is none."""
    pattern = re.compile(rf"(?<![\w/-]){word}(?![\w/-])", re.IGNORECASE)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


@pytest.mark.parametrize("word", INSTEAD)
def test_words_of_the_field(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in lines_with(word, path.read_text(encoding="utf-8"))
    ]
    assert not found, f"write {INSTEAD[word]} instead of {word}:\n" + "\n".join(found)


def test_words_are_seen() -> None:
    text = "a hall\n\nThe law. A law-like bylaw of src/law/x.\n# LAW"
    assert lines_with("law", text) == [(3, "The law. A law-like bylaw of src/law/x."), (4, "# LAW")]
    assert not lines_with("law", "Lawful, outlaw, by-law, law/x, in_law")


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


def docstrings(code: str) -> list[str]:
    """Those of the module, of classes and functions, and of what stands above one."""
    values = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Expr)]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "docs/patterns.md", "docs/performance.md"])
def test_sentences_of_pages_are_short(page: str) -> None:
    long = too_long((ROOT / page).read_text(encoding="utf-8"))
    assert not long, "more than 20 words:\n" + "\n".join(long)


@pytest.mark.parametrize("package", ["igpt", "igpt_kernels", "benchmarks", "tools"])
def test_sentences_of_docstrings_are_short(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {one}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in docstrings(path.read_text(encoding="utf-8"))
        for one in too_long(text)
    ]
    assert not found, "more than 20 words:\n" + "\n".join(found)


def test_docstrings_are_seen() -> None:
    code = """'module'\nclass A:\n 'class'\n x = 'no'\n 'attribute'\n def f(self):\n  'function'\n  return 'no'"""
    assert sorted(docstrings(code)) == ["attribute", "class", "function", "module"]


def test_long_sentences_are_seen() -> None:
    assert too_long("Short: " + "word " * 21)
    assert not too_long("One `" + "x " * 30 + "` and (a + b)² + c. " + "word " * 19 + "end.")
