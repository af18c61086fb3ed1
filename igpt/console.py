"""The terminal: lines on stdout and stderr, progress bars, and columns as aligned text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """The text as a terminal may have it: what it would obey or hide is spelled out (``\\x1b``), line breaks stay.

    Names of files can hold anything: sequences that clear the screen, letters that turn the line around, broken encodings.
    """
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def say(text: str) -> None:
    """Print the result of a command on stdout, above the bars."""
    from tqdm import tqdm

    tqdm.write(printable(text))


def one_line(text: str) -> str:
    """`printable`, with line breaks spelled out too."""
    return printable(text).replace("\n", "\\n")


def gibibytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"


class Console:
    """What a run reports, on stderr: lines anywhere, bars on a terminal only; nothing at all when not wanted.

    Args:
        wanted: False reports nothing.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def log(self, text: str) -> None:
        """Print a line above the bars."""
        if self.wanted:
            from tqdm import tqdm

            tqdm.write(printable(text), file=sys.stderr)

    @property
    def is_interactive(self) -> bool:
        """Whether progress is wanted and stderr is a terminal."""
        return self.wanted and sys.stderr.isatty()

    def progress(self, total: int, initial: int, what: str, unit: str, *, unit_scale: bool = False) -> Any:
        """A tqdm bar; with `unit_scale` thousands are written as k."""
        from tqdm import tqdm

        shown = None if self.wanted else True  # None: tqdm looks whether stderr is a terminal
        return tqdm(
            total=total,
            initial=initial,
            desc=one_line(what),
            unit=unit,
            unit_scale=unit_scale,
            file=sys.stderr,
            disable=shown,
            leave=False,
            dynamic_ncols=True,
        )


def aligned_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns, two spaces apart; rows may be short, nothing follows a last cell."""
    count = max(len(row) for row in rows)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(count)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
