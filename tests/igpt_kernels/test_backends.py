"""The table of backends: one entry adds one, reasons are complete, and a choice looks at no more than it needs."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import igpt_kernels
from igpt_kernels import backends, palette_lookup, testing
from igpt_kernels._torch import attention as torch_attention
from igpt_kernels._torch import norm as torch_norm
from igpt_kernels._torch import sparse as torch_sparse

CALLS: list[str] = []


def _counted(name: str, function: object) -> object:
    def call(*args: object) -> object:
        CALLS.append(name)
        return function(*args)  # type: ignore[operator]

    return call


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend "other" of three operations, added as a user of the table would: one entry each, and its own module."""
    module = types.ModuleType("other_backend")
    for name, function in (
        ("flash_forward", torch_attention.flash_forward),
        ("flash_backward", torch_attention.flash_backward),
        ("sparse_forward", torch_sparse.sparse_forward),
        ("sparse_backward", torch_sparse.sparse_backward),
        ("rms_norm_forward", torch_norm.rms_norm_forward),
        ("rms_norm_backward", torch_norm.rms_norm_backward),
    ):
        setattr(module, name, _counted(name, function))
    monkeypatch.setitem(__import__("sys").modules, "other_backend", module)
    for op, stem in (("flash_attention", "flash"), ("block_sparse_attention", "sparse"), ("rms_norm", "rms_norm")):
        functions = {step: f"other_backend:{stem}_{step}" for step in ("forward", "backward")}
        entry = backends.Implementation("other", functions, devices=("cpu",))
        monkeypatch.setitem(backends.IMPLEMENTATIONS, op, (entry, *backends.IMPLEMENTATIONS[op]))
    CALLS.clear()
    yield "other"
    backends._load.cache_clear()


@pytest.mark.parametrize("backend", ["other", "auto"])
def test_one_entry_of_the_table_is_a_backend_forward_and_backward(another: str, backend: str) -> None:
    layout = igpt_kernels.layouts.local2d(5, 6, 1)
    q = testing.make_input((1, 2, 30, 8), dtype=torch.float32, seed=1).requires_grad_()
    x, weight = torch.randn(5, 8, requires_grad=True), torch.ones(8, requires_grad=True)

    def outputs(backend: str) -> tuple[Tensor, ...]:
        outs = (
            igpt_kernels.flash_attention(q, q, q, backend=backend),
            igpt_kernels.block_sparse_attention(q, q, q, layout, backend=backend),
            igpt_kernels.rms_norm(x, weight, backend=backend),
        )
        return (*outs, *torch.autograd.grad([out.square().sum() for out in outs], (q, x, weight)))

    got = outputs(backend)
    assert set(CALLS) == {f"{op}_{step}" for op in ("flash", "sparse", "rms_norm") for step in ("forward", "backward")}
    seen = len(CALLS)
    for mine, theirs in zip(got, outputs("torch"), strict=True):
        assert torch.equal(mine, theirs)
    assert len(CALLS) == seen, "a call by another name does not run it"
    assert igpt_kernels.explain("rms_norm", dtype=torch.float32, device="cpu", width=8)[0] == ("other", [])
    assert igpt_kernels.explain("rms_norm", dtype=torch.float32, device="meta", width=8)[0][1] == [
        "device meta is not one of cpu"
    ]


def test_a_step_that_a_backend_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of triton, torch for backward of rms_norm; got 'reference'"):
        backends.step("rms_norm", "reference", "backward")


def test_every_public_operation_is_explained() -> None:
    """The palette included; every name of the package that takes a backend is in the table."""
    import inspect

    public = {
        name
        for name in igpt_kernels.__all__
        if callable(found := getattr(igpt_kernels, name)) and not inspect.isclass(found)
        if "backend" in inspect.signature(found).parameters
    }
    assert public == set(backends.IMPLEMENTATIONS) == set(backends.SIZE_ARGUMENT)
    for op, size in backends.SIZE_ARGUMENT.items():
        dtype = torch.uint8 if op == "palette_lookup" else torch.float32
        sizes = {} if size is None else {size: 64}
        table = backends.explain(op, dtype=dtype, device="cpu", **sizes)
        assert dict(table)["torch"] == []
        assert all(reasons or name != "triton" for name, reasons in table)
        assert backends.choose("auto", table, op) == backends.select(op, "auto", [torch.zeros(0, dtype=dtype)], 64)


def test_the_palette_gives_its_reasons_from_the_table() -> None:
    on_mps = dict(backends.explain("palette_lookup", dtype=torch.uint8, device="mps"))
    assert on_mps["ext"][0] == "device mps is not one of cpu, cuda"
    assert on_mps["torch"] == []
    with pytest.raises(backends.BackendUnavailable, match="device meta is not one of cpu, cuda"):
        palette_lookup(
            torch.zeros(2, 3, dtype=torch.uint8, device="meta"),
            igpt_kernels.PaletteTable(torch.arange(6, dtype=torch.uint8).view(2, 3)),
            backend="ext",
        )
    with pytest.raises(TypeError, match="head_dim must be None for palette_lookup, which takes no size"):
        backends.explain("palette_lookup", dtype=torch.uint8, device="cpu", head_dim=3)


