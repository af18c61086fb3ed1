"""What torch's transforms, tracers and kinds of tensors do with every operation: the table of docs/transforms.md, held.

Everything is in float64 and against the reference, whose derivatives are those of plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from igpt_kernels import (
    PaletteTable,
    backends,
    block_sparse_attention,
    decode_attention,
    flash_attention,
    layouts,
    linear_cross_entropy,
    palette_lookup,
    quick_gelu,
    rms_norm,
)
from igpt_kernels.backends import BackendUnavailable

Function = Callable[..., Any]
LAYOUT = layouts.local2d(3, 4, 1)
HEADS = [layouts.local2d(3, 4, 1), layouts.row_column(3, 4)]


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


QKV = [values(2, 2, 12, 4), values(2, 2, 12, 4) + 1, values(2, 2, 12, 4) - 1]
CACHE = [values(2, 2, 1, 4), values(2, 2, 12, 4) + 1, values(2, 2, 12, 4) - 1]


def lengths(q: Tensor) -> Tensor:
    """Of sequences that do not end alike; a transform may have taken the batch away."""
    return torch.tensor([3, 9])[: q.shape[0]].to(q.device)


def targets(hidden: Tensor) -> Tensor:
    return torch.ones(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)


# Operation -> cases of it: a function of tensors that takes `backend`, and those tensors.
CASES: dict[str, tuple[str, Function, list[Tensor]]] = {
    "flash": ("flash_attention", flash_attention, QKV),
    "flash, chunk": ("flash_attention", flash_attention, [QKV[0][:, :, :5], *QKV[1:]]),
    "sparse": ("block_sparse_attention", lambda *x, **o: block_sparse_attention(*x, LAYOUT, **o), QKV),
    "sparse, heads": ("block_sparse_attention", lambda *x, **o: block_sparse_attention(*x, HEADS, **o), QKV),
    "decode": ("decode_attention", lambda *x, **o: decode_attention(*x, 7, **o), CACHE),
    "decode, lengths": ("decode_attention", lambda *x, **o: decode_attention(*x, lengths(x[0]), **o), CACHE),
    "decode, layout": ("decode_attention", lambda *x, **o: decode_attention(*x, 7, layout=LAYOUT, **o), CACHE),
    "norm": ("rms_norm", rms_norm, [values(3, 5, 6), values(6)]),
    "norm of a row": ("rms_norm", rms_norm, [values(6), values(6) + 1]),
    "norm of a sum": (
        "rms_norm",
        lambda x, w, r, **o: torch.stack(rms_norm(x, w, residual=r, **o)),
        [values(3, 5, 6), values(6), values(3, 5, 6) + 1],
    ),
    "gelu": ("quick_gelu", quick_gelu, [values(3, 5, 6)]),
    "gelu of a sum": ("quick_gelu", lambda x, b, **o: quick_gelu(x, bias=b, **o), [values(3, 5, 6), values(6)]),
    "loss": (
        "linear_cross_entropy",
        lambda h, w, **o: linear_cross_entropy(h, w, targets(h), **o),
        [values(3, 5, 6), values(4, 6)],
    ),
    "loss, sum": (
        "linear_cross_entropy",
        lambda h, w, **o: linear_cross_entropy(h, w, targets(h), reduction="sum", z_loss=0.1, **o),
        [values(3, 5, 6), values(4, 6)],
    ),
    "loss of rows": (
        "linear_cross_entropy",
        lambda h, w, **o: linear_cross_entropy(h, w, targets(h), reduction="none", **o),
        [values(3, 5, 6), values(4, 6)],
    ),
}


def stacked(arguments: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack([x, 2 * x, -x]) for x in arguments]


def every(arguments: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


def total(function: Function) -> Function:
    return lambda *x: function(*x).square().sum()


def jvp(function: Function, x: list[Tensor]) -> Any:
    return torch.func.jvp(lambda *x: function(*x), tuple(x), tuple(torch.ones_like(each) for each in x))


def jacfwd(function: Function, x: list[Tensor]) -> Any:
    return torch.func.jacfwd(lambda *x: function(*x), argnums=every(x))(*x)


def dual(function: Function, x: list[Tensor]) -> Any:
    """Dual numbers, one operand at a time: one tangent is enough."""
    tangents = []
    for index in range(len(x)):
        with forward_ad.dual_level():
            mixed = [forward_ad.make_dual(each, each + 1) if i == index else each for i, each in enumerate(x)]
            tangents.append(forward_ad.unpack_dual(function(*mixed)).tangent)
    assert all(tangent is not None for tangent in tangents)
    return tangents


def grad(function: Function, x: list[Tensor]) -> Any:
    return torch.func.grad(total(function), argnums=every(x))(*x)


def vjp(function: Function, x: list[Tensor]) -> Any:
    out, pull = torch.func.vjp(lambda *x: function(*x), *x)
    return pull(out)


def jacrev(function: Function, x: list[Tensor]) -> Any:
    return torch.func.jacrev(lambda *x: function(*x), argnums=every(x))(*x)


def vmap(function: Function, x: list[Tensor]) -> Any:
    """Of all operands, of each alone, and of other dimensions than the first."""
    batches = stacked(x)
    results = [torch.vmap(lambda *x: function(*x))(*batches)]
    for index in range(len(x)):
        dims = tuple(0 if i == index else None for i in range(len(x)))
        mixed = [batches[i] if i == index else each for i, each in enumerate(x)]
        results.append(torch.vmap(lambda *x: function(*x), in_dims=dims)(*mixed))
    turned = [batch.movedim(0, -1) for batch in batches]
    results.append(torch.vmap(lambda *x: function(*x), in_dims=-1)(*turned))
    return results


def vmap_of_grad(function: Function, x: list[Tensor]) -> Any:
    """Gradients of each sample, of operands that all have, and of parameters that are shared."""
    gradient = torch.func.grad(total(function), argnums=every(x))
    shared = torch.vmap(gradient, in_dims=(0, *(None for _ in x[1:])))(stacked(x)[0], *x[1:])
    return torch.vmap(gradient)(*stacked(x)), shared


def vmap_of_vmap(function: Function, x: list[Tensor]) -> Any:
    batches = [torch.stack([batch, batch + 1]) for batch in stacked(x)]
    return torch.vmap(torch.vmap(lambda *x: function(*x)))(*batches)


def hessian(function: Function, x: list[Tensor]) -> Any:
    return torch.func.hessian(lambda first: function(first, *x[1:]).square().sum())(x[0])


def functional_call(function: Function, x: list[Tensor]) -> Any:
    module = Module(function, [torch.zeros_like(each) for each in x[1:]])
    given = {name: each for (name, _), each in zip(module.named_parameters(), x[1:], strict=True)}

    def loss(parameters: dict[str, Tensor], first: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (first,)).square().sum()  # type: ignore[no-any-return]

    return torch.func.grad(loss)(given, x[0])


def batch_of_grads(function: Function, x: list[Tensor]) -> Any:
    leaves = [each.clone().requires_grad_() for each in x]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, torch.stack([out, out + 1]).detach(), is_grads_batched=True)


def fake(function: Function, x: list[Tensor]) -> Any:
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(each).requires_grad_() for each in x]
        out = function(*leaves)
        return [each.shape for each in (out, *torch.autograd.grad(out.sum(), leaves))]


def meta(function: Function, x: list[Tensor]) -> Any:
    leaves = [each.to("meta").requires_grad_() for each in x]
    out = function(*leaves)
    found = [out, *torch.autograd.grad(out.sum(), leaves)]
    assert {each.device.type for each in found} == {"meta"}
    return [each.shape for each in found]


def traced(function: Function, x: list[Tensor]) -> Any:
    """make_fx of the function and its gradients, run on other values than those traced."""

    def both(*leaves: Tensor) -> Any:
        out = function(*leaves)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    def leaves(shift: float) -> list[Tensor]:
        return [(each + shift).requires_grad_() for each in x]

    return make_fx(both)(*leaves(0.0))(*leaves(0.5))


def exported(function: Function, x: list[Tensor]) -> Any:
    program = torch.export.export(Module(function, []), tuple(x))
    return program.module()(*(each + 0.5 for each in x))


class Module(nn.Module):
    """A function with parameters behind its first argument."""

    def __init__(self, function: Function, parameters: list[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.rest = nn.ParameterList(parameters)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x, *self.rest)  # type: ignore[no-any-return]


def compiled(function: Function, x: list[Tensor]) -> Any:
    """The first operand is an argument, the others are parameters of a module, as in a model."""
    torch.compiler.reset()
    module = Module(function, [each.clone() for each in x[1:]])
    first = x[0].clone().requires_grad_()
    out = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")(first)
    return out, torch.autograd.grad(out.square().sum(), [first, *module.parameters()])


def empty(function: Function, x: list[Tensor]) -> Any:
    """No image in the batch: parameters [C] and [V,C] stay."""
    leaves = [(each[:0] if each.dim() > 2 else each.clone()).requires_grad_() for each in x]
    out = function(*leaves)
    return out, torch.autograd.grad(out.sum(), leaves)


class Quantised(Tensor):
    """A tensor that is stored as another and knows torch's operations only, as quantised weights do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            return NotImplemented
        plain = pytree.tree_map_only(Quantised, lambda x: x.inner, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def subclass(function: Function, x: list[Tensor]) -> Any:
    return [function(*(Quantised(each) if i == index else each for i, each in enumerate(x))) for index in range(len(x))]


# Column of the table -> what is done. Each must equal the reference in the same transform.
COLUMNS: dict[str, Function] = {
    "forward mode": jvp,
    "grad": grad,
    "vmap": vmap,
    "vmap of grad": vmap_of_grad,
    "functional_call": functional_call,
    "FakeTensor": fake,
    "meta": meta,
    "make_fx": traced,
    "export": exported,
    "compile, dynamic": compiled,
    "empty batch": empty,
    "tensor subclass": subclass,
}
OTHERS: dict[str, Function] = {
    "jacfwd": jacfwd,
    "dual": dual,
    "vjp": vjp,
    "jacrev": jacrev,
    "vmap of vmap": vmap_of_vmap,
    "hessian": hessian,
    "batch of grads": batch_of_grads,
}


def uncompiled(function: Function, x: list[Tensor]) -> Any:
    leaves = [each.clone().requires_grad_() for each in x]
    out = function(*leaves)
    return out, torch.autograd.grad(out.square().sum(), leaves)


def check(column: str, case: str) -> None:
    transform = {**COLUMNS, **OTHERS}[column]
    _, function, arguments = CASES[case]
    found = pytree.tree_leaves(transform(lambda *x: function(*x), arguments))
    oracle = uncompiled if transform is compiled else transform
    want = pytree.tree_leaves(oracle(lambda *x: function(*x, backend="reference"), arguments))
    assert len(found) == len(want) > 0
    for mine, true in zip(found, want, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9, equal_nan=True)
        else:
            assert mine == true


RUNS = [
    (column, case)
    for column in (*COLUMNS, *OTHERS)
    for case, (_, _, arguments) in CASES.items()
    if column != "functional_call" or len(arguments) > 1
]


@pytest.mark.parametrize(("column", "case"), RUNS)
def test_every_operation_under_every_transform(column: str, case: str) -> None:
    check(column, case)


def table_of_the_page() -> dict[str, dict[str, str]]:
    """Operation -> column -> cell of docs/transforms.md."""
    page = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def test_the_page_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of_the_page()
    assert set(table) == set(backends.IMPLEMENTATIONS)
    taken: list[str] = []
    select = backends.select

    def spy(*arguments: Any) -> str:
        taken.append(select(*arguments))
        return taken[-1]

    monkeypatch.setattr(backends, "select", spy)
    for column, transform in COLUMNS.items():
        for operation, function, arguments in CASES.values():
            if transform is compiled or (transform is functional_call and len(arguments) == 1):
                continue
            taken.clear()
            transform(lambda *x, function=function: function(*x), arguments)
            found = {"torch": "operator", "reference": "reference"}
            assert {found[name] for name in taken} == {table[operation][column]}, (operation, column)
    assert {table[operation]["compile, dynamic"] for operation in backends.IMPLEMENTATIONS} == {"operator"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transform", [jvp, jacfwd, dual, subclass])
def test_a_backend_asked_for_by_name_gives_its_reason(transform: Function, case: str) -> None:
    _, function, arguments = CASES[case]
    reason = "tensors of class Quantised have operations of their own" if transform is subclass else "forward-mode derivatives"
    with pytest.raises(BackendUnavailable, match=reason):
        transform(lambda *x: function(*x, backend="torch"), arguments)


def test_the_reference_in_place_of_a_kernel_may_not_take_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igpt_kernels.memory.free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="12 x 12 scores"):
        jvp(flash_attention, QKV)


@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_is_an_error_under_transforms_too(case: str) -> None:
    _, function, arguments = CASES[case]
    first = torch.func.grad(lambda x: function(x, *arguments[1:], backend="torch").square().sum())
    if case.startswith("decode"):  # it has one
        torch.func.grad(lambda x: first(x).square().sum())(arguments[0])
        return
    with pytest.raises(RuntimeError, match="has no second derivative; use backend='reference'"):
        torch.func.grad(lambda x: first(x).square().sum())(arguments[0])


@pytest.mark.slow
@pytest.mark.parametrize("transform", [grad, vmap, vmap_of_grad])
def test_transforms_inside_of_a_compiled_function(transform: Function) -> None:
    """torch.compile traces through them, or says that it cannot; it gives no other numbers."""
    torch.compiler.reset()
    x = [values(3, 5, 6), values(6)]
    want = transform(lambda *x: rms_norm(*x, backend="reference"), x)
    try:
        found = torch.compile(lambda *x: transform(rms_norm, list(x)), backend="aot_eager")(*x)
    except torch._dynamo.exc.TorchDynamoException:
        return
    for mine, true in zip(pytree.tree_leaves(found), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_palettes(backend: Any) -> None:
    """Integers have no derivatives; the rest holds for them too."""
    table = PaletteTable(values(16, 3).clamp(-1, 1) * 127 + 128)
    pixels = torch.randint(0, 256, (3, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def look_up(x: Tensor) -> Tensor:
        return palette_lookup(x, table, backend=backend)

    tokens = look_up(pixels)
    for dim in range(3):
        assert torch.equal(torch.vmap(look_up, in_dims=dim, out_dims=dim)(pixels), tokens)
        for back in (table.colors_of, table.pixels_of):
            assert torch.equal(torch.vmap(back, in_dims=dim, out_dims=dim)(tokens), back(tokens))
    first = torch.vmap(lambda x: table.lookup(x, channel_dim=0))(pixels.movedim(-1, 1))
    assert torch.equal(first, tokens)
    assert torch.equal(torch.vmap(torch.vmap(look_up))(pixels), tokens)
    assert torch.equal(make_fx(look_up)(pixels)(pixels.flip(0)), tokens.flip(0))
    program = torch.export.export(Module(lambda x: look_up(x), []), (pixels,))
    assert torch.equal(program.module()(pixels.flip(0)), tokens.flip(0))
    assert torch.equal(torch.compile(look_up, fullgraph=True, dynamic=True, backend="aot_eager")(pixels), tokens)
    assert look_up(pixels[:0]).shape == (0, 4, 5)
    if backend == "reference":
        assert look_up(pixels.to("meta")).shape == tokens.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert look_up(mode.from_tensor(pixels)).shape == tokens.shape
