"""Arguments of the public functions: kinds that are taken, kinds that are refused, and values at random."""

from __future__ import annotations

import inspect
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import igpt_kernels
from igpt_kernels import (
    PaletteTable,
    block_sparse_attention,
    decode_attention,
    explain,
    flash_attention,
    layouts,
    linear_cross_entropy,
    palette_lookup,
    quick_gelu,
    rms_norm,
)
from igpt_kernels.checks import autocast
from igpt_kernels.tensors import is_plain_cpu
from tests.fuzz import check_refusal, hostile_values

CALLS = int(os.environ.get("IGPT_FUZZ_CALLS", "1200"))
"""Calls with wrong arguments; a soak takes 20,000."""


def good() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function with arguments that it takes."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 12, 4) for _ in range(3))
    x = torch.randn(2, 5, 6)
    layout = layouts.local2d(3, 4, 1)
    table = PaletteTable(torch.arange(12).view(4, 3))
    pixels = torch.randint(256, (2, 5, 3), dtype=torch.uint8)
    tokens = torch.randint(4, (2, 5))
    return {
        "flash_attention": (flash_attention, {"q": q, "k": k, "v": v, "causal": True, "scale": 0.5}),
        "block_sparse_attention": (block_sparse_attention, {"q": q, "k": k, "v": v, "layout": layout, "scale": 0.5}),
        "decode_attention": (
            decode_attention,
            {"q": q[:, :, :1], "k_cache": k, "v_cache": v, "length": 5, "layout": layout, "scale": 0.5},
        ),
        "rms_norm": (rms_norm, {"x": x, "weight": torch.ones(6), "eps": 1e-5, "residual": x + 1}),
        "quick_gelu": (quick_gelu, {"x": x, "bias": torch.ones(6)}),
        "linear_cross_entropy": (
            linear_cross_entropy,
            {
                "hidden": x,
                "weight": torch.randn(7, 6),
                "target": torch.randint(7, (2, 5)),
                "ignore_index": -100,
                "reduction": "mean",
                "z_loss": 0.1,
            },
        ),
        "palette_lookup": (palette_lookup, {"pixels": pixels, "table": table, "dtype": torch.int64}),
        "explain": (explain, {"op": "rms_norm", "dtype": torch.float32, "device": "cpu", "width": 5}),
        "PaletteTable": (PaletteTable, {"colors": torch.arange(12).view(4, 3)}),
        "PaletteTable.lookup": (table.lookup, {"pixels": pixels, "channel_dim": -1, "dtype": torch.int64}),
        "PaletteTable.colors_of": (table.colors_of, {"tokens": tokens}),
        "PaletteTable.pixels_of": (table.pixels_of, {"tokens": tokens, "channel_dim": -1}),
        "PaletteTable.save": (table.save, {"path": "palette.safetensors"}),
        "PaletteTable.load": (PaletteTable.load, {"path": "palette.safetensors"}),
    }


def test_every_public_function_and_argument_is_fuzzed() -> None:
    calls = good()
    assert {name.partition(".")[0] for name in calls} == {*igpt_kernels.__all__} - {"layouts"}
    methods = {name for name, value in vars(PaletteTable).items() if callable(value) and not name.startswith("_")}
    assert {name.partition(".")[2] for name in calls if "." in name} == methods | {"load"}
    for name, (function, arguments) in calls.items():
        left = set(inspect.signature(function).parameters) - set(arguments) - {"backend"}
        assert left <= {"head_dim", "width", "vocab"}, name


FUZZED = [(name, argument) for name, (_, arguments) in good().items() for argument in [*arguments, "backend"]]


@pytest.mark.parametrize(("name", "argument"), FUZZED)
def test_wrong_values_are_refused_by_name(name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PaletteTable(torch.arange(12).view(4, 3)).save("palette.safetensors")
    rng = random.Random(f"{name} {argument}")
    function, _ = good()[name]
    if argument not in inspect.signature(function).parameters:
        return
    left = -(-CALLS // len(FUZZED))
    while left > 0:
        values = hostile_values(rng)  # sizes and contents are drawn anew
        chosen = rng.sample(values, min(len(values), left))
        left -= len(chosen)
        for value in chosen:
            _, arguments = good()[name]
            arguments[argument] = value
            for key, x in arguments.items():
                if key != argument and isinstance(x, Tensor) and x.is_floating_point() and rng.random() < 0.3:
                    arguments[key] = x.requires_grad_()
            try:
                check_refusal(function, arguments)
            except AssertionError as error:
                if argument != "path" or not isinstance(error.__cause__, OSError):  # which names the file
                    raise


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32], ids=str)
def test_any_integers(dtype: torch.dtype) -> None:
    _, arguments = good()["linear_cross_entropy"]
    want = linear_cross_entropy(**arguments)
    arguments["target"] = arguments["target"].to(dtype)
    assert torch.equal(linear_cross_entropy(**arguments), want)
    _, arguments = good()["decode_attention"]
    for layout in (None, arguments["layout"]):
        arguments["layout"] = layout
        want = decode_attention(**{**arguments, "length": torch.tensor([5, 7])})
        assert torch.equal(decode_attention(**{**arguments, "length": torch.tensor([5, 7]).to(dtype)}), want)


