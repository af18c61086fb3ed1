"""What error messages of both packages share. Nothing is imported: commands say their errors before torch is loaded."""

from __future__ import annotations

_LONGEST = 80  # characters
_MANY_DIGITS = 10**50  # Python refuses to write numbers of more than 4,300


def shown(value: object) -> str:
    """What came, for the end of a message: one line, cut where it is long; of arrays and tensors dtype and shape."""
    dtype, device = getattr(value, "dtype", None), str(getattr(value, "device", "cpu"))
    if dtype is not None and not isinstance(value, type):
        try:
            shape = f" {list(getattr(value, 'shape'))}"  # noqa: B009
        except Exception:  # a nested tensor has no shape to list
            shape = ""
        if shape != " []" or device != "cpu":
            return f"{type(value).__name__}{shape} of {dtype}{'' if device == 'cpu' else f' on {device}'}"
    if isinstance(value, int) and abs(value) >= _MANY_DIGITS:
        return "a number of many digits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a number of many digits inside of it, or of a class of the caller
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
