"""What fuzz tests of public functions share: wrong values, and the rule that every refusal follows."""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt.errors import IgptError
from tests.hostile import at_most

SECONDS = 20.0  # a call that takes longer hangs; others take milliseconds


class Tagged(Tensor):
    """A subclass of Tensor that keeps its class through torch's functions."""


def _odd_layouts(floats: Tensor) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of them prototypes
        return [
            *(floats.to("meta"), floats.to_sparse(), floats.to_sparse_csr(), torch.ones(2, 5, dtype=torch.int64).to_sparse()),
            torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]),
            torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged),
            *(torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8), floats.to_mkldnn()),
        ]


def _rows(seed: int) -> Tensor:
    return torch.randint(-3, 9, (2, 5), generator=torch.Generator().manual_seed(seed))


def hostile_values(rng: random.Random) -> list[Any]:
    """Wrong values for any argument, one of each kind; sizes and contents are drawn with `rng`."""
    seed = rng.randrange(2**31)
    size = rng.randrange(1, 8)
    floats = torch.randn(size, rng.randrange(1, 8), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        inference = torch.zeros(2, 3)
    return [
        *(None, True, False, 0, 1, -1, -(2**31), 2**31, 2**62, 2**63, 2**70, -(2**70), 10**30, rng.randrange(-9, 99)),
        *(0.0, -0.0, 1.5, -2.5, math.nan, math.inf, -math.inf, 1e300, 5e-324, 2.0, 1j, rng.uniform(-9, 9)),
        *("", "no", "auto", "\x1b[31m", "\0", "1", "²", "x" * 5000, b"", b"1", "dense", "none"),
        *([], (), {}, set(), [None], [1, 2], ["a"], [[1], [2, 3]], {"a": 1}, range(3), slice(None), ..., object(), Exception()),
        *(int, Tensor, len, lambda: 1, Path("x"), torch.float32, torch.int8, torch.device("meta"), torch.Generator()),
        *(np.float32("nan"), np.int64(3), np.uint8(2), np.bool_(True), np.str_("a"), np.datetime64("2020-01-01")),
        *(np.zeros(0), np.zeros((2, 3)), np.array(None), np.array(["a"]), np.zeros((2, 3), np.uint8), np.ma.masked),
        np.zeros(2, [("a", int)]),
        *(torch.tensor(1), torch.tensor(1.5), torch.tensor(True), torch.tensor(2**62), torch.tensor(math.nan)),
        *(torch.zeros(0), torch.zeros(0, 5), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(1, 1, 1, 1, 1, 1)),
        *(floats, floats.t(), floats.double(), floats.half(), floats.to(torch.float8_e4m3fn), floats.to(torch.complex64)),
        *(floats > 0, floats.to(torch.int8), floats.abs().to(torch.uint8), floats.abs().to(torch.uint16), floats * math.nan),
        *(_rows(seed), _rows(seed).abs(), _rows(seed).int(), _rows(seed)[:, ::2], _rows(seed)[:1].expand(4, 5)),
        *(torch.full((2, 5), 2**62), torch.full((2, 5), -(2**62)), torch.zeros(2, 5, dtype=torch.int64).to("meta")),
        *_odd_layouts(floats),
        *(floats.clone().requires_grad_(), inference, floats.as_subclass(Tagged), torch.nn.Parameter(floats.clone())),
        *(torch.complex(floats, floats).conj(), torch.complex(floats, floats).conj().imag, torch.zeros(1).expand(2**50)),
        *(torch.nn.Linear(2, 2), torch.nn.UninitializedParameter()),
    ]


def check_refusal(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call `function`; its result, or None where it refuses as it must.

    The rule: a TypeError or ValueError, which in igpt is an `IgptError`. Its message is one line, and names an argument of
    the function, or the file that one stands for.

    Raises:
        AssertionError: another error, or one that names no argument.
    """
    kinds = (IgptError,) if function.__module__.partition(".")[0] == "igpt" else (TypeError, ValueError)
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(**arguments)
    except BaseException as error:
        text = str(error)
        name = getattr(function, "__qualname__", repr(function))
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in arguments.items())
        call = f"{name}({shown})\n  {type(error).__name__}: {text[:300]}"
        if not isinstance(error, kinds):
            raise AssertionError(f"another kind of error: {call}") from error
        within = [key for value in arguments.values() if isinstance(value, dict) for key in value]
        names = {*map(str, within), *inspect.signature(function).parameters, *arguments}
        files = [str(value) for value in arguments.values() if isinstance(value, (str, Path))]
        files += [str(IgptError(file)) for file in files]  # as errors spell them out
        if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names | set(files)):
            raise AssertionError(f"no argument is named: {call}") from error
        if len(text) > 10_000 or "\n" in text:
            raise AssertionError(f"not one line: {call}") from error
    return None


def _shown(value: Any) -> str:
    """What a failing test says about a value."""
    if isinstance(value, Tensor):
        return f"<{type(value).__name__} {value.dtype} {value.layout} on {value.device}>"
    if isinstance(value, np.ndarray):
        return f"<array {value.dtype} {value.shape}>"
    return repr(value)[:60]
