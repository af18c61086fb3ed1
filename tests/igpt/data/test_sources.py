"""The table of data sources."""

from __future__ import annotations

import pytest

from igpt.data.sources import SOURCES, find, has_own_test_split


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("digits", "digits"),
        ("digits:x", None),
        ("digits:", None),
        ("photos", None),
        ("photos:", None),
        ("photos:a:b", "photos"),
        ("Photos:a", None),
        ("tokens:x.npy", "tokens"),
        ("", None),
    ],
)
def test_a_name_is_a_source_only_when_it_is_whole(name: str, scheme: str | None) -> None:
    kind = find(name)
    assert (None if kind is None else kind.scheme) == scheme


def test_what_is_special_about_each_source() -> None:
    assert {kind.scheme for kind in SOURCES if kind.crops} == {"photos", "folder"}
    assert {kind.scheme for kind in SOURCES if has_own_test_split(kind.form)} == {"cifar10", "cifar100"}
    assert not has_own_test_split("cifar10"), "no folder is named"
