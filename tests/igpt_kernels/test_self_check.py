"""The check of kernels at first use, with torch's implementation on the CPU in the place of kernels on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt_kernels import backends, self_check, self_check_cases

CPU = torch.device("cpu")
KEY: self_check.Key = ("flash_attention", "forward", torch.float32, 16, CPU)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No check done, an empty cache, and the CPU taken for a GPU."""
    monkeypatch.setattr(self_check, "DEVICES", ("cpu",))
    monkeypatch.setattr(self_check, "_states", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Kernels:
    """Steps of attention by torch, counted; `error` is added to the output."""

    def __init__(self, op: str = "flash_attention", error: float = 0.0) -> None:
        self.op, self.error, self.calls = op, error, 0

    def __call__(self, step: str) -> Callable[..., Any]:
        function = backends.step(self.op, "torch", step)

        def run(*arguments: Any) -> Any:
            self.calls += 1
            found = function(*arguments)
            if found is None:  # a step that works in place
                return None
            return (found[0] + self.error, *found[1:]) if isinstance(found, tuple) else found + self.error

        return run


def call(kernels: Kernels, size: int = 16, dtype: torch.dtype = torch.float32) -> None:
    self_check.ensure("flash_attention", "forward", [torch.zeros(1, 1, 3, size, dtype=dtype)], kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", self_check_cases.CASES, ids="-".join)
def test_right_results_pass_and_wrong_ones_do_not(case: tuple[str, str], dtype: torch.dtype) -> None:
    check = self_check_cases.CASES[case]
    check(Kernels(case[0]), dtype, 48, CPU)
    with pytest.raises(AssertionError, match="over the budget"):
        check(Kernels(case[0], error=0.5), dtype, 48, CPU)


def test_a_check_runs_once_for_each_kind_of_arguments() -> None:
    kernels = Kernels()
    call(kernels)
    assert kernels.calls == 4  # forward and backward, causal and not
    call(kernels)
    assert kernels.calls == 4
    call(kernels, size=32)
    assert kernels.calls == 8
    call(kernels, dtype=torch.bfloat16)
    assert kernels.calls == 12


def test_a_wrong_kernel_is_named_with_remedies() -> None:
    wrong = Kernels(error=0.1)
    for _ in range(2):
        with pytest.raises(self_check.SelfCheckError) as failure:
            call(wrong)
        for words in ("flash_attention (forward, torch.float32, size 16)", "over the budget", "backend='torch'"):
            assert words in str(failure.value)
        assert f"{self_check.VARIABLE}=0" in str(failure.value)
        assert (self_check.blackwell_ptxas() is not None) == ("TRITON_PTXAS_PATH=" in str(failure.value))
    assert wrong.calls == 2  # once; no backward pass behind a wrong forward pass
    assert "1 failed; 0 passed noted" in self_check.describe()
    assert not self_check.passed(self_check.record(KEY))


def test_the_triton_backend_is_checked_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(self_check, "ensure", lambda op, step, arguments, load: seen.append((op, step)))
    monkeypatch.setattr(backends, "_load", lambda place: lambda *arguments: place)
    assert backends.step("rms_norm", "triton", "forward")(1) == "igpt_kernels._triton.norm:launch_rms_norm_forward"
    assert backends.step("rms_norm", "triton", "backward")(1) == "igpt_kernels._triton.norm:launch_rms_norm_backward"
    assert backends.step("rms_norm", "torch", "forward")(1) == "igpt_kernels._torch.norm:rms_norm_forward"
    assert seen == [("rms_norm", "forward")]


def test_variable_and_interpreter_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Kernels(error=0.1)
    for name, value in ((self_check.VARIABLE, "0"), ("TRITON_INTERPRET", "1")):
        with monkeypatch.context() as change:
            change.setenv(name, value)
            call(wrong)
            assert self_check.describe().startswith("off")
    assert wrong.calls == 0
    with pytest.raises(self_check.SelfCheckError):
        call(wrong)


def test_a_capture_postpones_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    with monkeypatch.context() as change:
        change.setattr(torch.cuda, "is_available", lambda: True)
        change.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        call(kernels)
        assert kernels.calls == 0
    call(kernels)
    assert kernels.calls == 4


def test_short_memory_postpones_it() -> None:
    def load(step: str) -> Callable[..., Any]:
        raise torch.OutOfMemoryError("no memory")

    self_check.ensure("flash_attention", "forward", [torch.zeros(1, 1, 3, 16)], load)
    assert not self_check._states


def test_the_state_of_the_caller_neither_enters_nor_changes() -> None:
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        call(Kernels())
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        call(Kernels(), size=32)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_on_disk_avoids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    call(kernels)
    assert self_check.passed(self_check.record(KEY))
    assert "1 passed, 0 failed; 1 passed noted" in self_check.describe()
    self_check._states.clear()  # as in a new process
    call(kernels)
    assert kernels.calls == 4
    self_check._states.clear()
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/another/ptxas")
    call(kernels)
    assert kernels.calls == 8


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passed": 1}', "\x00"])
def test_a_damaged_file_is_ignored(text: str) -> None:
    kernels = Kernels()
    path = self_check.record(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    call(kernels)
    assert kernels.calls == 4
    assert self_check.passed(path)


def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    call(Kernels())


def test_two_threads_make_one_check() -> None:
    kernels = Kernels()
    threads = [threading.Thread(target=call, args=(kernels,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels.calls == 4


def test_a_case_that_calls_the_operation_does_not_wait_for_itself() -> None:
    kernels = Kernels()

    def load(step: str) -> Callable[..., Any]:
        call(kernels)
        return kernels(step)

    self_check.ensure("flash_attention", "forward", [torch.zeros(1, 1, 3, 16)], load)
    assert kernels.calls == 4
