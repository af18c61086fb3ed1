"""Arrays and tensors that functions are given, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igpt.errors import DataError
from igpt.files import describe
from igpt_kernels.messages import shown


def as_array(name: str, value: Any) -> NDArray[Any]:
    """An array, a tensor on any device, or nested lists, as an array; the memory is shared where that is possible.

    Raises:
        DataError: it has no such form, or no values (device meta, memory freed); names `name`.
    """
    try:
        if not isinstance(value, torch.Tensor):
            return np.asarray(value)
        if not is_dense(value):
            raise ValueError("no dense tensor, or one whose memory was freed")
        return value.detach().resolve_conj().resolve_neg().cpu().numpy()
    except Exception as error:  # torch and NumPy have many kinds for what they cannot convert
        raise DataError(f"{name} must be an array or a tensor, got {shown(value)} ({describe(error)})") from error


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a block of memory with strides, which is there."""
    if tensor.is_nested or tensor.layout != torch.strided or torch.nn.parameter.is_lazy(tensor):
        return False
    return type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def check_pixels(images: Any) -> NDArray[np.uint8]:
    """Images as an array, uint8 [...,3]. Raises `DataError` for anything else."""
    array = as_array("images", images)
    if array.dtype != np.uint8 or array.ndim < 1 or array.shape[-1] != 3:
        raise DataError(f"images must be uint8 [...,3], got shape {array.shape} of {array.dtype}")
    return array
