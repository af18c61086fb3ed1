"""One break of one kernel, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Replace `old` (all its places) by `new` in a file, and `test` must fail.

    Attributes:
        what: the break in words.
        file: where, its path from igpt_kernels/_triton.
        old: text that is there.
        new: text to put in its place.
        test: name of the test (or an expression of pytest's -k), in the file that the suite of the break names.
    """

    what: str
    file: str
    old: str
    new: str
    test: str
