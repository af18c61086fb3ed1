"""Plain words: no metaphors of the list below in code, tests and documents, and short sentences in the pages about rules."""

from __future__ import annotations

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
    """The sentences of a page, without code, tables, headings and links' targets; items of lists are sentences too."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text)).replace("**", "")
    blocks = re.split(r"\n\s*\n|\n(?=[-*] )", text)
    kept = [" ".join(block.split()) for block in blocks if not block.lstrip().startswith(("#", "|", "<"))]
    return [part for block in kept for part in re.split(r"(?<=[.:;!?])\s+", block) if part]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "DESIGN.md"])
def test_sentences_are_short(page: str) -> None:
    """At most 20 words a sentence, or part of one between colons and semicolons."""
    long = [one for one in sentences((ROOT / page).read_text(encoding="utf-8")) if len(one.split()) > 20]
    assert not long, "more than 20 words:\n" + "\n".join(long)
