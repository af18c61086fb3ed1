"""Time candidate configurations of every kernel on this GPU and write the device's own table: ``make tune``.

A candidate is timed only if its result is within the error budget; what does not compile, does not fit or computes wrong is
left out. The table goes to ``igpt_kernels/configs/<device>.json``, which `igpt_kernels.tuning` prefers to the family's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial

import torch
from torch import Tensor

from benchmarks import tune_rows
from benchmarks.cases_attention import inputs
from benchmarks.timing import milliseconds
from igpt_kernels import layouts, testing, tuning
from igpt_kernels.reference import attention_reference, decode_attention_reference

TOKENS = 4096
DTYPES = {"16": torch.bfloat16, "32": torch.float32}
WARPS_AND_STAGES = [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]


def candidates(kernel: str, bits: str) -> list[tuning.Config]:
    """What is tried: tiles of 16 to 128 rows, 4 or 8 warps, 1 to 3 stages; less for float32, which has no tensor cores."""
    if kernel == "sparse_decode":
        return [tuning.Config(64, n, warps, 2) for n in (16, 32, 64, 128) for warps in (2, 4, 8)]
    if kernel == "decode":
        return [tuning.Config(1, n, warps, 2) for n in (16, 32, 64, 128) for warps in (2, 4, 8)]
    sides = (32, 64, 128) if bits == "16" else (16, 32, 64)
    return [tuning.Config(m, n, warps, stages) for m in sides for n in sides for warps, stages in WARPS_AND_STAGES]


def pattern(tokens: int) -> layouts.SparseLayout:
    """What the sparse kernels are tuned on: a window of 7 pixels, the most common use."""
    height = math.isqrt(tokens)
    while tokens % height:
        height -= 1
    return layouts.local2d(height, tokens // height, 7)


def runner(kernel: str, tensors: Sequence[Tensor], scale: float) -> Callable[[tuning.Config, tuning.Config], list[Tensor]]:
    """A call of the kernel on q, k, v and a gradient, with (candidate, the other backward kernel's configuration)."""
    q, k, v, grad = tensors
    if kernel.startswith("sparse"):
        return sparse_runner(kernel, tensors, scale)
    from igpt_kernels._triton.decode import launch_decode
    from igpt_kernels._triton.flash_backward import launch_flash_backward
    from igpt_kernels._triton.flash_forward import launch_flash_forward

    if kernel == "flash_forward":
        return lambda config, _: [launch_flash_forward(q, k, v, causal=True, scale=scale, config=config)[0]]
    if kernel == "decode":
        return lambda config, _: [launch_decode(q[:, :, -1:], k, v, k.shape[2], scale=scale, config=config)[0]]
    out, lse = launch_flash_forward(q, k, v, causal=True, scale=scale)

    def backward(config: tuning.Config, other: tuning.Config) -> list[Tensor]:
        pair = (config, other) if kernel == "flash_backward_keys" else (other, config)
        return list(
            launch_flash_backward(grad, q, k, v, out, lse, causal=True, scale=scale, key_config=pair[0], query_config=pair[1])
        )

    return backward


def sparse_runner(
    kernel: str, tensors: Sequence[Tensor], scale: float
) -> Callable[[tuning.Config, tuning.Config], list[Tensor]]:
    """`runner` for the block-sparse kernels."""
    from igpt_kernels._triton.sparse_backward import launch_sparse_backward
    from igpt_kernels._triton.sparse_decode import launch_sparse_decode
    from igpt_kernels._triton.sparse_forward import launch_sparse_forward

    q, k, v, grad = tensors
    groups = [(pattern(q.shape[2]).key, range(q.shape[1]))]
    if kernel == "sparse_forward":
        return lambda config, _: [launch_sparse_forward(q, k, v, groups, scale=scale, config=config)[0]]
    if kernel == "sparse_decode":
        return lambda config, _: [launch_sparse_decode(q[:, :, -1:], k, v, k.shape[2], groups, scale=scale, config=config)[0]]
    out, lse = launch_sparse_forward(q, k, v, groups, scale=scale)

    def backward(config: tuning.Config, other: tuning.Config) -> list[Tensor]:
        pair = (config, other) if kernel == "sparse_backward_keys" else (other, config)
        return list(
            launch_sparse_backward(grad, q, k, v, out, lse, groups, scale=scale, key_config=pair[0], query_config=pair[1])
        )

    return backward


def truth(kernel: str, tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """What the kernel should compute, in the dtype of its inputs."""
    q, k, v, grad = tensors
    if kernel == "decode":
        return [decode_attention_reference(q[:, :, -1:], k, v, k.shape[2], scale=scale)]
    mask = pattern(q.shape[2]).dense_mask(q.device) if kernel.startswith("sparse") else None
    result = testing.attention_result(lambda *x: attention_reference(*x, scale=scale, mask=mask)[0], (q, k, v), grad)
    if kernel == "sparse_decode":
        return [result.out[:, :, -1:]]
    return [result.out] if kernel.endswith("forward") else [result.dq, result.dk, result.dv]


Call = Callable[[tuning.Config, tuning.Config], list[Tensor]]


def prepared(kernel: str, bits: str, size: int) -> tuple[Call, Call, list[Tensor], list[Tensor]]:
    """A small call to check a candidate with and a large one to time it, and what the small one should give: exact, eager."""
    dtype = DTYPES[bits]
    if kernel in tune_rows.KERNELS:
        tensors = tune_rows.material(kernel, size, dtype)
        few = tune_rows.some(kernel, tensors, 500)
        exact = tune_rows.truth(kernel, [x.double() if x.is_floating_point() else x for x in few])
        return tune_rows.runner(kernel, few), tune_rows.runner(kernel, tensors), exact, tune_rows.truth(kernel, few)
    qkv, grad = inputs(1, 8, TOKENS, size)
    tensors = [x.detach().to(dtype) for x in (*qkv, grad)]
    scale = size**-0.5
    few = [x[:, :2, :500] for x in tensors]
    exact = truth(kernel, [x.double() for x in few], scale)
    return runner(kernel, few, scale), runner(kernel, tensors, scale), exact, truth(kernel, few, scale)


def best(kernel: str, bits: str, head_dim: int, shipped: tuning.Config, other: tuning.Config) -> tuning.Config:
    """The fastest verified candidate; the shipped configuration where none is faster by 2 %."""
    check, run, exact, eager = prepared(kernel, bits, head_dim)
    rows = kernel in tune_rows.KERNELS
    tried = tune_rows.candidates(kernel, bits, head_dim) if rows else candidates(kernel, bits)
    found: list[tuple[float, tuning.Config]] = []
    for config in dict.fromkeys([shipped, *tried]):
        try:
            for mine, true, low in zip(check(config, other), exact, eager, strict=True):
                testing.error_ratio(mine, true, low, factor=3, floor=8.0)
            found.append((milliseconds(partial(run, config, other), 10)[0], config))
        except Exception as error:
            # Any failure of a candidate, of the compiler's too, only means that it is not chosen; the shipped one must run.
            if config == shipped:
                raise
            print(f"  {astuple(config)}: {type(error).__name__}", flush=True)
    fastest, config = min(found, key=lambda pair: pair[0])
    print(
        f"{kernel} {bits} bits, size {head_dim}: {astuple(config)} {fastest:.3f} ms, shipped {found[0][0]:.3f} ms", flush=True
    )
    return config if fastest < 0.98 * found[0][0] else shipped


def main() -> int:
    """Tune all that the nearest table lists, and write the device's own; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("benchmarks.tune needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    shipped: Mapping[str, Mapping[str, Mapping[str, tuning.Config]]] = tuning.table(tuning.table_for(torch.device("cuda", 0)))
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for kernel, by_bits in shipped.items():
        for bits, dims in by_bits.items():
            for head_dim, config in dims.items():
                other = tuning.nearest(shipped, tuning.PAIRS.get(kernel, kernel), int(bits), int(head_dim))
                chosen = best(kernel, bits, int(head_dim), config, other)
                kernels.setdefault(kernel, {}).setdefault(bits, {})[head_dim] = list(astuple(chosen))
    path = tuning.FOLDER / f"{tuning.slug(torch.cuda.get_device_name())}.json"
    path.write_text(json.dumps({"kernels": kernels}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}; benchmarks.audit and the tests read it from now on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
