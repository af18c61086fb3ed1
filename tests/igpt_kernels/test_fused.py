"""Norm and activation through the public functions: values, strides, memory, errors, and the registered operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import igpt_kernels
from igpt_kernels import _ops_fused, quick_gelu, rms_norm, testing
from igpt_kernels._torch import fused as torch_fused
from igpt_kernels.backends import BackendUnavailable
from igpt_kernels.reference import quick_gelu_reference, rms_norm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NARROW = [torch.float32, torch.float16, torch.bfloat16]


def matrix(shape: Sequence[int], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    """[rows, width] with NaN around it."""
    return testing.make_input((1, 1, *shape), dtype=dtype, seed=seed, layout=layout)[0, 0]


def run(
    function: Callable[..., object], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]
    given = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
    return [out.detach() for out in outputs], list(torch.autograd.grad(outputs, leaves, given))


def check(ours: Callable[..., object], oracle: Callable[..., object], inputs: list[Tensor], grads: list[Tensor]) -> None:
    """Within the budgets of eager at the same dtypes, with every new tensor poisoned."""
    with testing.poisoned_memory():
        actual = run(ours, inputs, grads)
    eager = run(oracle, inputs, grads)
    exact = run(oracle, [x.double() for x in inputs], [grad.double() for grad in grads])
    largest = 4 * max((float(grad.double().abs().max()) for grad in grads if grad.numel()), default=0.0)
    for name, factor, floor, place in (("output", 2, 0.0, 0), ("gradient", 3, largest, 1)):
        assert len(actual[place]) == len(exact[place])
        for index, (mine, low, true) in enumerate(zip(actual[place], eager[place], exact[place], strict=True)):
            assert mine.dtype == low.dtype
            testing.error_ratio(mine, true, low, factor=factor, floor=floor, name=f"{name} {index}")


def norm(**options: object) -> Callable[..., object]:
    return lambda x, weight, residual=None: rms_norm(x, weight, residual=residual, **options)  # type: ignore[call-overload]


def plain_norm(eps: float = 1e-5) -> Callable[..., object]:
    return lambda x, weight, residual=None: rms_norm_reference(x, weight, eps=eps, residual=residual)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return quick_gelu(x, bias=bias, backend="torch")


def plain_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return quick_gelu_reference(x, bias=bias)


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether rows are taken a few at a time, as long tensors are on the CPU."""
    if request.param:
        monkeypatch.setattr(torch_fused, "_PIECE", 100)
    return request.param


def test_the_oracles_are_the_equations() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 33), (33,)))
    root = (x.square().sum(1) / 33 + 0.01).sqrt()
    torch.testing.assert_close(rms_norm_reference(x, weight, eps=0.01), x / root[:, None] * weight)
    normed, total = rms_norm_reference(x, weight, eps=0.01, residual=2 * x)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(normed, rms_norm_reference(3 * x, weight, eps=0.01))
    torch.testing.assert_close(quick_gelu_reference(x), x / (1 + (-1.702 * x).exp()))
    torch.testing.assert_close(quick_gelu_reference(x, bias=weight), quick_gelu_reference(x + weight))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 100, 512, 1000])
@pytest.mark.parametrize("rows", [1, 37])
def test_widths(rows: int, width: int, dtype: torch.dtype, pieces: bool) -> None:
    x, residual, *grads = (matrix((rows, width), dtype, seed) for seed in range(4))
    weight = matrix((1, width), dtype, 5)[0]
    check(norm(backend="torch"), plain_norm(), [x, weight], grads[:1])
    check(norm(backend="torch"), plain_norm(), [x, weight, residual], grads)
    check(gelu, plain_gelu, [x], grads[:1])
    check(gelu, plain_gelu, [x, weight], grads[:1])


@pytest.mark.parametrize("kinds", list(itertools.product(testing.LAYOUTS, testing.LAYOUTS)), ids="-".join)
def test_strides(kinds: tuple[str, str], pieces: bool) -> None:
    x, residual = (matrix((21, 24), torch.float32, seed, kind) for seed, kind in enumerate(kinds))
    weight = matrix((2, 24), torch.float32, 5, "stepped")[1]
    grads = [matrix((21, 24), torch.float32, 6 + seed, kind) for seed, kind in enumerate(reversed(kinds))]
    check(norm(backend="torch"), plain_norm(), [x, weight, residual], grads)
    check(gelu, plain_gelu, [x, weight], grads[:1])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape, dtype=torch.float64).float()
    weight = torch.randn(shape[-1])
    check(norm(backend="torch"), plain_norm(), [x, weight, x + 1], [grad, grad])
    check(gelu, plain_gelu, [x, weight], [grad])


