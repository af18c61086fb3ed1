"""Cases of the fused operations: RMSNorm, QuickGELU, and the output layer with its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case, Cost, Method, Operation, Workload
from igpt.model.image_gpt import plain_norm, quick_gelu
from igpt_kernels import testing

COLOURS = 512
EPS = 1e-5
Function = Callable[..., Tensor]


def _loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), target)


@dataclass(frozen=True)
class _Kind:
    """One operation: its definition, which is the oracle in float64; the shapes of its inputs; what it costs."""

    name: str
    define: Function
    shapes: Callable[[Case], list[tuple[int, ...]]]
    cost: Callable[[Case, str, int], Cost]
    torch: Function | None = None

    def inputs(self, case: Case) -> tuple[list[Tensor], list[Tensor]]:
        """Random normal leaves (weights of the size that training gives them), and what has no gradient."""
        dtype = getattr(torch, case.dtype)
        leaves = [torch.randn(shape, device=case.device).to(dtype) for shape in self.shapes(case)]
        if self.name != "linear_cross_entropy":
            return [x.requires_grad_() for x in leaves], []
        leaves[1] = leaves[1] * case.width**-0.5
        target = torch.randint(COLOURS, (leaves[0].shape[0],), device=case.device)
        return [x.requires_grad_() for x in leaves], [target]


def _rows(case: Case) -> int:
    return case.batch * case.tokens


def _norm_cost(case: Case, way: str, size: int) -> Cost:
    values = {"forward": 2, "backward": 3, "both": 5}[way] * _rows(case) * case.width
    return Cost(2.0 * values, float(size * values), "memory", "each tensor read and written once")


def _gelu_cost(case: Case, way: str, size: int) -> Cost:
    values = {"forward": 2, "backward": 3, "both": 5}[way] * _rows(case) * 4 * case.width
    return Cost(2.0 * values, float(size * values), "memory", "each tensor read and written once, width 4·C")


def _loss_cost(case: Case, way: str, size: int) -> Cost:
    factor = {"forward": 2, "backward": 4, "both": 6}[way]
    flops = float(factor * _rows(case) * case.width * COLOURS)
    return Cost(flops, float(size * factor // 2 * _rows(case) * case.width), "compute", f"{factor}·M·C·{COLOURS}, M = B·T")


KINDS = (
    _Kind(
        "rms_norm",
        plain_norm,
        lambda case: [(_rows(case), case.width), (case.width,)],
        _norm_cost,
        lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, EPS),
    ),
    _Kind("quick_gelu", quick_gelu, lambda case: [(_rows(case), 4 * case.width)], _gelu_cost),
    _Kind("linear_cross_entropy", _loss, lambda case: [(_rows(case), case.width), (COLOURS, case.width)], _loss_cost),
)


def _operation(kind: _Kind) -> Operation:
    def prepare(case: Case, subject: Function) -> Workload:
        leaves, rest = kind.inputs(case)
        plain = [x.detach() for x in leaves]
        grad = torch.randn_like(subject(*plain, *rest))
        graph: list[Tensor] = []

        def backward() -> object:
            if not graph:
                graph.append(subject(*leaves, *rest))
            return torch.autograd.grad(graph[0], leaves, grad, retain_graph=True)

        def warm() -> object:
            few, other = kind.inputs(replace(case, batch=1, tokens=64))
            return torch.autograd.grad(subject(*few, *other).sum(), few)

        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: subject(*plain, *rest),
            "both": lambda: torch.autograd.grad(subject(*leaves, *rest), leaves, grad),
            "backward": backward,
        }
        return Workload(calls, None if case.method == "compile" else warm, _configuration(case, kind.name))

    def verify(case: Case, subject: Function) -> float:
        leaves, rest = kind.inputs(case)
        grad = torch.randn_like(kind.define(*(x.detach() for x in leaves), *rest))

        def result(run: Function, dtype: torch.dtype) -> Sequence[Tensor]:
            some = [x.detach().to(dtype).requires_grad_() for x in leaves]
            out = run(*some, *rest)
            return [out.detach(), *torch.autograd.grad(out, some, grad.to(dtype))]

        exact, eager, mine = (
            result(kind.define, torch.float64),
            result(kind.define, leaves[0].dtype),
            result(subject, leaves[0].dtype),
        )
        worst = 0.0
        for place, (actual, true, low) in enumerate(zip(mine, exact, eager, strict=True)):
            factor = testing.GRADIENT_FACTOR if place else testing.OUTPUT_FACTOR
            name = f"gradient {place}" if place else "output"
            floor = _floor(kind.name, place, leaves, grad)
            worst = max(worst, testing.error_ratio(actual, true, low, factor=factor, floor=floor, name=name))
        return worst

    methods = {"eager": Method(lambda case: kind.define)}
    if kind.torch is not None:
        methods["torch"] = Method(lambda case: kind.torch)
    methods["compile"] = Method(lambda case: torch.compile(kind.define, dynamic=False), compiled=True)
    methods["ours"] = Method(lambda case: _ours(kind.name), public=kind.name)
    return Operation(
        "fused",
        kind.name,
        (kind.name,),
        ("forward", "both"),
        prepare,
        verify,
        lambda case, way: kind.cost(case, way, getattr(torch, case.dtype).itemsize),
        methods,
        backward_alone=kind.name != "linear_cross_entropy",
    )


def _floor(op: str, place: int, leaves: Sequence[Tensor], grad: Tensor) -> float:
    """The floor of `error_ratio` for the output (place 0) or a gradient: the size of the terms that it sums."""
    if (op, place) == ("rms_norm", 2):
        return _summed(leaves[0], grad)
    if (op, place) == ("linear_cross_entropy", 0):  # one number, which plain PyTorch may hit by chance
        return max(8.0, testing.largest_logit(*leaves))
    return 0.0


def _summed(x: Tensor, grad: Tensor) -> float:
    """The sum of the sizes of the terms of the norm's weight's gradient, over all rows.

    Any order of summation is right to a rounding of that in float32, where torch.compile sums row after row; in units of the
    dtype's own rounding, which is what a floor is given in.
    """
    wide = x.detach().double()
    terms = (grad.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).abs().sum(0)
    return float(terms.max()) * torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps


def _ours(name: str) -> Function:
    import igpt_kernels

    function: Any = getattr(igpt_kernels, name)
    if name == "rms_norm":
        return lambda x, weight: function(x, weight, eps=EPS)  # type: ignore[no-any-return]
    return function  # type: ignore[no-any-return]


def _configuration(case: Case, name: str) -> str:
    if case.method != "ours":
        return {"compile": "torch.compile of eager", "torch": "torch.nn.functional"}.get(case.method, "")
    from igpt_kernels import backends

    if name not in backends.IMPLEMENTATIONS:
        return ""
    facts: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": torch.device(case.device)}
    if name == "linear_cross_entropy":
        facts["vocab"] = COLOURS
    else:
        facts["width"] = 4 * case.width if name == "quick_gelu" else case.width
    return backends.choose("auto", backends.explain(name, **facts), name)


OPERATIONS = [_operation(kind) for kind in KINDS]
