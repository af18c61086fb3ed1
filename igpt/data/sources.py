"""The table of data sources: from it come help texts, error messages, and what is special about each. Imports no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source.

    Attributes:
        scheme: the word before the colon, or the whole name.
        path: what follows the colon; empty where nothing does.
        help: one line.
        opener: ``"module:function"``, imported late; takes an `igpt.data.open.Request`.
        own_test_split: "val" is a test part of its own, not a share of the images.
        crops: `augment` can cut random parts out of its pictures.
    """

    scheme: str
    path: str
    help: str
    opener: str
    own_test_split: bool = False
    crops: bool = False

    @property
    def form(self) -> str:
        """How it is written: ``photos:DIR``."""
        return f"{self.scheme}:{self.path}" if self.path else self.scheme


SOURCES = (
    SourceKind("digits", "", "scikit-learn's 1,797 digits, 8 x 8", "igpt.data.digits:open_digits"),
    SourceKind("photos", "DIR", "all pictures below a folder", "igpt.data.folder:open_pictures", crops=True),
    SourceKind("folder", "DIR", "the same, sub-folders are classes", "igpt.data.folder:open_pictures", crops=True),
    SourceKind("cifar10", "DIR", "the binary archive, 32 x 32", "igpt.data.cifar:open_cifar", own_test_split=True),
    SourceKind("cifar100", "DIR", "the binary archive, 32 x 32", "igpt.data.cifar:open_cifar", own_test_split=True),
    SourceKind("tokens", "FILE.npy", "rows that igpt tokenize wrote", "igpt.data.tokens:open_tokens"),
)


def find(spec: str) -> SourceKind | None:
    """The kind of a name, complete with its path, or None."""
    scheme, _, rest = spec.partition(":")
    for kind in SOURCES:
        if kind.scheme == scheme and bool(rest) == bool(kind.path) and (kind.path or spec == scheme):
            return kind
    return None


def forms() -> str:
    """All forms in one line: ``digits, photos:DIR, ...``."""
    return ", ".join(kind.form for kind in SOURCES)


def has_own_test_split(spec: str) -> bool:
    """Whether the "val" part of this source is a test part of its own."""
    kind = find(spec)
    return kind is not None and kind.own_test_split


def help_text() -> str:
    """All sources, for the help of a command."""
    return "Sources: " + "; ".join(f"{kind.form} ({kind.help})" for kind in SOURCES) + "."