@pytest.mark.parametrize(
    "dtypes", [d for d in itertools.product(NARROW, repeat=3) if torch.float16 not in d or torch.bfloat16 not in d], ids=str
)
def test_mixed_dtypes_promote_as_the_model_does(dtypes: tuple[torch.dtype, ...]) -> None:
    x, residual = (matrix((9, 40), dtype, seed) for seed, dtype in enumerate(dtypes[:2]))
    weight = matrix((1, 40), dtypes[2], 3)[0]
    grads = [matrix((9, 40), torch.float32, 4 + i) for i in range(2)]
    check(norm(backend="torch"), plain_norm(), [x, weight, residual], grads)
    check(gelu, plain_gelu, [x, weight], grads[:1])


def test_norm_is_what_the_model_computes() -> None:
    from igpt.model import plain_norm as of_the_model
    from igpt.model import quick_gelu as gelu_of_the_model

    for dtype in DTYPES:
        x, weight = matrix((9, 48), dtype, 1), matrix((1, 48), dtype, 2)[0]
        assert torch.equal(rms_norm(x, weight, backend="reference"), of_the_model(x, weight))
        torch.testing.assert_close(quick_gelu(x, backend="reference"), gelu_of_the_model(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.3])
def test_eps(eps: float) -> None:
    x, weight, grad = matrix((9, 40), torch.float32, 1), matrix((1, 40), torch.float32, 2)[0], matrix((9, 40), torch.float32, 3)
    check(norm(backend="torch", eps=eps), plain_norm(eps), [x, weight], [grad])


