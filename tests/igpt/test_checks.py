"""Options refuse wrong values: every field of every class, from its annotation alone."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from igpt.checks import (
    Above,
    AtLeast,
    Between,
    Count,
    Matches,
    Natural,
    Options,
    as_number,
    check_bool,
    check_int,
    check_number,
    check_path,
    from_mapping,
    hints,
)
from igpt.commands.main import COMMANDS
from igpt.errors import ConfigError, IgptError
from igpt.model.config import ImageGPTConfig

CLASSES: list[type[Any]] = [*(command.options for command in COMMANDS.values()), ImageGPTConfig]
REQUIRED: dict[str, Any] = {
    "source": "digits", "model": "runs/x", "palette": "palette", "out": Path("x"), "pattern": "row", "n_layer": 2, "n_head": 2,
    "n_embd": 32,
}  # fmt: skip
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


def given(cls: type[Any]) -> dict[str, Any]:
    """Values for the fields without a default."""
    return {
        field.name: REQUIRED[field.name]
        for field in dataclasses.fields(cls)
        if field.name == "source" or field.default is dataclasses.MISSING
    }


def wrong_values(hint: Any, limit: Any = None) -> Iterator[Any]:
    """Values that the annotation does not allow: another type, another choice, beyond each end, not finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = [each for each in arguments[1:] if isinstance(each, (Between, Matches))]
        yield from wrong_values(arguments[0], limits[0] if limits else limit)
    elif origin is Literal:
        yield from ("", "nonsense", f"{arguments[0]} ", 7, None, [arguments[0]])
    elif origin in (typing.Union, types.UnionType):
        allowed = [each for each in arguments if each is not type(None)]
        for each in allowed:
            for value in wrong_values(each, limit):
                if not (value is None and type(None) in arguments) and not (isinstance(value, str) and str in allowed):
                    yield value
    elif origin is tuple:
        yield from (7, None, {"row": 1}, (7,), ("row", None))
    elif hint is bool:
        yield from (0, 1, "yes", None)
    elif hint in (int, float):
        yield from ("7", None, True, math.nan, math.inf, -math.inf, [1])
        if hint is int:
            yield 1.5
        if isinstance(limit, Between):
            if limit.low is not None:
                yield limit.low if limit.low_open else limit.low - 1
            if limit.high is not None:
                above = limit.high + 1 if hint is int else max(limit.high + 1, math.nextafter(limit.high, math.inf))
                yield limit.high if limit.high_open else above
    elif hint is str:
        yield from (7, None, b"row", {"row"})
        if isinstance(limit, Matches):
            yield from ("teapot", "", "cuda:x")
    elif hint is Path:
        yield from (7, None, b"x")
    else:
        raise AssertionError(f"no wrong value is known for {hint}")


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_wrong_value_of_any_field_is_refused(cls: type[Any], name: str) -> None:
    values = list(wrong_values(hints(cls)[name]))
    assert len(values) >= 3
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name} must be ") as raised:
            cls(**{**given(cls), name: value})
        assert repr(value) in str(raised.value)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_defaults_are_accepted_and_every_number_has_an_end(cls: type[Any]) -> None:
    cls(**given(cls))
    for name, hint in hints(cls).items():
        for part in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
            assert part not in (int, float), f"{name} takes any number: say in its annotation from where to where"


