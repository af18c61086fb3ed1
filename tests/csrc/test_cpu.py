"""The CPU kernels by themselves: fuzzed under sanitizers, every instruction set, any number of threads, guarded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from igpt_kernels import decode_attention, layouts
from igpt_kernels._native import load

ROOT = Path(__file__).resolve().parents[2]
load.require()
OPS = torch.ops.igpt_kernels
LEVELS = ["portable", "avx2", "avx512"]
"""Instruction sets, each with all that the ones before it have."""


@pytest.mark.slow
def test_fuzz(tmp_path: Path) -> None:
    """Random cases under AddressSanitizer and UndefinedBehaviorSanitizer for some seconds; `make soak` takes minutes."""
    program = tmp_path / "fuzz_cpu"
    subprocess.run(["make", "--no-print-directory", "-C", ROOT, f"FUZZ={tmp_path / 'fuzz'}", program], check=True)
    done = subprocess.run([program, "6"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) >= 50
    found = [word for word in done.stdout.replace(",", "").split() if word in LEVELS]
    assert found == LEVELS[: len(found)]
    assert OPS.cpu_kernels() in found


def sums() -> list[float]:
    """A loss with its gradients, and decoding in three ways, as numbers that any change of a bit would change."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found: list[float] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Products of a width of 1 have one term, so that torch's are the same with any number of threads.
        hidden, weight, target = normal(700, 1).to(dtype), normal(217, 1).to(dtype), torch.arange(700) % 217
        made = OPS.cpu_cross_entropy_rows(hidden, weight, target, torch.ones(700), -100, 0.01, True, False)[:3]
        found += [float(x.double().abs().sum()) for x in made]
        OPS.cpu_scale(hidden, 0.7)
        found.append(float(hidden.double().abs().sum()))
        q, k, v = (normal(3, 4, n, 72).to(dtype) for n in (1, 1100, 1100))
        for length, layout in ((1100, None), (torch.tensor([0, 700, 1100]), None), (1000, layouts.strided(40, 25))):
            found.append(float(decode_attention(q, k, v, length, layout=layout, backend="ext").double().abs().sum()))
    return found


def test_the_same_bits_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(sums())
    finally:
        torch.set_num_threads(before)
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """In a process of its own, because the choice is made once. Where a CPU has no such set, the best it has is taken."""
    best = OPS.cpu_kernels()
    code = "import torch, tests.csrc.test_cpu as t; torch.set_num_threads(1); print(t.OPS.cpu_kernels(), *t.sums())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "IGPT_CPU_ISA": level},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, *numbers = done.stdout.split()
    assert name == (level if LEVELS.index(level) <= LEVELS.index(best) else best)
    for got, want in zip(map(float, numbers), sums(), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-2)


HIDDEN, WEIGHT, TARGET = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, dtype=torch.int64)
Q, K = torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 5, 8)
HEADS = torch.zeros(1, dtype=torch.int64)


def loss_of(
    hidden: Tensor = HIDDEN,
    weight: Tensor = WEIGHT,
    target: Tensor = TARGET,
    factor: Tensor | None = None,
    needed: bool = False,
) -> None:
    OPS.cpu_cross_entropy_rows(hidden, weight, target, factor, -100, 0.0, needed, needed)


def total_of(hidden: Tensor = HIDDEN, weight: Tensor = WEIGHT, target: Tensor = TARGET) -> None:
    OPS.cpu_cross_entropy_sum(hidden, weight, target, -100, 0.0, True, True, True, True)


