"""What `benchmarks.tune` needs to know of the kernels over rows: norm, activation, and the loss of an output matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from igpt_kernels import tuning
from igpt_kernels.reference import linear_cross_entropy_reference, quick_gelu_reference, rms_norm_reference

KERNELS = tuple(f"{op}_{way}" for op in ("rms_norm", "quick_gelu", "cross_entropy") for way in ("forward", "backward"))
ROWS = 32768
"""Rows that are timed: at the widths of Image GPT beyond the L2 cache."""
WIDTH = 512
"""Values of a row whose loss is timed, where the size of the table is the number of classes."""
EPS = 1e-5


def candidates(kernel: str, bits: str, size: int) -> list[tuning.Config]:
    """What is tried: for products tiles as of attention, else tiles of up to 32 KiB, and programs on a multiprocessor."""
    if kernel.startswith("cross_entropy"):
        sides = (64, 128, 256) if bits == "16" else (32, 64, 128)
        return [tuning.Config(m, n, warps, stages) for m in sides for n in sides for warps in (4, 8) for stages in (2, 3, 4)]
    whole = 1 << (size - 1).bit_length()
    cols = (whole,) if kernel.startswith("rms_norm") else tuple(n for n in (128, 256, 512, 1024) if n <= max(whole, 128))
    programs = (1,) if kernel.endswith("forward") else (1, 2, 3, 4, 6)
    tiles = [(m, n) for n in cols for m in (1, 2, 4, 8, 16, 32, 64) if m * n <= 8192]
    return [tuning.Config(m, n, warps, count) for m, n in tiles for warps in (2, 4, 8) for count in programs]


def material(kernel: str, size: int, dtype: torch.dtype, device: torch.device | str = "cuda") -> list[Tensor]:
    """Random normal input, gradient and weights; the loss also has targets. `size` is a width, or the number of classes."""
    if kernel.startswith("cross_entropy"):
        hidden = torch.randn(ROWS, WIDTH, device=device).to(dtype)
        weight = (torch.randn(size, WIDTH, device=device) * WIDTH**-0.5).to(dtype)
        return [hidden, torch.full((ROWS,), 1 / ROWS, device=device), weight, torch.randint(size, (ROWS,), device=device)]
    x, grad = (torch.randn(ROWS, size, device=device).to(dtype) for _ in range(2))
    return [x, grad, torch.randn(size, device=device).to(dtype)]


def some(kernel: str, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """The first rows, for a check."""
    per_row = (0, 1, 3)
    return [x[:rows] if index in per_row else x for index, x in enumerate(tensors)]


def runner(kernel: str, tensors: Sequence[Tensor]) -> Callable[[tuning.Config, tuning.Config], list[Tensor]]:
    """A call of the kernel with a candidate; the second configuration is not used."""
    from igpt_kernels._triton import linear_cross_entropy as loss
    from igpt_kernels._triton import quick_gelu, rms_norm

    x, grad, weight, *target = tensors
    if kernel == "rms_norm_forward":
        return lambda config, _: [rms_norm.launch_rms_norm_forward(x, None, weight, eps=EPS, config=config)[0]]
    if kernel == "rms_norm_backward":
        rstd = rms_norm.launch_rms_norm_forward(x, None, weight, eps=EPS)[2]

        def backward(config: tuning.Config, _: tuning.Config) -> list[Tensor]:
            ds, _none, dweight = rms_norm.launch_rms_norm_backward(grad, None, x, weight, rstd, config=config)
            return [ds, dweight]

        return backward
    if kernel == "quick_gelu_forward":
        return lambda config, _: [quick_gelu.launch_quick_gelu_forward(x, weight, config=config)]
    if kernel == "quick_gelu_backward":
        return lambda config, _: [
            found for found in quick_gelu.launch_quick_gelu_backward(grad, x, weight, config=config) if found is not None
        ]
    if kernel == "cross_entropy_forward":
        return lambda config, _: [
            loss.launch_cross_entropy_forward(x, weight, target[0], ignore_index=-100, z_loss=0.0, config=config)[0]
        ]
    lse = loss.launch_cross_entropy_forward(x, weight, target[0], ignore_index=-100, z_loss=0.0)[1]
    return lambda config, _: list(
        loss.launch_cross_entropy_backward(grad, x, weight, target[0], lse, ignore_index=-100, z_loss=0.0, config=config)
    )


def truth(kernel: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the kernel should compute, in the dtype of its inputs."""
    x, grad, weight, *target = tensors
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    if kernel.startswith("rms_norm"):
        out = rms_norm_reference(x, weight, eps=EPS)
    elif kernel.startswith("quick_gelu"):
        out = quick_gelu_reference(x, bias=weight)
    else:
        out = linear_cross_entropy_reference(x, weight, target[0], reduction="none")
    assert isinstance(out, Tensor)
    if kernel.endswith("forward"):
        return [out.detach()]
    return list(torch.autograd.grad(out, (x, weight), grad.to(out.dtype)))