def test_every_reason_is_given() -> None:
    table = backends.explain("linear_cross_entropy", dtype=torch.float64, device="cpu", vocab=1)
    assert dict(table)["triton"] == [
        "device cpu is not one of cuda (NVIDIA or AMD GPUs)",
        "dtype torch.float64 is not one of torch.float16, torch.bfloat16, torch.float32",
        "vocab 1 is below 2",
    ]


def test_a_torch_for_rocm_may_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capability numbers are no compute capabilities: gfx1030 says 10.3, gfx90a 9.0."""

    def triton(device: str) -> list[str]:
        return dict(backends.explain("flash_attention", dtype=torch.float16, device=device, head_dim=64))["triton"]

    monkeypatch.setattr(torch.version, "hip", "7.0.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = types.SimpleNamespace(major=7, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert triton("cuda") == triton("cuda:0") == []
    assert triton("cpu") == ["device cpu is not one of cuda (AMD GPUs, compiled for gfx90a, gfx942, gfx950, not run)"]
    monkeypatch.setattr(backends, "_HAS_TRITON_FOR_AMD", False)
    assert triton("cuda") == [
        "the installed triton has no compiler for AMD GPUs (pip install triton, or the one of torch for ROCm)"
    ]
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton("cuda") == ["compute capability 7.0 is below 8.0"]
    monkeypatch.undo()
    assert backends._HAS_TRITON_FOR_AMD == backends._HAS_TRITON, "the wheel of the package registry has it"


def test_a_choice_by_name_looks_at_that_backend_alone() -> None:
    """A call pays for its choice each time: `select` takes 1 µs where the whole table takes 4."""
    looked: list[str] = []
    reasons = backends.reasons

    def spy(implementation: backends.Implementation, **facts: object) -> list[str]:
        looked.append(implementation.backend)
        return reasons(implementation, **facts)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "reasons", spy)
        assert backends.select("flash_attention", "torch", [torch.zeros(0)], 64) == "torch"
    assert looked == ["torch"]


@pytest.mark.parametrize(("op", "smallest", "largest"), [("flash_attention", 1, 256), ("linear_cross_entropy", 2, 8192)])
def test_limits_of_a_size_are_among_what_can_run(op: str, smallest: int, largest: int) -> None:
    name = backends.SIZE_ARGUMENT[op]
    assert name is not None

    def triton(size: int) -> list[str]:
        table = backends.explain(op, dtype=torch.float32, device="meta", **{name: size})
        return dict(table)["triton"][1:]  # the first is the device

    assert triton(smallest) == triton(largest) == []
    assert triton(smallest - 1) == [f"{name} {smallest - 1} is below {smallest}"]
    assert triton(largest + 1) == [f"{name} {largest + 1} is above {largest}"]


def test_the_size_of_an_operation_must_be_given() -> None:
    with pytest.raises(TypeError, match="head_dim must be given for flash_attention"):
        backends.explain("flash_attention", dtype=torch.float32, device="cpu")


def test_a_backend_by_name_is_refused_for_its_own_reasons_alone() -> None:
    table = [("a", ["slow", "old"]), ("b", ["far"]), ("c", ["new"])]
    for backend, refused in (("b", "b: far"), ("auto", "a: slow, old; b: far; c: new")):
        with pytest.raises(backends.BackendUnavailable) as raised:
            backends.choose(backend, table, "op")
        assert str(raised.value) == f"op cannot run with backend='{backend}': {refused}"
    assert backends.choose("auto", [*table, ("d", [])], "op") == backends.choose("d", [*table, ("d", [])], "op") == "d"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"op": ["rms_norm"]}, ValueError, "op must be one of"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32'"),
        ({"device": "teapot"}, ValueError, "device must be a torch.device or the name of one, got 'teapot'"),
        ({"device": None}, ValueError, "device must be a torch.device or the name of one, got None"),
        ({"width": "64"}, TypeError, "width must be given for rms_norm as an int, got '64'"),
        ({"width": 1.5}, TypeError, "width must be given for rms_norm as an int, got 1.5"),
        ({"width": None}, TypeError, "width must be given for rms_norm$"),
    ],
    ids=str,
)
def test_explain_names_what_is_wrong(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        backends.explain(**{"op": "rms_norm", "dtype": torch.float32, "device": "cpu", "width": 64, **changes})


def test_an_extension_that_does_not_serve_a_device_is_not_asked_for() -> None:
    """Else a CUDA library would be proposed, which has no such kernel."""
    table = dict(backends.explain("decode_attention", dtype=torch.float32, device="cuda", head_dim=64))
    assert table["ext"] == ["device cuda is not one of cpu"]
