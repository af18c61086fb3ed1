"""Breaks of what the kernels over rows share."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_rows.py"

MUTANTS = (
    Mutant(
        "rows: last partial sum left out",
        "rows.py",
        "ok = (part < parts)[:, None]",
        "ok = (part < parts - 1)[:, None]",
        "test_sums_of_partials",
    ),
)
