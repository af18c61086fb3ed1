"""Argument checks: one style of error for every operation. Each names the argument, what came and what is wanted."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from igpt_kernels.layouts import SparseLayout, joined
from igpt_kernels.messages import shown
from igpt_kernels.tensors import is_readable, python_number

# A whole number can be finite and above it; comparisons find that, `float` raises OverflowError.
_LARGEST = sys.float_info.max
# Their own check of instances takes 1 µs, that of a type 0.1.
_WITHOUT_SHAPE = (UninitializedParameter, UninitializedBuffer)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def check_tensor(name: str, value: object, *, ndim: int | None = None, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Return `value` if it is a tensor of the wanted rank and dtype.

    Raises:
        TypeError: not a tensor, or a dtype outside `dtypes`.
        ValueError: a sparse or nested tensor, or another number of dimensions than `ndim`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) in _WITHOUT_SHAPE:
        raise ValueError(f"{name} must have a shape, got a parameter that its lazy module has not initialised")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name} must be a dense tensor (layout torch.strided), got {kind}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}; got {str(value.dtype).removeprefix('torch.')}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def check_memory(tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors that an operator could not read, or could not keep for the backward pass.

    Raises:
        ValueError: memory that was freed (``untyped_storage().resize_(0)``), which would end the process; an inference tensor
            beside one that requires a gradient, which torch refuses without a name.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
    for name, x in tensors.items():
        if x is None:
            continue
        if recorded and x.is_inference():
            raise ValueError(
                f"{name} must not be an inference tensor where another argument requires a gradient; "
                "clone it outside of torch.inference_mode"
            )
        # Of these classes only: others, those that stand for a tensor while it is traced, refuse to say where they lie.
        if (type(x) is Tensor or type(x) is torch.nn.Parameter) and not x.data_ptr() and x.numel() and not x.is_meta:
            raise ValueError(f"{name} must have memory, got shape {tuple(x.shape)} on a storage of 0 bytes")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_whole(name: str, value: object) -> int:
    """The integer that `value` is, one of NumPy too. Raises TypeError."""
    number: int = python_number(value)  # type: ignore[assignment]
    if not _is_whole(number):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    return number


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Under torch.autocast, floating-point tensors in its dtype, as torch's own products take them."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    # Of the device "meta", which computes shapes only, torch cannot say whether it has autocast.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def check_attention(q: object, k: object, v: object, names: Sequence[str] = ("q", "k", "v")) -> tuple[Tensor, Tensor, Tensor]:
    """Check q [B,H,Tq,D], k and v [B,H,Tk,D] of one dtype and device; `names` are those of the arguments.

    Raises:
        TypeError: not tensors, not floating point, or mixed dtypes.
        ValueError: shapes or devices that do not fit together, or what `check_memory` refuses.
    """
    q = check_tensor(names[0], q, ndim=4, dtypes=FLOAT_DTYPES)
    shape, device = q.shape, q.device
    for name, value in ((names[1], k), (names[2], v)):
        other = check_tensor(name, value, ndim=4, dtypes=FLOAT_DTYPES)
        theirs = other.shape
        if other.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {other.dtype}")
        if other.device != device:
            raise ValueError(f"{name} must be on the device of q ({device}), got {other.device}")
        if theirs[0] != shape[0] or theirs[1] != shape[1] or theirs[3] != shape[3]:
            raise ValueError(
                f"{name} must be [B,H,T,D] with B, H, D of q {tuple(q.shape)}, got {tuple(other.shape)}; "
                "grouped heads are not supported"
            )
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    if k.shape != v.shape:
        raise ValueError(f"{names[2]} must have the shape of {names[1]} {tuple(k.shape)}, got {tuple(v.shape)}")
    check_memory(dict(zip(names, (q, k, v), strict=True)))
    return q, k, v


def check_causal(causal: object) -> bool:
    """Whether the future is hidden. Raises TypeError unless it is a bool, which the operators want."""
    causal = python_number(causal)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {shown(causal)}")
    return causal


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale: 1/sqrt(D) when None. Raises ValueError unless it is a finite number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    number: float = python_number(scale)  # type: ignore[assignment]
    if not _is_number(number) or not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"scale must be a finite number or None, got {shown(scale)}")
    return float(number)


def check_eps(eps: float) -> float:
    """What is added to a mean of squares. Raises ValueError unless it is a finite number, not negative."""
    number: float = python_number(eps)  # type: ignore[assignment]
    if not _is_number(number) or not 0 <= number <= _LARGEST:
        raise ValueError(f"eps must be a finite number from 0 on, got {shown(eps)}")
    return float(number)


def check_rows(x: object) -> Tensor:
    """Check x [..., C]: floating point, at least one dimension, C at least 1.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: no dimension, or rows without values.
    """
    x = check_tensor("x", x, dtypes=FLOAT_DTYPES)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., C] with C at least 1, got shape {tuple(x.shape)}")
    return x


def check_companion(name: str, value: object, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Check a tensor that goes with `x`: of `shape`, on its device; its dtype may differ, but float64 goes with float64 only.

    Raises:
        TypeError: not a tensor, not floating point, or float64 beside another dtype.
        ValueError: another shape or device.
    """
    other = check_tensor(name, value, dtypes=FLOAT_DTYPES)
    if (other.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 exactly where x is; got {other.dtype} with x of {x.dtype}")
    if tuple(other.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(other.shape)}")
    if other.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {other.device}")
    return other


def check_loss(
    hidden: object, weight: object, target: object, ignore_index: object, reduction: object, z_loss: object
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Check the arguments of a linear layer's cross-entropy: hidden [..., C], weight [V,C], target int [...] (to int64).

    Targets are read on the CPU only, because reading them from a GPU would stall the stream.

    Raises:
        TypeError: not tensors, wrong or mixed dtypes, or an `ignore_index` that is no int.
        ValueError: shapes or devices that do not fit together, a value out of range, or what `check_memory` refuses.
    """
    hidden = check_tensor("hidden", hidden, dtypes=FLOAT_DTYPES)
    weight = check_tensor("weight", weight, ndim=2, dtypes=FLOAT_DTYPES)
    target = check_tensor("target", target, dtypes=INT_DTYPES)
    if target.dtype != torch.int64:
        target = target.to(torch.int64)
    (*leading, width), (vocab, depth), device = hidden.shape or (0,), weight.shape, hidden.device
    if width < 1:
        raise ValueError(f"hidden must be [..., C] with C at least 1, got shape {tuple(hidden.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have the dtype of hidden ({hidden.dtype}), got {weight.dtype}")
    if depth != width or vocab < 1:
        raise ValueError(f"weight must be [V,C] with hidden's C = {width}, got shape {tuple(weight.shape)}")
    if list(target.shape) != leading:
        raise ValueError(f"target must have the shape {tuple(leading)} of hidden's rows, got {tuple(target.shape)}")
    for name, value in (("weight", weight), ("target", target)):
        if value.device != device:
            raise ValueError(f"{name} must be on the device of hidden ({device}), got {value.device}")
    ignored = check_whole("ignore_index", ignore_index)
    if not -(2**63) <= ignored < 2**63:
        raise ValueError(f"ignore_index must fit into int64 like the targets, got {ignored}")
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none; got {shown(reduction)}")
    # Comparisons, not math.isfinite, which torch.compile cannot trace where it takes the number for a variable.
    factor: float = python_number(z_loss)  # type: ignore[assignment]
    if not _is_number(factor) or not 0 <= factor <= _LARGEST:
        raise ValueError(f"z_loss must be a finite number from 0 on, got {shown(z_loss)}")
    check_memory({"hidden": hidden, "weight": weight, "target": target})
    if is_readable(target) and target.numel() and not _all_within(target, vocab):
        wrong = target[((target < 0) | (target >= vocab)) & (target != ignored)]
        if wrong.numel():
            raise ValueError(f"target must be from 0 to {vocab - 1} or ignore_index {ignored}, got {int(wrong[0])}")
    return hidden, weight, target, ignored, float(factor)


def _all_within(target: Tensor, classes: int) -> bool:
    """Whether every target is a class: two numbers of one pass, which is all that most calls need."""
    least, most = target.aminmax()
    return int(least) >= 0 and int(most) < classes


def check_length(length: object, *, batch: int, longest: int, what: str = "the cache's") -> int | Tensor:
    """Keys visible in a cache: an int, or an integer tensor [B] on any device; each from 0 to `longest`, which is `what`.

    A tensor's values are checked on the CPU only, because reading them from a GPU would stall the stream. While torch.compile
    traces there are none to check.

    Raises:
        TypeError: neither int nor integer tensor.
        ValueError: wrong shape, or a value outside the cache.
    """
    if type(length) is int and 0 <= length <= longest:  # of most calls
        return length
    if not isinstance(length, Tensor):
        number: int = python_number(length)  # type: ignore[assignment]
        if not _is_whole(number):
            raise TypeError(f"length must be an int or an integer tensor [B], got {shown(length)}")
        if not 0 <= number <= longest:
            raise ValueError(f"length must be from 0 to {what} {longest}, got {number}")
        return number
    length = check_tensor("length", length, dtypes=INT_DTYPES)
    if length.dtype not in (torch.int32, torch.int64):  # torch has no minimum of unsigned ones
        length = length.to(torch.int64)
    if length.shape != (batch,):
        raise ValueError(f"length must have shape [B] = [{batch}], got {tuple(length.shape)}")
    if is_readable(length) and batch and not (int(length.min()) >= 0 and int(length.max()) <= longest):
        raise ValueError(f"length must be from 0 to {what} {longest}, got {length.tolist()}")
    return length


def check_layout(layout: object, *, heads: int, tokens: int | None) -> str:
    """The layout argument of an operator: the key of one layout, or those of every head joined by semicolons.

    Args:
        layout: a SparseLayout, or a sequence of one for each head.
        heads: H.
        tokens: T, which the layout must have; None does not check.

    Raises:
        TypeError: anything else.
        ValueError: a sequence of another length, or layouts of other or different numbers of tokens.
    """
    if isinstance(layout, SparseLayout):
        layouts: Sequence[SparseLayout] = (layout,)
    elif isinstance(layout, (list, tuple)):
        for entry in layout:
            if not isinstance(entry, SparseLayout):
                raise TypeError(f"layout must be a SparseLayout or a sequence of them, got {type(entry).__name__} in it")
        if len(layout) != heads:
            raise ValueError(f"layout must be one, or one for each of {heads} heads; got {len(layout)}")
        layouts = layout
    else:
        raise TypeError(f"layout must be a SparseLayout or a sequence of them, got {type(layout).__name__}")
    for entry in layouts:
        wanted = layouts[0].tokens if tokens is None else tokens
        if entry.tokens != wanted:
            raise ValueError(
                f"layout must have {wanted} tokens, got {entry.tokens} in {entry.key} (layout.prefix(n) is that of the first n)"
            )
    return joined([entry.key for entry in layouts])
