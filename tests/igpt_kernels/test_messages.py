"""What came, in the messages of both packages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from igpt.checks import check_int
from igpt.errors import ConfigError
from igpt_kernels import flash_attention, layouts
from igpt_kernels.messages import shown


class Mute:
    def __repr__(self) -> str:
        raise OSError("no name")


def test_one_line_that_is_not_long() -> None:
    for value, text in (
        (True, "True"),
        ("a\n  b", r"'a\n b'"),
        ("x" * 500, "'" + "x" * 76 + "..."),
        (10**49, "1" + "0" * 49),
        (-(10**5000), "a number of many digits"),
        ([10**5000], "a list that cannot be shown"),
        (Mute(), "a Mute that cannot be shown"),
        (torch.zeros(2, 3), "Tensor [2, 3] of torch.float32"),
        (torch.zeros(2, device="meta"), "Tensor [2] of torch.float32 on meta"),
        (torch.tensor(3), "tensor(3)"),
        (np.zeros((2, 0), bool), "ndarray [2, 0] of bool"),
        (np.float32, "<class 'numpy.float32'>"),
    ):
        assert shown(value) == text


def test_a_number_of_many_digits_is_refused_by_name() -> None:
    """Python itself refuses to write it, in a ValueError that names nothing."""
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"^scale must be a finite number or None, got a number of many digits"):
        flash_attention(q, q, q, scale=10**5000)
    with pytest.raises(ConfigError, match=r"^n must be an integer from 1 to 9, got a number of many digits"):
        check_int("n", 10**5000, 1, 9)
    with pytest.raises(ValueError, match=r"^radius must be .*got a number of many digits"):
        layouts.local2d(4, 4, 10**5000)