def test_what_the_study_found_is_refused() -> None:
    """Each of these was taken without a word: fp8 trained in fp32, kernels="on" ran plain."""
    options = {command: entry.options for command, entry in COMMANDS.items()}
    for command, name, value in (
        ("pretrain", "precision", "fp8"), ("pretrain", "kernels", "on"), ("pretrain", "objective", "nonsense"),
        ("pretrain", "bad_images", "whatever"), ("pretrain", "clip", math.nan), ("sample", "n", -3), ("demo", "steps", -5),
        ("sample", "kernels", "yes"), ("probe", "c", -1.0), ("tokenize", "split", "tset"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name} must be .*got {value!r}"):
            options[command](**{**given(options[command]), name: value})


@dataclasses.dataclass(frozen=True)
class Example(Options):
    steps: Count = 3
    offset: Natural = 0
    rate: Annotated[float, Above(0)] = 0.5
    share: Annotated[float, Between(0, 1, low_open=True, high_open=True)] = 0.5
    least: Annotated[float, AtLeast(2)] | None = None
    angle: Annotated[float, Between(-1, 1)] = 0.0
    part: Annotated[float, Between(0, 1, high_open=True)] = 0.0
    bits: Literal[1, 8, "all"] = 8
    parts: tuple[str, ...] = ()
    out: Path = Path("x")


def test_lists_become_tuples_and_strings_paths() -> None:
    made = Example(parts=["a", "b"], out="folder/file", rate=2)  # type: ignore[arg-type]
    assert made == Example(parts=("a", "b"), out=Path("folder/file"), rate=2)


def test_the_ends_of_a_range_belong_to_it_unless_they_are_open() -> None:
    Example(steps=1, offset=0, least=2.0, angle=-1.0, part=0.0)
    Example(angle=1.0, part=0.999, bits="all")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"offset": -1}, "offset must be an integer of at least 0, got -1"),
        ({"rate": 0.0}, "rate must be a finite number above 0, got 0.0"),
        ({"share": 1}, "share must be a finite number above 0 and below 1, got 1"),
        ({"least": 1.5}, "least must be a finite number of at least 2 or left out, got 1.5"),
        ({"angle": 1.5}, "angle must be a finite number from -1 to 1, got 1.5"),
        ({"part": 1.0}, "part must be a finite number of at least 0 and below 1, got 1.0"),
        ({"bits": True}, "bits must be one of 1, 8, all, got True"),
        ({"bits": 8.0}, "bits must be one of 1, 8, all, got 8.0"),
        ({"parts": "ab"}, "parts must be a sequence, each a string, got 'ab'"),
        ({"steps": 2**63}, r"steps must be an integer of at least 1 \(64 bits\), got 9223372036854775808"),
        pytest.param({"rate": 10**400}, "rate must be a finite number above 0", id="beyond a float"),
        ({"wings": 2}, "Example has no setting 'wings'"),
    ],
    ids=str,
)
def test_messages(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Example, values)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^TokenizeOptions: missing 1 required .*'palette'$"):
        from_mapping(COMMANDS["tokenize"].options, {"source": "digits", "out": "x"})


@pytest.mark.parametrize("value", ["3", 2.0, None, True, -1, math.nan])
def test_check_int_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match="n must be an integer of at least 0"):
        check_int("n", value, 0)


def test_check_int_takes_integers_of_numpy() -> None:
    import numpy as np

    for least in (0, 7):
        found = check_int("n", np.int32(7), least)
        assert (found, type(found)) == (7, int)


class Odd(enum.IntEnum):
    THREE = 3


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    for value in (np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), Odd.THREE, 3):
        assert check_int("n", value, 1) == 3
        assert check_number("x", value, AtLeast(0)) == 3.0
    for value in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), 0.5):
        assert (type(as_number(value)), check_number("x", value, Between(0, 1))) == (float, 0.5)
    assert check_bool("b", np.bool_(True)) is True
    same = (None, "3", [3], np.array([3]), torch.tensor([3, 4]), torch.ones((), device="meta"), np.datetime64("2020"), 1j)
    for value in same:
        assert as_number(value) is value
        with pytest.raises(ConfigError, match=r"^n must be an integer of at least 1, got "):
            check_int("n", value, 1)
        with pytest.raises(ConfigError, match=r"^x must be a number of at least 0, got "):
            check_number("x", value, AtLeast(0))
        with pytest.raises(ConfigError, match=r"^b must be True or False, got "):
            check_bool("b", value)
    for flag in (True, np.bool_(True), torch.tensor(True)):
        with pytest.raises(ConfigError, match=r"^n must be an integer from 1 to 2, got "):
            check_int("n", flag, 1, 2)
        with pytest.raises(ConfigError, match=r"^x must be a number"):
            check_number("x", flag, AtLeast(0))
    with pytest.raises(ConfigError, match=r"^n must be an integer from 1 to 2, got 3$"):
        check_int("n", 3, 1, 2)
    for number in (math.nan, math.inf, -math.inf, 10**400, -0.5, np.float32("inf")):
        with pytest.raises(ConfigError, match=r"^x must be a number of at least 0, got "):
            check_number("x", number, AtLeast(0))


def test_paths(tmp_path: Path) -> None:
    for value in (tmp_path, str(tmp_path), tmp_path / "new", "", "\N{SNOWMAN}"):
        assert check_path("folder", value) == Path(value)
    wrongs = ((3, "got 3"), (None, "got None"), (b"x", "got b'x'"), ("a\0b", r"got 'a\\x00b'"), ("x" * 5000, "got 'xx"))
    for wrong, message in wrongs:
        with pytest.raises(IgptError, match=f"^folder must be a path.*{message}") as caught:
            check_path("folder", wrong)
        assert len(str(caught.value)) < 200
