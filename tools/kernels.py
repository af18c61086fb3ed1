"""The catalogue of Triton kernels: how each is called, on what, what it should give, and what may be tried.

`tools.audit`, `tools.tune`, `tools.sanitize`, `tools.kernel_plan` and the tests of completeness read `KERNELS` and
`OPERATIONS`. A new kernel is a record here; its name is that of its entry in ``igpt_kernels/configs/*.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from igpt_kernels import attention, layouts, reference, tuning
from igpt_kernels._triton import (
    activation,
    attention_backward,
    attention_forward,
    decode,
    loss,
    norm,
    sparse_backward,
    sparse_decode,
    sparse_forward,
)
from igpt_kernels.activation import quick_gelu
from igpt_kernels.loss import linear_cross_entropy
from igpt_kernels.norm import rms_norm
from igpt_kernels.tuning import Config

DTYPES = {16: torch.bfloat16, 32: torch.float32}
"""Bits of a value -> the dtype that stands for it."""
HEAD_DIMS = (64, 96, 128)
"""Of Image GPT S, L and M."""
IGNORE_INDEX = -100
EPS = 1e-5
LOSS_WIDTH = 512
"""Values of a row whose loss is taken, where the size of the table is the number of classes."""
UNALIGNED_WIDTH = 100
"""Rows of which a load takes less than 16 bytes, so that the smallest entry of the table serves them."""


@dataclass(frozen=True)
class Inputs:
    """What an operation is called with.

    Attributes:
        tensors: in the order of the operation; None for one that is left out.
        how: the other arguments, by name.
    """

    tensors: tuple[Tensor | None, ...]
    how: Mapping[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same with floating point tensors of another dtype."""
        moved = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in self.tensors)
        return replace(self, tensors=tuple(moved))


Call = Callable[[Config | None, Config | None], list[Tensor]]
"""A launch with (the kernel's configuration, its partner's); None is the shipped one."""


