"""The registry is complete, and what is wrong is never timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import igpt_kernels
from benchmarks import plans, registry
from benchmarks.measure import timing, worker
from benchmarks.measure.worker import Job, measure
from benchmarks.plans import PLANS, Selection, operations, plan
from benchmarks.registry import RESOLUTIONS, Case

OURS = ("flash", "sparse", "lists", "decode", "ours", "ext", "torch", "kernels")
COLUMNS = {
    "way status reason median_s p20_s p80_s n times_s peak_bytes result_bytes error_ratio config clock_mhz",
    "matmul_tflops copy_gbs",
    "flops bytes bound formula per count tflops gbs of_machine",
}


def small(suite: str, op: str, method: str, tokens: int = 64) -> Case:
    dtype = "uint8" if suite == "palette" else "float32"
    heads, head_dim = (4, 32) if suite in ("train", "sample") else (2, 16)
    preset = "tiny" if suite in ("train", "sample") else "S"
    return Case(suite, op, method, preset, round(tokens**0.5), 1, heads, tokens, head_dim, dtype, "cpu")


def rows_of(case: Case) -> list[dict[str, Any]]:
    operation, _ = plans.find(case)
    ways = tuple(way for way in operation.ways_on("cpu") if not plans.unavailable_reason(case, way))
    return [message for message in measure(Job(case, ways, 0.01, 8 << 30)) if "status" in message] if ways else []


def test_every_public_operation_has_cases_of_ours() -> None:
    measured = {name for operation in operations().values() for name in operation.public}
    assert set(igpt_kernels.__all__) - {"explain"} <= measured
    assert "use_kernels" in measured
    for operation in operations().values():
        assert set(operation.methods) & set(OURS), f"{operation.suite} {operation.name} has no method of ours"


def test_every_suite_has_peers_and_every_cost_is_positive() -> None:
    assert {operation.suite for operation in operations().values()} == set(registry.SUITES)
    for (suite, op), operation in operations().items():
        case = small(suite, op, next(iter(operation.methods)))
        for way in operation.ways_on("cuda"):
            cost = operation.cost(case, way)
            assert cost.flops + cost.bytes + cost.count > 0
            assert cost.bound in ("compute", "memory")
            assert cost.formula


@pytest.mark.parametrize(("device", "mode"), [*PLANS, ("cpu", "full"), ("cuda", "full")])
def test_plans_hold_what_exists_once_and_peers_first(device: str, mode: str) -> None:
    cases = list(plan(Selection(device, mode)))
    assert len({case.key for case in cases}) == len(cases)
    assert {case.suite for case in cases} == set(registry.SUITES)
    for case in cases:
        assert Case.of({**case.__dict__, "more": 1}) == case
        plans.find(case)
    order = {case.key: place for place, case in enumerate(cases)}
    for case in cases:
        eager = replace(case, method="eager").key
        assert eager not in order or order[eager] <= order[case.key]
    for first, second in itertools.pairwise(cases):
        if (first.suite, first.op, first.preset, first.method) == (second.suite, second.op, second.preset, second.method):
            assert first.tokens <= second.tokens  # the smaller predicts the larger


def test_the_full_plan_has_every_resolution_and_preset() -> None:
    cases = list(plan(Selection("cpu", "full")))
    for suite, op in operations():
        found = {(case.preset, case.resolution) for case in cases if (case.suite, case.op) == (suite, op)}
        presets = ("S",) if suite == "palette" else ("S", "M", "L")
        sides = (0,) if op == "table" else RESOLUTIONS
        assert {(preset, side) for preset in presets for side in sides} <= found


def test_a_plan_refuses_nothing_that_is_named() -> None:
    assert "sdpa-flash" not in {case.method for case in plan(Selection("cpu", suites=("attention",)))}
    assert "sdpa-flash" in {case.method for case in plan(Selection("cpu", suites=("attention",), methods=("sdpa-flash",)))}
    assert {case.op for case in plan(Selection("cpu", suites=("sparse",), ops=("fixed",), presets=("S",)))} == {"fixed"}


@pytest.mark.slow
def test_a_users_own_shape() -> None:
    cases = list(plan(Selection("cpu", suites=("attention", "decode"), shape=(2, 3, 77, 24))))
    assert {case.shape for case in cases} == {"2x3x77x24"}
    assert all(case.size == (7, 11) for case in cases)
    assert [row["status"] for case in cases if case.method in ("flash", "decode") for row in rows_of(case)] == ["ok"] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "op", "method"),
    [
        (suite, op, method)
        for (suite, op), operation in operations().items()
        for method, how in operation.methods.items()
        if "cpu" in how.devices and not how.compiled and op not in ("table", "local2d:15", "local2d:31", "fixed")
    ],
)
def test_every_method_agrees_with_the_oracle_and_is_timed(suite: str, op: str, method: str) -> None:
    case = small(suite, op, method, tokens=1 if op == "table" else 64)
    rows = rows_of(case)
    if not rows:
        operation, _ = plans.find(case)
        assert all("not in this version" in plans.unavailable_reason(case, way) for way in operation.ways_on("cpu"))
        return
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert set(" ".join(COLUMNS).split()) <= set(row)
        assert 0 <= row["error_ratio"] <= 1
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]


@pytest.mark.slow
def test_a_compiled_backward_pass_is_timed_alone() -> None:
    """Its graph is kept, which a graph that gives its buffers away refuses; the rows before it are those of one that may."""
    import torch._functorch.config as settings

    case = small("fused", "rms_norm", "compile")
    with settings.patch(donated_buffer=True):  # `measure` changes it, in a process of its own otherwise
        messages = list(measure(Job(case, ("forward", "backward", "both"), 0.01, 8 << 30)))
    rows = [message for message in messages if "status" in message]
    assert {row["way"]: row["status"] for row in rows} == dict.fromkeys(("forward", "backward", "both"), "ok")
    assert rows[-1]["way"] == "backward"


@pytest.mark.slow
@pytest.mark.parametrize(("op", "cold"), [("rms_norm", True), ("linear_cross_entropy", False)])
def test_caches_are_cold_where_memory_bounds_a_case(op: str, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(run: Callable[[], object], device: str, budget: float, *, cold: bool = False) -> timing.Times:
        asked.append(cold)
        return timing.Times((1.0,))

    monkeypatch.setattr(timing, "measure", recorded)
    rows_of(small("fused", op, "ours"))
    assert asked == [cold, cold]


def test_the_backward_pass_of_the_loss_is_not_timed_alone() -> None:
    ways = {op: operation.ways_on("cuda") for (suite, op), operation in operations().items() if suite == "fused"}
    assert ways["linear_cross_entropy"] == ("forward", "both")
    assert ways["rms_norm"] == ("forward", "backward", "both")


def wrong_output(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: real(*args, **options) * 1.01


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.01


def wrong_gradient(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: _WrongGradient.apply(real(*args, **options))


@pytest.mark.slow
@pytest.mark.parametrize("breakage", [wrong_output, wrong_gradient])
@pytest.mark.parametrize(
    ("suite", "op", "method", "name"),
    [
        ("attention", "causal", "flash", "flash_attention"),
        ("sparse", "local2d:7", "sparse", "block_sparse_attention"),
        ("decode", "dense", "decode", "decode_attention"),
    ],
)
def test_a_wrong_kernel_is_a_row_and_is_not_timed(
    breakage: Callable[..., Any], suite: str, op: str, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if breakage is wrong_gradient and suite == "decode":
        return  # its gradient is not asked for
    monkeypatch.setattr(igpt_kernels, name, breakage(getattr(igpt_kernels, name)), raising=False)
    monkeypatch.setattr(timing, "measure", lambda *args: pytest.fail("timed"))
    rows = rows_of(small(suite, op, method))
    assert rows
    for row in rows:
        assert row["status"] == "error"
        assert "wrong result, not timed" in row["reason"]
        assert "median_s" not in row


def test_where_the_forward_pass_alone_is_timed_its_output_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("attention", "causal", "flash")
    real = igpt_kernels.flash_attention

    def rows() -> list[dict[str, Any]]:
        return [row for row in measure(Job(case, ("forward",), 0.05, 1 << 34)) if "status" in row]

    monkeypatch.setattr(igpt_kernels, "flash_attention", wrong_gradient(real))
    assert [row["status"] for row in rows()] == ["ok"]
    monkeypatch.setattr(igpt_kernels, "flash_attention", wrong_output(real))
    assert [row["reason"][:12] for row in rows()] == ["wrong result"]


@pytest.mark.parametrize("breakage", [wrong_output, wrong_gradient])
@pytest.mark.parametrize("name", ["rms_norm", "quick_gelu", "linear_cross_entropy"])
def test_a_wrong_fused_operation_is_refused(name: str, breakage: Callable[..., Any]) -> None:
    operation, method = plans.find(small("fused", name, "eager"))
    case = small("fused", name, "eager", tokens=256)
    right = method.make(case)
    assert operation.verify(case, right) <= 1
    with pytest.raises(AssertionError, match="over the budget"):
        operation.verify(case, breakage(right))


def test_a_wrong_model_and_a_wrong_lookup_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cases import palette
    from igpt.model import image_gpt

    real = palette.palette_lookup
    monkeypatch.setattr(palette, "palette_lookup", lambda *args, **options: real(*args, **options) ^ 1)
    monkeypatch.setattr(image_gpt, "flash_attention", wrong_gradient(image_gpt.flash_attention))
    for case in (small("palette", "lookup", "ext"), small("palette", "lookup", "torch"), small("train", "step", "kernels")):
        assert [row["status"] for row in rows_of(case)] == ["error"]


@pytest.mark.slow
def test_large_images_are_checked_in_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.cases import attention

    assert [run.start for run in attention.runs_of_rows(1000)] == [0, 512]
    monkeypatch.setattr(attention, "CHECKED", 64 * 16)
    runs = attention.runs_of_rows(64)
    assert len(runs) == 8
    assert runs[0].start == 0
    assert runs[-1].stop == 64
    assert rows_of(small("attention", "causal", "flash"))[0]["status"] == "ok"
    real = igpt_kernels.flash_attention

    def wrong_at_the_end(*args: Any, **options: Any) -> Tensor:
        out = real(*args, **options).clone()
        out[:, :, -1] += 0.1
        return out

    monkeypatch.setattr(igpt_kernels, "flash_attention", wrong_at_the_end, raising=False)
    assert rows_of(small("attention", "causal", "flash"))[0]["status"] == "error"


def test_failures_have_statuses() -> None:
    from igpt_kernels.backends import BackendUnavailable

    found = [worker.failure(error)["status"] for error in (MemoryError("1 GiB"), BackendUnavailable("no"), ValueError("x"))]
    assert found == ["oom", "skipped", "error"]
    real = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    assert worker.failure(real)["status"] == "oom"
    assert "first line" in worker.failure(ValueError("first line\nsecond"))["reason"]


def test_times_alone() -> None:
    """What rounds ask for: no oracle, no memory, no rates."""
    case = small("fused", "quick_gelu", "ours")
    rows = [row for row in measure(Job(case, ("forward", "both"), 0.01, 8 << 30, times_only=True)) if "status" in row]
    assert [(row["way"], row["status"]) for row in rows] == [("forward", "ok"), ("both", "ok")]
    assert all(row["median_s"] > 0 and "error_ratio" not in row and "peak_bytes" not in row for row in rows)
