"""Commit messages: an imperative subject of at most 65 characters, an empty line, and a body that says why."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIRST = "d11fb2e"
"""The rule holds for the commits after this one."""
LONGEST_SUBJECT = 65
LEAST_BODY = 8
"""Words."""
NO_VERBS = (
    "a",
    "an",
    "the",
    "new",
    "more",
    "some",
    "results",
    "tests",
    "docs",
    "readme",
    "wip",
    "fixes",
    "fixed",
    "adds",
    "added",
)


def messages(root: Path = ROOT, first: str = FIRST) -> list[tuple[str, str]]:
    """Hash and message of every commit that the rule holds for; none outside a repository, or where `first` is not in it."""
    found = subprocess.run(
        ["git", "log", "--no-merges", "--format=%h%x00%B%x01", f"{first}..HEAD"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    entries = [entry.strip("\n") for entry in found.stdout.split("\x01")] if found.returncode == 0 else []
    return [(name, body) for name, _, body in (entry.partition("\0") for entry in entries if entry)]


def problems(message: str) -> list[str]:
    """What is wrong with a message; nothing when it is as it should be."""
    subject, _, rest = message.strip("\n").partition("\n")
    found = []
    if len(subject) > LONGEST_SUBJECT:
        found.append(f"the subject has {len(subject)} characters, at most {LONGEST_SUBJECT} are wanted")
    if subject.endswith("."):
        found.append("the subject ends with a full stop")
    first = subject.partition(" ")[0].lower().rstrip(":,")
    if not subject[:1].isupper() or first in NO_VERBS or subject.partition(" ")[0].endswith(":"):
        found.append("the subject must begin with a verb in the imperative, for example Add, Fix, Move")
    if rest and not rest.startswith("\n"):
        found.append("the second line must be empty")
    if len(rest.split()) < LEAST_BODY:
        found.append("the body must say why, with numbers, and how it was checked")
    return found


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("Add a table of backends\n\nFour ways to say which backend; one table now. make test: 3,300 pass.", 0),
        ("README: wrap", 2),
        ("Move " + "x" * 70 + "\n\nOne two three four five six seven eight.", 1),
        ("Fix it.\n\nOne two three four five six seven eight.", 1),
        ("Fix it\nOne two three four five six seven eight.", 1),
        ("fix it", 2),
        ("Results of the first runs\n\nOne two three four five six seven eight.", 1),
    ],
)
def test_the_rule(message: str, wrong: int) -> None:
    assert len(problems(message)) == wrong, problems(message)


def test_messages_are_whole_and_those_after_the_first(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    given = ["First", "Add one\n\nA body,\n\nof two parts.", "fix it"]
    for message in given:
        git("commit", "--quiet", "--allow-empty", "--message", message)
    first = git("rev-parse", "HEAD~2")
    assert [message.strip() for _, message in messages(tmp_path, first)] == given[:0:-1]
    assert messages(tmp_path, first)[0][0] == git("rev-parse", "--short", "HEAD")
    assert messages(tmp_path, "0123456") == messages(tmp_path / "..", first) == []


def test_commits_say_why() -> None:
    wrong = {f"{name} {message.splitlines()[0]}": problems(message) for name, message in messages() if problems(message)}
    assert not wrong, wrong
