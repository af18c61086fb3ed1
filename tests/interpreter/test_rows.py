"""What the kernels over rows share: rows as a matrix, and the sum of their parts."""

from __future__ import annotations

import pytest
import torch

from igpt_kernels import testing
from igpt_kernels._triton.rows import as_rows, launch_sum_partials
from tests.kit import DTYPES


@pytest.mark.parametrize(("parts", "width"), [(1, 1), (4, 33), (127, 32), (128, 31), (129, 100), (300, 5)])
def test_sums_of_partials(parts: int, width: int) -> None:
    partial = torch.randn(parts, width, generator=torch.Generator().manual_seed(0))
    for dtype in DTYPES:
        with testing.GuardBands() as guards:
            total = launch_sum_partials(partial, dtype)
        assert guards.check() == 1
        testing.error_ratio(total, partial.double().sum(0), partial.to(dtype).sum(0), factor=2, floor=float(parts))


def test_rows_are_copied_only_where_they_must_be() -> None:
    x = torch.arange(4 * 6 * 10.0).view(4, 6, 10)
    for view in (x, x[:, -1], x[..., 2:7], x[:, :1], x[0, 0], x[:1, 2:4]):
        rows = as_rows(view)
        assert rows.data_ptr() == view.data_ptr(), view.stride()
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
    for view in (x[:, :4], x.transpose(0, 2), x[..., ::2], x[:1, :1, :1].expand(4, 6, 10)):
        rows = as_rows(view)
        assert rows.stride(1) == 1
        assert torch.equal(rows, view.reshape(-1, view.shape[-1]))