@dataclass(frozen=True)
class Operation:
    """Inputs, oracle and public function of an operation; several kernels may belong to it.

    Attributes:
        name: file of ``tests/interpreter`` that runs its kernels.
        inputs: ``(size, rows, dtype, device, form) -> Inputs``.
        oracle: what should come out: outputs, and gradients.
        public: the same by the public functions on a GPU, all in one list.
        timed_rows: rows (attention: tokens) whose time decides.
        odd_rows: rows at which tiles end in the middle.
        forms: how many kinds of inputs there are.
        audited_forms: those that the audit compiles; the first kind is what is timed.
        sizes: sizes of Image GPT that an entry for a larger size serves.
    """

    name: str
    inputs: Callable[[int, int, torch.dtype, torch.device | str, int], Inputs]
    oracle: Callable[[Inputs], tuple[list[Tensor], list[Tensor]]]
    public: Callable[[Inputs], list[Tensor]]
    timed_rows: int
    odd_rows: int
    forms: int = 1
    audited_forms: tuple[int, ...] = (0,)
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One entry of the tables of configurations.

    Attributes:
        operation: what it computes a part of.
        functions: its Triton functions, without underscore and ``_kernel``.
        kind: ``"product"`` multiplies matrices, ``"rows"`` is bound by memory and lists widths, ``"decode"`` reads a cache.
        prepare: makes a launch from inputs.
        candidates: configurations to try, for (bits, size).
        backward: whether its result is the gradients.
        compiled_only: functions in Gluon, which Triton's interpreter does not run. A flag of a configuration chooses them.
    """

    operation: Operation
    functions: tuple[str, ...]
    kind: Literal["product", "rows", "decode"]
    prepare: Callable[[Inputs], Call]
    candidates: Callable[[int, int], list[Config]]
    backward: bool = False
    compiled_only: tuple[str, ...] = ()

    def truth(self, inputs: Inputs) -> list[Tensor]:
        """What the oracle gives for these inputs, at their dtype."""
        return self.operation.oracle(inputs)[self.backward]


def _random(*size: int, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*size, dtype=torch.float32, device=device, generator=generator).to(dtype)


# Attention: q, k, v and the gradient of the output, as a model with a fused projection has them.


def _heads(size: int, rows: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, ...]:
    batch, heads = (1, 8) if rows >= 4096 else (2, 2)
    fused = _random(batch, rows, 3, heads, size, dtype=dtype, device=device, seed=0)
    grad = _random(batch, rows, heads, size, dtype=dtype, device=device, seed=1)
    return (*(fused[:, :, i].transpose(1, 2) for i in range(3)), grad.transpose(1, 2))


def _attention_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    return Inputs(_heads(size, rows, dtype, device), {"causal": True})


def _pattern(tokens: int, form: int) -> layouts.SparseLayout:
    """A window of 7 pixels, the most common use; as form 1 rows and columns, which are two parts."""
    height = math.isqrt(tokens)
    while tokens % height:
        height -= 1
    return layouts.parse(("local2d:7", "row_column")[form], height, tokens // height)


def _sparse_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    return Inputs(_heads(size, rows, dtype, device), {"layout": _pattern(rows, form)})


def _decode_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    q, k, v, _ = _heads(size, rows, dtype, device)
    return Inputs((q[:, :, -1:], k, v, torch.full((q.shape[0],), rows, device=device)))


def _sparse_decode_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    inputs = _decode_inputs(size, rows, dtype, device, form)
    return replace(inputs, how={"layout": _pattern(rows, form)})


def _groups(inputs: Inputs) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return layouts.groups_of(inputs.how["layout"].key, _present(inputs)[1].shape[1])


def _present(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.tensors if x is not None]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _attention_oracle(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    *tensors, grad = _present(inputs)
    leaves, mask, layout = _leaves(tensors), None, inputs.how.get("layout")
    if layout is not None:
        mask = layout.dense_mask(grad.device)
    causal = inputs.how.get("causal", False)
    out, _ = reference.attention_reference(*leaves, causal=causal, scale=grad.shape[3] ** -0.5, mask=mask)
    return [out.detach()], list(torch.autograd.grad(out, leaves, grad))


def _attention_public(inputs: Inputs) -> list[Tensor]:
    *tensors, grad = _present(inputs)
    (q, k, v), layout = _leaves(tensors), inputs.how.get("layout")
    if layout is None:
        out = attention.flash_attention(q, k, v, causal=inputs.how["causal"], backend="triton")
    else:
        out = attention.block_sparse_attention(q, k, v, layout, backend="triton")
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def _decode_with(inputs: Inputs, backend: str) -> Tensor:
    q, k, v, lengths = _present(inputs)
    return attention.decode_attention(q, k, v, lengths, layout=inputs.how.get("layout"), backend=backend)


def _flash_forward(inputs: Inputs) -> Call:
    q, k, v, _ = _present(inputs)
    scale, causal = q.shape[3] ** -0.5, inputs.how["causal"]
    return lambda config, _: [attention_forward.launch_flash_forward(q, k, v, causal, scale, config=config)[0]]


def _flash_backward(keys: bool) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        q, k, v, grad = _present(inputs)
        scale, causal = q.shape[3] ** -0.5, inputs.how["causal"]
        out, lse = attention_forward.launch_flash_forward(q, k, v, causal, scale)
        launch = partial(attention_backward.launch_flash_backward, grad, q, k, v, out, lse, causal, scale)
        return _one_of_two(launch, keys)

    return prepare


def _one_of_two(launch: Callable[..., Sequence[Tensor]], keys: bool) -> Call:
    """A call whose first configuration goes to the dK, dV kernel or, without `keys`, to the dQ kernel."""

    def call(config: Config | None, other: Config | None) -> list[Tensor]:
        first, second = (config, other) if keys else (other, config)
        return list(launch(key_config=first, query_config=second))

    return call


def _sparse_forward(inputs: Inputs) -> Call:
    q, k, v, _ = _present(inputs)
    groups, scale = _groups(inputs), q.shape[3] ** -0.5
    return lambda config, _: [sparse_forward.launch_sparse_forward(q, k, v, groups, scale, config=config)[0]]


def _sparse_backward(keys: bool) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        q, k, v, grad = _present(inputs)
        groups, scale = _groups(inputs), q.shape[3] ** -0.5
        out, lse = sparse_forward.launch_sparse_forward(q, k, v, groups, scale)
        return _one_of_two(partial(sparse_backward.launch_sparse_backward, grad, q, k, v, out, lse, groups, scale), keys)

    return prepare


def _decode(inputs: Inputs) -> Call:
    q, k, v, lengths = _present(inputs)
    return lambda config, _: [decode.launch_decode(q, k, v, lengths, q.shape[3] ** -0.5, config=config)[0]]


def _sparse_decode(inputs: Inputs) -> Call:
    q, k, v, lengths = _present(inputs)
    groups, scale = _groups(inputs), q.shape[3] ** -0.5
    return lambda config, _: [sparse_decode.launch_sparse_decode(q, k, v, lengths, groups, scale, config=config)[0]]


# Norm: x, residual, weight and the gradients of both outputs. Form 1 has a residual; in float32 then a bfloat16 branch
# joins a float32 residual, as under autocast.


def _norm_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    x, residual, grad, grad_sum = (_random(rows, size, dtype=dtype, device=device, seed=seed) for seed in range(4))
    weight = _random(size, dtype=dtype, device=device, seed=4)
    if form == 0:
        return Inputs((x, None, weight, grad, None))
    return Inputs((x.to(torch.bfloat16), residual, weight, grad, grad_sum))


def _norm_with(function: Callable[..., Any], inputs: Inputs, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    x, residual, weight, *grads = inputs.tensors
    leaves = _leaves([each for each in (x, residual, weight) if each is not None])
    found = function(leaves[0], leaves[-1], residual=None if residual is None else leaves[1], **options)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    given = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False) if grad is not None]
    return [out.detach() for out in outputs], list(torch.autograd.grad(outputs, leaves, given))


def _norm_forward(inputs: Inputs) -> Call:
    x, residual, weight = inputs.tensors[:3]
    assert x is not None
    assert weight is not None

    def call(config: Config | None, _: Config | None) -> list[Tensor]:
        out, summed, _rstd = norm.launch_rms_norm_forward(x, residual, weight, EPS, config=config)
        return [out] if summed is None else [out, summed]

    return call


def _norm_backward(inputs: Inputs) -> Call:
    x, residual, weight, grad, grad_sum = inputs.tensors
    assert x is not None
    assert weight is not None
    assert grad is not None
    _, summed, rstd = norm.launch_rms_norm_forward(x, residual, weight, EPS)
    s = x if summed is None else summed
    narrow = None if x.dtype == s.dtype else x.dtype

    def call(config: Config | None, _: Config | None) -> list[Tensor]:
        ds, dx, dweight = norm.launch_rms_norm_backward(grad, grad_sum, s, weight, rstd, narrow, config=config)
        first = ds if narrow is None or dx is None else dx
        return [first, dweight] if residual is None else [first, ds, dweight]

    return call


# Activation: x, bias and the gradient. Form 1 has no bias.


def _activation_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    x, grad = (_random(rows, size, dtype=dtype, device=device, seed=seed) for seed in range(2))
    return Inputs((x, _random(size, dtype=dtype, device=device, seed=2) if form == 0 else None, grad))


def _activation_with(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    x, bias, grad = inputs.tensors
    leaves = _leaves([each for each in (x, bias) if each is not None])
    out = function(leaves[0], bias=None if bias is None else leaves[1], **options)
    return [out.detach()], list(torch.autograd.grad(out, leaves, grad))


def _activation_forward(inputs: Inputs) -> Call:
    x, bias, _ = inputs.tensors
    assert x is not None
    return lambda config, _: [activation.launch_quick_gelu_forward(x, bias, config=config)]


def _activation_backward(inputs: Inputs) -> Call:
    x, bias, grad = inputs.tensors
    assert x is not None
    assert grad is not None
    return lambda config, _: [
        each for each in activation.launch_quick_gelu_backward(grad, x, bias, config=config) if each is not None
    ]


# Loss: hidden, weight, target and the gradient of every row. Form 1 has rows that no load of 16 bytes fits.


def _loss_inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
    width = (LOSS_WIDTH, UNALIGNED_WIDTH)[form]
    hidden = _random(rows, width, dtype=dtype, device=device, seed=0)
    weight = (_random(size, width, dtype=torch.float32, device=device, seed=1) * width**-0.5).to(dtype)
    target = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
    return Inputs((hidden, weight, target, torch.full((rows,), 1 / rows, device=device)))


def _loss_with(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    *tensors, target, grad = _present(inputs)
    leaves = _leaves(tensors)
    out = function(*leaves, target, reduction="none", **options)
    return [out.detach()], list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def _loss_forward(inputs: Inputs) -> Call:
    hidden, weight, target, _ = _present(inputs)
    return lambda config, _: [loss.launch_cross_entropy_forward(hidden, weight, target, IGNORE_INDEX, 0.0, config=config)[0]]


def _loss_gradient(inputs: Inputs) -> Call:
    """The gradients of a mean, which is what `_loss_inputs` asks for, and what scales them."""
    hidden, weight, target, grad = _present(inputs)
    one = torch.ones((), device=grad.device)

    def call(config: Config | None, _: Config | None) -> list[Tensor]:
        made = loss.launch_cross_entropy_sum(hidden, weight, target, IGNORE_INDEX, 0.0, True, config=config)
        loss.launch_cross_entropy_scale_(made[1], one)
        return [made[1], loss.launch_cross_entropy_scaled(made[2], one, weight.dtype)]

    return call


def _together(found: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*found[0], *found[1]]


# What may be tried.


def _attention_candidates(bits: int, size: int) -> list[Config]:
    """Tiles of 16 to 128 rows, 4 or 8 warps, 1 to 3 stages; less for float32, which has no tensor cores."""
    sides = (32, 64, 128) if bits == 16 else (16, 32, 64)
    return [Config(m, n, warps, stages) for m in sides for n in sides for warps in (4, 8) for stages in (1, 2, 3)]


def _decode_candidates(bits: int, size: int) -> list[Config]:
    return [Config(1, n, warps, 2) for n in (16, 32, 64, 128) for warps in (2, 4, 8)]


def _sparse_decode_candidates(bits: int, size: int) -> list[Config]:
    return [replace(config, block_m=64) for config in _decode_candidates(bits, size)]


def _row_candidates(columns: Sequence[int], programs: Sequence[int]) -> Iterator[Config]:
    """Tiles of up to 8,192 values."""
    for n in columns:
        for m in (1, 2, 4, 8, 16, 32, 64):
            if m * n <= 8192:
                yield from (Config(m, n, warps, count) for warps in (2, 4, 8) for count in programs)


def _norm_candidates(backward: bool) -> Callable[[int, int], list[Config]]:
    """Tiles of whole rows, and backward programs on a multiprocessor."""
    programs = (1, 2, 3, 4, 6) if backward else (1,)
    return lambda bits, size: list(_row_candidates([1 << (size - 1).bit_length()], programs))


def _activation_candidates(backward: bool) -> Callable[[int, int], list[Config]]:
    programs = (1, 2, 3, 4, 6) if backward else (1,)

    def candidates(bits: int, size: int) -> list[Config]:
        widest = max(1 << (size - 1).bit_length(), 128)
        return list(_row_candidates([n for n in (128, 256, 512, 1024) if n <= widest], programs))

    return candidates


def _loss_candidates(bits: int, size: int) -> list[Config]:
    sides = (64, 128, 256) if bits == 16 else (32, 64, 128)
    return [Config(m, n, warps, stages) for m in sides for n in sides for warps in (4, 8) for stages in (2, 3, 4)]


ATTENTION = Operation(
    "attention", _attention_inputs, _attention_oracle, _attention_public, timed_rows=4096, odd_rows=77, sizes=HEAD_DIMS
)
DECODE = Operation(
    "attention", _decode_inputs, lambda inputs: ([_decode_with(inputs, "reference")], []),
    lambda inputs: [_decode_with(inputs, "triton")], timed_rows=4096, odd_rows=77, sizes=HEAD_DIMS,
)  # fmt: skip
SPARSE = Operation(
    "sparse", _sparse_inputs, _attention_oracle, _attention_public, timed_rows=4096, odd_rows=143, forms=2,
    audited_forms=(1,), sizes=HEAD_DIMS,
)  # fmt: skip
SPARSE_DECODE = Operation(
    "sparse", _sparse_decode_inputs, lambda inputs: ([_decode_with(inputs, "reference")], []),
    lambda inputs: [_decode_with(inputs, "triton")], timed_rows=4096, odd_rows=143, forms=2, audited_forms=(1,),
    sizes=HEAD_DIMS,
)  # fmt: skip
NORM = Operation(
    "norm", _norm_inputs, lambda inputs: _norm_with(reference.rms_norm_reference, inputs, eps=EPS),
    lambda inputs: _together(_norm_with(rms_norm, inputs, eps=EPS, backend="triton")),
    timed_rows=32768, odd_rows=37, forms=2, audited_forms=(0, 1), sizes=(512, 1024, 1536),
)  # fmt: skip
ACTIVATION = Operation(
    "activation", _activation_inputs, lambda inputs: _activation_with(reference.quick_gelu_reference, inputs),
    lambda inputs: _together(_activation_with(quick_gelu, inputs, backend="triton")),
    timed_rows=32768, odd_rows=37, forms=2, audited_forms=(0, 1), sizes=(2048, 4096, 6144),
)  # fmt: skip
LOSS = Operation(
    "loss", _loss_inputs, lambda inputs: _loss_with(reference.linear_cross_entropy_reference, inputs),
    lambda inputs: _together(_loss_with(linear_cross_entropy, inputs, backend="triton")),
    timed_rows=32768, odd_rows=77, forms=2, audited_forms=(0, 1), sizes=(512,),
)  # fmt: skip
OPERATIONS = {
    "flash_attention": ATTENTION,
    "decode_attention": DECODE,
    "block_sparse_attention": SPARSE,
    "sparse decode_attention": SPARSE_DECODE,
    "rms_norm": NORM,
    "quick_gelu": ACTIVATION,
    "linear_cross_entropy": LOSS,
}

KERNELS = {
    "flash_forward": Kernel(
        ATTENTION, ("flash_forward",), "product", _flash_forward, _attention_candidates, compiled_only=("flash_forward_gluon",)
    ),
    "flash_backward_keys": Kernel(
        ATTENTION, ("flash_backward_keys", "flash_delta"), "product", _flash_backward(True), _attention_candidates, True
    ),
    "flash_backward_queries": Kernel(
        ATTENTION, ("flash_backward_queries",), "product", _flash_backward(False), _attention_candidates, True
    ),
    "decode": Kernel(DECODE, ("decode", "decode_merge"), "decode", _decode, _decode_candidates),
    "sparse_forward": Kernel(SPARSE, ("sparse_forward",), "product", _sparse_forward, _attention_candidates),
    "sparse_backward_keys": Kernel(
        SPARSE, ("sparse_backward_keys",), "product", _sparse_backward(True), _attention_candidates, True
    ),
    "sparse_backward_queries": Kernel(
        SPARSE, ("sparse_backward_queries",), "product", _sparse_backward(False), _attention_candidates, True
    ),
    "sparse_decode": Kernel(SPARSE_DECODE, ("sparse_decode",), "decode", _sparse_decode, _sparse_decode_candidates),
    "rms_norm_forward": Kernel(NORM, ("rms_norm_forward",), "rows", _norm_forward, _norm_candidates(False)),
    "rms_norm_backward": Kernel(
        NORM, ("rms_norm_backward", "sum_partials"), "rows", _norm_backward, _norm_candidates(True), True
    ),
    "quick_gelu_forward": Kernel(
        ACTIVATION, ("quick_gelu_forward", "quick_gelu_flat"), "rows", _activation_forward, _activation_candidates(False)
    ),
    "quick_gelu_backward": Kernel(
        ACTIVATION, ("quick_gelu_backward", "quick_gelu_flat", "sum_partials"), "rows", _activation_backward,
        _activation_candidates(True), True,
    ),
    "cross_entropy_forward": Kernel(LOSS, ("cross_entropy_forward",), "product", _loss_forward, _loss_candidates),
    "cross_entropy_gradient": Kernel(
        LOSS, ("cross_entropy_gradient", "cross_entropy_scale"), "rows", _loss_gradient, _norm_candidates(False), True
    ),
}  # fmt: skip
"""Entry of the tables of configurations -> the kernel."""


def partner(kernel: str) -> str:
    """The kernel whose configuration a launch takes beside this one's; itself where there is none."""
    return tuning.PAIRS.get(kernel, kernel)


def listed_sizes(table: str, operation: Operation, bits: int) -> list[int]:
    """The sizes that a table lists for the kernels of an operation, and those of Image GPT."""
    mine = [name for name, kernel in KERNELS.items() if kernel.operation is operation]
    return sorted({int(size) for name in mine for size in tuning.table(table)[name][str(bits)]} | set(operation.sizes))
