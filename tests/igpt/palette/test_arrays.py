"""What functions are given as arrays and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from igpt.errors import DataError
from igpt.palette.arrays import as_array, check_pixels, is_dense


def test_memory_is_shared_where_it_can_be() -> None:
    array, tensor = np.zeros(3), torch.zeros(3)
    assert as_array("x", array) is array
    as_array("x", tensor)[:] = 1
    assert tensor.tolist() == [1, 1, 1]
    assert as_array("x", torch.ones(3, requires_grad=True)).tolist() == [1, 1, 1]
    assert as_array("x", torch.tensor([1j]).conj()).tolist() == [-1j]
    assert as_array("x", [[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


def freed() -> torch.Tensor:
    tensor = torch.zeros(2, 3, dtype=torch.uint8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "value",
    [
        [[1], [2, 3]],
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.nn.UninitializedParameter(),
        freed(),
    ],
    ids=["ragged", "meta", "sparse", "bfloat16", "uninitialized", "freed"],
)
def test_what_is_no_array_is_named(value: Any) -> None:
    with pytest.raises(DataError, match=r"^colors must be an array or a tensor, got "):
        as_array("colors", value)


def test_dense() -> None:
    assert is_dense(torch.zeros(2, 3)[:, ::2])
    assert is_dense(torch.zeros(0))
    assert is_dense(torch.zeros(3, device="meta"))
    assert not is_dense(torch.zeros(2).to_sparse())
    assert not is_dense(freed())


def test_pixels() -> None:
    assert check_pixels(torch.zeros(2, 3, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(DataError, match=r"images must be uint8 \[\.\.\.,3\], got shape \(3,\) of float64"):
        check_pixels(np.zeros(3))
