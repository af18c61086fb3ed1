"""The catalogue of kernels in the interpreter: each launch against its oracle, and tuning with a table for a clock."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from igpt_kernels import backends, self_check_cases, testing, tuning
from igpt_kernels.tuning import Config
from tools import tune
from tools.kernels import DTYPES, KERNELS, LOSS, OPERATIONS, SPARSE, Inputs, Operation, listed_sizes, partner

SHIPPED, FAST, WRONG = Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)
SIZE = 16


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_gives_what_its_oracle_says(kernel: str, bits: int) -> None:
    entry = KERNELS[kernel]
    for form in range(entry.operation.forms):
        inputs = entry.operation.inputs(SIZE, 33, DTYPES[bits], "cpu", form)
        ours = entry.prepare(inputs)(SHIPPED, SHIPPED)
        exact, eager = entry.truth(inputs.to(torch.float64)), entry.truth(inputs)
        factor = testing.GRADIENT_FACTOR if entry.backward else testing.OUTPUT_FACTOR
        for mine, true, low in zip(ours, exact, eager, strict=True):
            testing.error_ratio(mine, true, low, factor=factor, floor=8.0, name=f"{kernel} form {form}")


@pytest.mark.parametrize("case", self_check_cases.CASES, ids="-".join)
def test_the_cases_of_the_self_check_pass(case: tuple[str, str]) -> None:
    functions = next(each.functions for each in backends.IMPLEMENTATIONS[case[0]] if each.backend == "triton")
    self_check_cases.CASES[case](lambda step: backends._load(functions[step]), torch.float32, 32, torch.device("cpu"))


def small(operation: Operation) -> Operation:
    def inputs(size: int, rows: int, dtype: torch.dtype, device: torch.device | str, form: int) -> Inputs:
        return operation.inputs(size, 40, dtype, device, form)

    return replace(operation, inputs=inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_fastest_right_candidate_is_taken(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {SHIPPED: 3.0, FAST: 2.0, WRONG: 1.0}
    entry = replace(KERNELS[kernel], operation=small(KERNELS[kernel].operation), candidates=lambda bits, size: [WRONG, FAST])
    monkeypatch.setattr(tune, "milliseconds", lambda run, repeats: (times[run.args[0]], 0.0, 0.0))

    def best(entry: object) -> Config:
        monkeypatch.setitem(KERNELS, kernel, entry)
        return tune.best(kernel, 32, SIZE, SHIPPED, SHIPPED, "cpu")

    assert best(entry) == WRONG

    def prepare(inputs: Inputs) -> object:
        call = entry.prepare(inputs)
        return lambda config, other: [x + (config == WRONG) for x in call(config, other)]

    broken = replace(entry, prepare=prepare)
    assert best(broken) == FAST
    times[FAST] = 2.99
    assert best(broken) == SHIPPED


def test_the_catalogue_is_complete() -> None:
    """Each entry of the tables, each operation that has Triton kernels, and nothing else."""
    from igpt_kernels import backends

    assert all(set(tuning.table(path.stem)) == set(KERNELS) for path in tuning.FOLDER.glob("*.json"))
    with_triton = {op for op, table in backends.IMPLEMENTATIONS.items() if any(one.backend == "triton" for one in table)}
    assert {name.rpartition(" ")[2] for name in OPERATIONS} == with_triton
    assert {id(entry.operation) for entry in KERNELS.values()} == {id(operation) for operation in OPERATIONS.values()}
    for entry in KERNELS.values():
        assert all(form < entry.operation.forms for form in entry.operation.audited_forms)
        assert all(dataclasses.is_dataclass(config) for config in entry.candidates(16, 64))


def test_kernels_that_are_launched_together_are_partners() -> None:
    pairs = {name: partner(name) for name in KERNELS if partner(name) != name}
    assert pairs == {
        f"{stem}_backward_{mine}": f"{stem}_backward_{other}"
        for stem in ("flash", "sparse")
        for mine, other in (("keys", "queries"), ("queries", "keys"))
    }


def test_sizes_of_an_operation_are_those_of_its_kernels_and_of_the_models() -> None:
    for operation, kernels in ((LOSS, ["cross_entropy_forward", "cross_entropy_gradient"]), (SPARSE, ["sparse_forward"])):
        sizes = listed_sizes("sm_90", operation, 32)
        assert sizes == sorted(set(sizes))
        assert {*operation.sizes} <= {*sizes}
        assert {int(size) for kernel in kernels for size in tuning.table("sm_90")[kernel]["32"]} <= {*sizes}
    assert (LOSS.sizes, SPARSE.sizes) == ((512,), (64, 96, 128))