def test_rows_of_zeros_and_rows_that_are_not_numbers() -> None:
    x, weight = torch.randn(5, 8), torch.ones(8)
    x[1], x[3, 2] = 0.0, math.nan
    for backend in ("torch", "reference"):
        out = rms_norm(x, weight, backend=backend)
        assert (out[1] == 0).all()
        assert out[3].isnan().all()
        assert out[[0, 1, 2, 4]].isfinite().all()
    ends = torch.tensor([[-math.inf, -1e4, -100.0, 0.0, 100.0, 1e4, math.inf]], requires_grad=True)
    out = quick_gelu(ends[:, 1:6], backend="torch")
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
    (slope,) = torch.autograd.grad(out.sum(), ends)
    torch.testing.assert_close(slope[0, 1:6], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> list[Tensor]:
    found = []
    for seed, shape in enumerate(shapes):
        full = (1, 1, *shape) if len(shape) == 2 else (1, 1, 1, *shape)
        x = testing.make_input(full, dtype=dtype, seed=seed, layout=layout if len(shape) == 2 else "contiguous")
        found.append(x.reshape(shape) if len(shape) != 2 else x[0, 0])
    return [x.detach().requires_grad_() for x in found]


def test_gradcheck() -> None:
    x, residual, weight = leaves((3, 5), (3, 5), (5,))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, backend="torch"), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, backend="torch"), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, backend="torch")[1], (x, weight, residual))
    assert torch.autograd.gradcheck(lambda x: quick_gelu(x, backend="torch"), (x,))
    assert torch.autograd.gradcheck(lambda x, b: quick_gelu(x, bias=b, backend="torch"), (x, weight))
    for call in (lambda x, w: rms_norm(x, w, backend="reference"), lambda x, w: quick_gelu(x, bias=w, backend="reference")):
        assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("layout", ["contiguous", "heads_last", "stepped", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(grads: bool, dtype: torch.dtype, layout: str) -> None:
    for shape in ((3, 5), (1, 1), (4, 16), (0, 8)):
        x, residual, weight = leaves(shape, shape, shape[1:], dtype=dtype, layout=layout)
        if not grads:
            x, residual, weight = x.detach(), residual.detach(), weight.detach()
        torch.library.opcheck(_ops_fused.rms_norm_forward, (x, weight, 1e-5, False))
        torch.library.opcheck(_ops_fused.add_rms_norm_forward, (x, residual, weight, 1e-5, False))
        torch.library.opcheck(_ops_fused.quick_gelu_forward, (x, weight, False))
        torch.library.opcheck(_ops_fused.quick_gelu_forward, (x, None, False))
        s, grad, scale = x.detach(), residual.detach(), weight.detach()
        rstd = s.new_ones(shape[:1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for more, narrow in ((None, None), (grad, torch.bfloat16)):
            torch.library.opcheck(_ops_fused.rms_norm_backward, (grad, more, s, scale, rstd, narrow, False))
        for bias in (None, scale):
            torch.library.opcheck(_ops_fused.quick_gelu_backward, (grad, s, bias, False))


def test_opcheck_of_a_permuted_view() -> None:
    """Fakes must give the strides of what is really allocated."""
    x = torch.randn(3, 4, 8).transpose(0, 1).requires_grad_()
    weight = torch.randn(8, requires_grad=True)
    torch.library.opcheck(_ops_fused.rms_norm_forward, (x, weight, 1e-5, False))
    torch.library.opcheck(_ops_fused.add_rms_norm_forward, (x, x, weight, 1e-5, False))
    torch.library.opcheck(_ops_fused.quick_gelu_forward, (x, weight, False))
    narrow = torch.randn(4, 8, 3).transpose(1, 2).requires_grad_()
    torch.library.opcheck(_ops_fused.quick_gelu_forward, (narrow, weight, False))


def test_second_derivative_is_a_clear_error() -> None:
    x, weight = leaves((3, 5), (5,))
    for out in (rms_norm(x, weight, backend="torch"), quick_gelu(x, bias=weight, backend="torch")):
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
            slope.sum().backward()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, residual, weight = leaves((3, 5), (3, 5), (5,))
    normed, total = rms_norm(x, weight, residual=residual, backend="torch")
    assert torch.equal(torch.autograd.grad(total.sum(), x, retain_graph=True)[0], torch.ones(3, 5, dtype=torch.float64))
    alone = rms_norm((x + residual).detach().requires_grad_(), weight, backend="torch")
    torch.testing.assert_close(torch.autograd.grad(normed.sum(), weight), torch.autograd.grad(alone.sum(), weight))


def test_compile_without_breaks_and_once_for_all_lengths() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        normed, total = rms_norm(x, weight, residual=2 * x, backend="torch")
        return (quick_gelu(normed, bias=weight, backend="torch") + total).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count))
    for rows in (7, 12):
        x, weight = leaves((rows, 16), (16,), dtype=torch.float32)
        for a, b in zip(
            torch.autograd.grad(compiled(x, weight), (x, weight)),
            torch.autograd.grad(loss(x, weight), (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 2, "one forward and one backward graph serve both lengths"
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return quick_gelu(rms_norm(x, weight, backend="torch"), bias=weight, backend="torch")

    x, weight = leaves((3, 5), (5,))
    want = torch.autograd.grad(layer(x, weight).square().sum(), (x, weight))
    checkpoint(layer, x, weight, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, want[0])  # type: ignore[arg-type]
    assert torch.equal(weight.grad, want[1])  # type: ignore[arg-type]


def test_the_same_bits_in_every_run() -> None:
    x, residual, weight = leaves((300, 64), (300, 64), (64,), dtype=torch.float32)

    def gradients() -> tuple[Tensor, ...]:
        normed, total = rms_norm(x, weight, residual=residual, backend="torch")
        return torch.autograd.grad(
            (quick_gelu(normed, bias=weight, backend="torch") + total).square().sum(), (x, residual, weight)
        )

    first = gradients()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_kept_than_the_input(dtype: torch.dtype) -> None:
    """Bytes that the graph holds on to, beside the input itself."""

    def kept(call: Callable[[Tensor, Tensor], object]) -> int:
        x, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((64, 32), (32,)))
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr()):
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = call(x, weight)
        assert out is not None
        return sum(saved.values())

    from igpt.model import plain_norm as of_the_model

    assert kept(lambda x, w: rms_norm(x, w, backend="torch")) == 64 * 4
    assert kept(lambda x, w: quick_gelu(x, bias=w, backend="torch")) == 0
    assert kept(of_the_model) > 64 * 32 * dtype.itemsize


def test_backends_are_chosen_and_explained() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    for name in ("rms_norm", "quick_gelu"):
        assert getattr(igpt_kernels, name) is not None
        table = dict(igpt_kernels.explain(name, dtype=torch.float32, device="cpu", width=8))
        assert table["triton"]
        assert not table["torch"]
    assert dict(igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cuda", width=8193))["triton"]
    with pytest.raises(BackendUnavailable, match="device cpu is not one of cuda"):
        rms_norm(x, weight, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        quick_gelu(x, backend="sdpa")
    with pytest.raises(TypeError, match="width must be given"):
        igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu")
    with pytest.raises(TypeError, match="head_dim must be None"):
        igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu", head_dim=64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rms_norm([1.0], torch.ones(1)), TypeError, "x must be a torch.Tensor, got list"),  # type: ignore[call-overload]
        (lambda: rms_norm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3)), TypeError, "x must have dtype .*got int64"),
        (lambda: rms_norm(torch.ones(()), torch.ones(1)), ValueError, "x "),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4)), ValueError, r"weight .*\(3,\).*\(4,\)"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3, dtype=torch.float64)), TypeError, "weight .*float64"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), residual=torch.ones(3, 2)), ValueError, "residual .*"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), eps=-1.0), ValueError, "eps .*-1"),
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(3), eps=math.nan), ValueError, "eps .*nan"),
        (lambda: quick_gelu(torch.ones(2, 3), bias=torch.ones(2)), ValueError, "bias "),
        (lambda: quick_gelu(torch.ones(2, 3), bias=torch.ones(3, device="meta")), ValueError, "bias .*meta"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
