"""Numbers as people read them: times, bytes, three digits."""

from __future__ import annotations


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def digits(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in KiB, MiB or GiB."""
    if value is None:
        return "-"
    power, unit = (30, "GiB") if value >= 1000 * 2**20 else (20, "MiB") if value >= 2**20 else (10, "KiB")
    return f"{digits(value / 2**power)} {unit}"
