"""How operators are called: the short way of eager calls on the CPU, and who sees an operator instead."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from igpt_kernels import linear_cross_entropy, quick_gelu, rms_norm
from igpt_kernels._ops import transforms
from tests.igpt_kernels.test_transforms import CASES, values


class Names(TorchDispatchMode):
    """Operators that are called, those of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "igpt_kernels":
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_an_eager_call_has_a_short_way_and_what_traces_has_the_operator(case: str) -> None:
    """Both have the same values, bit for bit, and the same gradients. No tensor that needs no gradient has a graph."""
    _, function, arguments = CASES[case]

    def run() -> tuple[list[Tensor], str]:
        leaves = [x.clone().requires_grad_() for x in arguments]
        out = function(*leaves, backend="torch")
        names, queue = "", [out.grad_fn]
        while queue:
            node = queue.pop()
            names += f" {node.name()}"
            queue += [each for each, _ in node.next_functions if each is not None]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)], names

    short, names = run()
    assert "GeneratedBackwardFor" not in names
    with Names() as seen:
        whole, names = run()
    assert "GeneratedBackwardFor" in names
    assert seen.found
    assert all(torch.equal(a, b) for a, b in zip(short, whole, strict=True))
    assert function(*arguments, backend="torch").grad_fn is None
    with torch.no_grad():
        assert function(*(x.clone().requires_grad_() for x in arguments), backend="torch").grad_fn is None
    with torch.inference_mode():
        assert torch.equal(function(*arguments, backend="torch"), short[0])
    for needed in range(len(arguments)):  # one operand alone
        some = [x.clone().requires_grad_(i == needed) for i, x in enumerate(arguments)]
        (found,) = torch.autograd.grad(function(*some, backend="torch").square().sum(), some[needed])
        torch.testing.assert_close(found, short[1 + needed])


class Functions(TorchFunctionMode):
    """Operators that are called, as a mode of functions sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("case", CASES)
def test_what_looks_at_operators_sees_them(case: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers, modes of functions and subclasses. Without them an eager call goes past torch's dispatcher."""
    _, function, arguments = CASES[case]
    short: list[str] = []
    for name, run in transforms._implementations.items():
        monkeypatch.setitem(transforms._implementations, name, lambda *x, name=name, run=run: (short.append(name), run(*x))[1])

    def forward(*kinds: type) -> Tensor:
        short.clear()
        leaves = [x.clone().as_subclass(*kinds) if kinds else x.clone() for x in arguments]
        return function(*(x.requires_grad_(wanted) for x in leaves), backend="torch")

    forward()
    assert short or case.startswith("decode")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = forward()
        if wanted:
            out.square().sum().backward()
    assert not short
    assert any(event.key.startswith("igpt_kernels::") for event in profile.key_averages())
    with Functions() as seen:
        forward()
    assert not short
    assert any("igpt_kernels" in name for name in seen.found)
    forward(type("Own", (Tensor,), {}))
    assert not short


def test_a_profiler_of_all_threads_sees_operators() -> None:
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=config) as profile:
        thread = threading.Thread(target=lambda: quick_gelu(values(3, 4)))
        thread.start()
        thread.join()
    assert any(event.key == "igpt_kernels::quick_gelu_forward" for event in profile.key_averages())


class Scaled(TorchFunctionMode):
    """A mode that multiplies the first operand of our operators by a number that requires a gradient."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "igpt_kernels" in str(func):
            args = (args[0] * self.factor, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("case", CASES)
def test_a_mode_may_bring_what_requires_a_gradient(case: str, wanted: bool) -> None:
    _, function, arguments = CASES[case]
    factor = torch.ones((), requires_grad=True)
    leaves = [x.clone().requires_grad_(wanted) for x in arguments]
    with Scaled(factor):
        out = function(*leaves, backend="torch")
    (mine,) = torch.autograd.grad(out.square().sum(), factor)
    (want,) = torch.autograd.grad(function(arguments[0] * factor, *arguments[1:], backend="torch").square().sum(), factor)
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


class Wrapped(Tensor):
    """A tensor that stands for another, which may require a gradient."""

    held: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = tuple(x.held if isinstance(x, Wrapped) else x for x in args)
        if "igpt_kernels" in str(func):
            return func(*inside, **(kwargs or {}))
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, Wrapped):
            out.held = func(*inside, **(kwargs or {}))
        return out


@pytest.mark.parametrize("case", CASES)
def test_a_class_may_bring_what_requires_a_gradient(case: str) -> None:
    _, function, arguments = CASES[case]
    held = arguments[0].clone().requires_grad_()
    wrapped = arguments[0].clone().as_subclass(Wrapped)
    wrapped.held = held
    (mine,) = torch.autograd.grad(function(wrapped, *arguments[1:], backend="torch").square().sum(), held)
    (want,) = torch.autograd.grad(function(held, *arguments[1:], backend="torch").square().sum(), held)
    torch.testing.assert_close(mine, want)


class Loss(nn.Module):
    """A loss behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Parameter(values(6, 8))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(self.layer(x), self.head, target)


@pytest.mark.parametrize("how", ["export", "export, strict", "jit.trace", "make_fx"])
@pytest.mark.filterwarnings("ignore")
def test_a_loss_traced_without_gradients_has_them_later(how: str) -> None:
    """The graph says that no gradient is wanted, and is run where some are. All of them are computed then."""
    model, x, target = Loss().float(), values(10, 8).float(), torch.arange(10) % 6
    with torch.no_grad():
        run: Any
        if how.startswith("export"):
            run = torch.export.export(model, (x, target), strict="strict" in how).module()
        elif how == "jit.trace":
            run = torch.jit.trace(model, (x, target), check_trace=False)
        else:
            traced = make_fx(lambda hidden, head: linear_cross_entropy(hidden, head, target))(x, model.head.detach())
            model, run = model, lambda x, target: traced(model.layer(x), model.head)
    of = list(run.parameters()) if isinstance(run, nn.Module) else list(model.parameters())
    mine = torch.autograd.grad(run(x, target), of)
    want = torch.autograd.grad(Loss.forward(model, x, target), list(model.parameters()))
    for a in want:
        assert any(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for b in mine)
    assert len(mine) == len(want)


@pytest.mark.parametrize("case", CASES)
def test_a_sign_that_is_not_applied_yet(case: str) -> None:
    """torch may note that a view is to be negated, and negate it when an operator reads it."""
    _, function, arguments = CASES[case]
    views = [torch._neg_view(-x) for x in arguments]
    assert all(x.is_neg() for x in views)
    assert torch.equal(function(*views, backend="torch"), function(*arguments, backend="torch"))


def test_a_traced_graph_has_the_operator() -> None:
    """torch.jit.trace would see nothing of a function of Python."""
    x = values(3, 6).requires_grad_()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        traced = torch.jit.trace(lambda x: rms_norm(x, values(6)), x, check_trace=False)
    assert "igpt_kernels::rms_norm_forward" in str(traced.graph)