def test_numbers_of_numpy() -> None:
    calls = good()
    for name, changes in {
        "flash_attention": {"causal": np.bool_(True), "scale": np.float32(0.5)},
        "decode_attention": {"length": np.int64(5), "scale": np.float64(0.5)},
        "rms_norm": {"eps": np.float32(0.25)},
        "linear_cross_entropy": {"ignore_index": np.int32(-100), "z_loss": np.float64(0.1)},
        "PaletteTable.lookup": {"channel_dim": np.int64(-1)},
        "PaletteTable.pixels_of": {"channel_dim": np.int8(-1)},
        "explain": {"width": np.int64(5)},
    }.items():
        function, arguments = calls[name]
        arguments = {key: changes[key].item() if key in changes else value for key, value in arguments.items()}
        want, found = function(**arguments), function(**(arguments | changes))
        torch.testing.assert_close(found, want, rtol=0, atol=0) if isinstance(want, (Tensor, tuple)) else None
        assert isinstance(want, (Tensor, tuple)) or want == found


def test_memory_that_was_freed_is_refused() -> None:
    """FSDP frees weights so; to read them ended the process."""
    for name in ("flash_attention", "decode_attention", "rms_norm", "quick_gelu", "linear_cross_entropy"):
        function, arguments = good()[name]
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                gone = value.clone()
                gone.untyped_storage().resize_(0)
                with pytest.raises(ValueError, match=f"^{key} must have memory, got shape"):
                    function(**(arguments | {key: gone}))


def test_inference_tensors_beside_gradients_are_refused_by_name() -> None:
    q = torch.randn(1, 1, 5, 4, requires_grad=True)
    with torch.inference_mode():
        k = torch.randn(1, 1, 5, 4)
        inside = flash_attention(q, k, k)
    with pytest.raises(ValueError, match=r"^k must not be an inference tensor.*clone it outside of torch\.inference_mode"):
        flash_attention(q, k, k.clone())
    torch.testing.assert_close(flash_attention(q, k.clone(), k.clone()), inside)
    with torch.no_grad():
        torch.testing.assert_close(flash_attention(q, k, k), inside)


def test_sizes_that_are_symbols() -> None:
    """Without a compiler: torch.export traces a length that is the cache's with a SymInt, which is no int."""

    class Last(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return decode_attention(q, k, k, k.shape[2], scale=k.shape[3] * 0.5)

    q, k = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 9, 4)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Last(), (q, k), dynamic_shapes=({}, {2: tokens}), strict=False)
    for length in (9, 5, 2):
        some = k[:, :, :length].contiguous()
        torch.testing.assert_close(program.module()(q, some), flash_attention(q, some, some, causal=False, scale=2.0))


@pytest.mark.parametrize("mode", ["torch.inference_mode()", "FakeTensorMode()", 'torch.device("meta")'])
def test_the_package_may_be_imported_under_a_mode(mode: str) -> None:
    """What is a plain tensor does not depend on it: values are checked afterwards."""
    code = f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with {mode}:
    import igpt_kernels
from igpt_kernels.tensors import is_plain_cpu
assert is_plain_cpu(torch.ones(2)) and not is_plain_cpu(torch.empty(2, device="meta"))
with torch.inference_mode():
    assert is_plain_cpu(torch.ones(2))
try:
    igpt_kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 4]))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "target must be from 0 to 3 or ignore_index -100, got 4\n"


def test_which_tensors_are_plain() -> None:
    x = torch.ones(2)
    assert is_plain_cpu(x)
    assert is_plain_cpu(torch.nn.Parameter(x))
    assert is_plain_cpu(x.expand(3, 2).t())
    own = x.as_subclass(type("Own", (Tensor,), {}))
    for other in (own, torch._neg_view(x), x.to("meta"), x.to_sparse(), torch._efficientzerotensor(2)):
        assert not is_plain_cpu(other)
    assert torch.func.vmap(lambda row: torch.full_like(row, is_plain_cpu(row)))(torch.ones(2, 2)).eq(0).all()


def test_a_target_whose_sign_is_not_applied_yet_is_read() -> None:
    hidden, weight, target = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, -4, -5])
    with pytest.raises(ValueError, match="target must be from 0 to 4 or ignore_index -100, got 5"):
        linear_cross_entropy(hidden, weight, torch._neg_view(target))
    want = linear_cross_entropy(hidden, weight, -target.clamp(min=-4))
    assert torch.equal(linear_cross_entropy(hidden, weight, torch._neg_view(target.clamp(min=-4))), want)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_autocast_of_any_device(device: str) -> None:
    with FakeTensorMode(), torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16, enabled=True):
        x = torch.empty(4, 8, device=device)
        (cast,) = autocast(x)
        assert cast.dtype == torch.nn.functional.linear(x, x).dtype
    assert autocast(x)[0] is x