def decoded(
    q: Tensor = Q,
    k: Tensor = K,
    v: Tensor = K,
    *,
    lengths: Tensor | None = None,
    length: int = 5,
    keys: Tensor | None = None,
    begins: Tensor | None = None,
    heads: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    out, lse = torch.empty(2, 3, 1, 8) if out is None else out, torch.empty(2, 3, 1) if lse is None else lse
    OPS.cpu_decode(q, k, v, lengths, length, keys, begins, heads, 1.0, out, lse)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("hidden must be", lambda: loss_of(HIDDEN[0])),
        ("weight must be", lambda: loss_of(weight=WEIGHT.bfloat16())),
        ("weight must be", lambda: loss_of(weight=WEIGHT[0])),
        ("weight must be", lambda: loss_of(weight=WEIGHT[:, :2])),
        ("weight must be", lambda: loss_of(weight=WEIGHT[:0])),
        ("inputs must be float32", lambda: loss_of(HIDDEN.double(), WEIGHT.double())),
        ("target must be", lambda: loss_of(target=TARGET[:3])),
        ("target must be", lambda: loss_of(target=TARGET.int())),
        ("target must be", lambda: loss_of(target=torch.zeros(8, dtype=torch.int64)[::2])),
        ("factor must be", lambda: loss_of(factor=torch.zeros(3))),
        ("factor must be", lambda: loss_of(factor=torch.zeros(()))),
        ("factor must be", lambda: loss_of(factor=torch.zeros(4, dtype=torch.float64))),
        ("factor must be", lambda: loss_of(needed=True)),
        ("hidden must be", lambda: total_of(HIDDEN[0])),
        ("weight must be", lambda: total_of(weight=WEIGHT[:, :2])),
        ("target must be", lambda: total_of(target=TARGET.int())),
        ("target must be", lambda: total_of(target=TARGET[:3])),
        ("target must be", lambda: total_of(target=HIDDEN.long().t())),
        ("values must be", lambda: OPS.cpu_scale(HIDDEN.t(), 2.0)),
        ("inputs must be float32", lambda: OPS.cpu_scale(HIDDEN.double(), 2.0)),
        ("q must be", lambda: decoded(K)),
        ("k and v must be", lambda: decoded(v=K[:, :, :4])),
        ("k and v must be", lambda: decoded(k=K.half())),
        ("k and v must be", lambda: decoded(k=K[..., :7])),
        ("without gaps", lambda: decoded(k=torch.zeros(2, 3, 8, 5).transpose(2, 3))),
        ("out must be", lambda: decoded(out=torch.empty(2, 3, 1, 7))),
        ("lse must be", lambda: decoded(lse=torch.empty(2, 3))),
        ("lengths must be", lambda: decoded(lengths=torch.tensor([5, 5, 5]))),
        ("keys must lie in the cache", lambda: decoded(length=6)),
        ("keys must lie in the cache", lambda: decoded(length=-1)),
        ("keys must lie in the cache", lambda: decoded(lengths=torch.tensor([5, 6]))),
        ("keys must lie in the cache", lambda: decoded(keys=torch.tensor([0, 5]))),
        ("keys must lie in the cache", lambda: decoded(keys=torch.tensor([-1]))),
        ("keys must lie in the cache", lambda: decoded(keys=torch.tensor([0, 1]), begins=torch.tensor([0, 1, 3]))),
        ("keys must lie in the cache", lambda: decoded(keys=torch.tensor([0, 1]), begins=torch.tensor([0, 2, 1]))),
        ("begins must be", lambda: decoded(keys=torch.tensor([0, 1]), begins=torch.tensor([0, 2]))),
        ("heads must exist", lambda: decoded(heads=HEADS + 3)),
        ("heads must exist", lambda: decoded(heads=HEADS - 1)),
    ],
)
def test_operators_guard_memory(message: str, call: object) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]
    loss_of(factor=torch.zeros(4), needed=True)
    total_of()
    decoded(keys=torch.tensor([0, 4]), begins=torch.tensor([0, 2, 2]), heads=HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_beyond_the_outputs_is_written(dtype: torch.dtype) -> None:
    """Some rows of a tensor, and one head of three."""
    wide = torch.full((6, 37), 7.0).to(dtype)
    OPS.cpu_scale(wide[1:5], 2.0)
    assert (wide[1:5] == 14).all()
    assert (wide[[0, 5]] == 7).all()
    out, lse = torch.full((2, 3, 1, 20), 7.0).to(dtype), torch.full((2, 3, 1), 7.0)
    q, k = Q.new_ones(2, 3, 1, 19).to(dtype), K.new_ones(2, 3, 5, 19).to(dtype)
    OPS.cpu_decode(q, k, k, None, 5, None, None, HEADS + 1, 1.0, out[..., :19], lse)
    assert (out[:, 1, :, :19] == 1).all()
    assert (out[:, 1, :, 19:] == 7).all()
    assert (out[:, ::2] == 7).all()
    assert (lse[:, ::2] == 7).all()
    assert (lse[:, 1] != 7).all()


def test_the_case_of_no_finite_score() -> None:
    """A score of -inf has no weight; where no score is finite, the result is NaN, as that of torch is."""
    q, k, v = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 600, 4), torch.ones(1, 1, 600, 4)
    k[..., :300, 0] = -torch.inf  # all of the first piece, some of the second
    assert (decode_attention(q, k, v, 600, backend="ext") == 1).all()
    assert decode_attention(q, k, v, 300, backend="ext").isnan().all()
    k[..., 599, 1] = torch.nan
    assert decode_attention(q, k, v, 600, backend="ext").isnan().all()
