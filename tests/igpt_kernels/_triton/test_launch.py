"""The key of a launch against Triton's own: never another kernel than Triton would launch, with the same arguments.

Nothing is compiled: a stub stands for the compiler and one for the driver. So hundreds of argument sets take seconds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from igpt_kernels._triton import launch as module
from igpt_kernels._triton.common import ceil_div, power_of_2
from igpt_kernels._triton.launch import launch
from tools.launch_overhead import StubDriver, stubbed

Launched = tuple[Any, ...]
"""What a launcher of Triton's takes: grid x 3, stream, function, metadata, launch metadata, hooks x 2, arguments."""
ARGUMENTS = 9
"""Where the arguments of the kernel begin in `Launched`."""


def _body(  # type: ignore[no-untyped-def]
    X, Y, stride, wide, n, scale, flag, SIZE: tl.constexpr, MODE: tl.constexpr = 7
):  # fmt: skip
    pass


class Bench:
    """A kernel that is compiled and launched by stubs, and what was launched."""

    def __init__(self, driver: StubDriver) -> None:
        # Not by triton.jit: it makes another class where kernels are interpreted.
        self.kernel = JITFunction(_body, do_not_specialize=["wide", "n"])
        self.driver = driver
        self.backend = "cuda"
        self.compiled: list[CompiledKernel] = []
        self.seen: list[Launched] = []
        driver.launched = lambda *args: self.seen.append(args)

    def compile(self, src: object, target: Any, options: Any) -> CompiledKernel:
        """In place of Triton's compiler."""
        made = CompiledKernel.__new__(CompiledKernel)
        made.src, made.module, made.function = src, object(), f"kernel {len(self.compiled)}"
        made.name, made.packed_metadata = "body", ("packed", len(self.compiled))
        made.metadata = SimpleNamespace(target=SimpleNamespace(backend=self.backend))
        made._run = self.driver.launched
        self.compiled.append(made)
        return made

    def launch(self, *args: Any, grid: tuple[int, ...] = (3,), **constants: Any) -> Launched:
        """What was launched by `launch`."""
        count = len(self.seen)
        launch(self.kernel, grid, *args, **constants)
        assert len(self.seen) == count + 1
        return self.seen[-1]

    def direct(self, *args: Any, **constants: Any) -> Launched | None:
        """What was launched by `launch` without `JITFunction.run`; None if that was asked."""
        asked = []

        def run(*args: Any, **options: Any) -> Any:
            asked.append(1)
            return JITFunction.run(self.kernel, *args, **options)

        self.kernel.run = run
        try:
            launched = self.launch(*args, **constants)
        finally:
            del self.kernel.run
        return None if asked else launched

    def triton(self, *args: Any, **constants: Any) -> str:
        """The kernel that Triton would launch."""
        found = self.kernel.run(*args, grid=(3,), warmup=True, **constants)
        return str(found.function)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    module.clear()
    with stubbed(StubDriver()) as driver:
        made = Bench(driver)
        monkeypatch.setattr(triton.compiler, "compile", made.compile)
        yield made
    module.clear()


def tensor(dtype: torch.dtype = torch.bfloat16, shift: int = 0) -> torch.Tensor:
    """Memory that begins `shift` elements behind an address divisible by 64."""
    return torch.zeros(64, dtype=dtype)[shift:]


def usual(**changed: Any) -> tuple[Any, ...]:
    values = {"X": tensor(), "Y": tensor(), "stride": 64, "wide": 100, "n": 5, "scale": 0.5, "flag": True}
    return tuple((values | changed).values())


def test_the_second_call_asks_triton_nothing_and_equal_keys_share_a_kernel(bench: Bench) -> None:
    assert bench.direct(*usual(), SIZE=16) is None
    for change in (
        {},
        {"X": tensor(shift=8)},
        {"wide": 3, "n": 2**31 - 1},
        {"n": 1},
        {"scale": 2.5},
        {"flag": False},
        {"wide": 16},
    ):
        found = bench.direct(*usual(**change), SIZE=16)
        assert found is not None
        assert found[4] == bench.triton(*usual(**change), SIZE=16) == "kernel 0"
    assert bench.direct(*usual(stride=80), SIZE=16) is None, "another value asks Triton, which need not compile"
    assert bench.direct(*usual(stride=80), SIZE=16) is not None
    assert len(bench.compiled) == 1


CHANGES: dict[str, dict[str, Any]] = {
    "misaligned pointer": {"X": tensor(shift=1)},
    "the other pointer misaligned": {"Y": tensor(shift=1)},
    "stride 1": {"stride": 1},
    "stride not divisible by 16": {"stride": 72},
    "stride of 64 bits": {"stride": 1 << 31},
    "stride of 64 unsigned bits": {"stride": 1 << 63},
    "64 bits where nothing else matters": {"n": 1 << 31},
    "negative 64 bits where nothing else matters": {"n": -(1 << 31) - 1},
    "unsigned where nothing else matters": {"n": 1 << 63},
    "another dtype": {"X": tensor(torch.float16)},
    "None for a tensor": {"Y": None},
    "an integer for a float": {"scale": 2},
    "an integer for a bool": {"flag": 1},
    "a bool for an integer": {"stride": True},
    "a bool where nothing else matters": {"n": True},
    "a float for an integer": {"n": 5.0},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_triton_specialises_on_reaches_another_kernel(bench: Bench, what: str) -> None:
    for _ in range(2):
        assert bench.launch(*usual(), SIZE=16)[4] == "kernel 0"
        assert bench.launch(*usual(**CHANGES[what]), SIZE=16)[4] == "kernel 1" == bench.triton(*usual(**CHANGES[what]), SIZE=16)


@pytest.mark.parametrize(
    "constants",
    [{"SIZE": 32}, {"SIZE": 16, "MODE": 8}, {"SIZE": 16, "num_warps": 8}, {"SIZE": 16, "num_stages": 2},
     {"SIZE": 16, "maxnreg": 64}],
    ids=str,
)  # fmt: skip
def test_constants_and_options_reach_another_kernel(bench: Bench, constants: dict[str, Any]) -> None:
    for _ in range(2):
        assert bench.launch(*usual(), SIZE=16)[4] == "kernel 0"
        assert bench.launch(*usual(), **constants)[4] == "kernel 1"
    assert bench.launch(*usual(), num_warps=4, MODE=9, SIZE=16)[ARGUMENTS + 7 :] == (16, 9), "in the order of the kernel"
    assert bench.launch(*usual(), num_warps=4, MODE=9, SIZE=16)[ARGUMENTS + 7 :] == (16, 9)


def test_device_driver_and_debug_switches_reach_another_kernel(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bench.launch(*usual(), SIZE=16)[4] for _ in range(2)] == ["kernel 0"] * 2
    bench.driver.device += 1
    assert [bench.launch(*usual(), SIZE=16)[4] for _ in range(2)] == ["kernel 1"] * 2
    bench.driver.device -= 1
    assert bench.direct(*usual(), SIZE=16) is not None
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert [bench.launch(*usual(), SIZE=16)[4] for _ in range(2)] == ["kernel 2"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(knobs.compilation, "instrumentation_mode", "none yet")
        assert [bench.launch(*usual(), SIZE=16)[4] for _ in range(2)] == ["kernel 3"] * 2
    assert bench.launch(*usual(), SIZE=16)[4] == "kernel 0"
    other = StubDriver(launched=bench.driver.launched)
    other.device = bench.driver.device
    with stubbed(other):
        assert bench.direct(*usual(), SIZE=16) is None, "what another driver loaded is not launched"


def descriptors() -> list[Any]:
    x, y = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.float32)
    found: list[Any] = [TensorDescriptor.from_tensor(base, [rows, 64]) for base in (x, y) for rows in (16, 32)]
    found.append(TensorDescriptor.from_tensor(x.clone(), [16, 64]))
    gluon = pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    layout = pytest.importorskip("triton.experimental.gluon.language").NVMMASharedLayout
    for width in (128, 64):
        found.append(gluon.TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 64], layout(width, 16, 2)))
    return found


POINTERS = [
    *(tensor(dtype, shift) for dtype in (torch.bfloat16, torch.float16, torch.float32) for shift in (0, 1, 2, 8)),
    torch.nn.Parameter(torch.zeros(64)), torch.zeros(0), None, *descriptors(),
]  # fmt: skip
INTEGERS = [
    0,
    1,
    2,
    15,
    16,
    17,
    -1,
    -16,
    100,
    4096,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**32,
    2**63 - 1,
    2**63,
    True,
    False,
    0.5,
]
NUMBERS = [0.0, 1.0, 0.5, 1, 16, 3, True, None]


POOLS = [POINTERS, POINTERS, INTEGERS, INTEGERS, INTEGERS, NUMBERS, NUMBERS]


@pytest.mark.parametrize("place", [0, 2, 3, 5])
def test_every_value_of_one_argument_in_turn(bench: Bench, place: int) -> None:
    """All pairs of values: none may find the kernel of another, unless Triton gives both the same one."""
    for value in [*POOLS[place], *reversed(POOLS[place])]:
        args = [*usual()]
        args[place] = value
        for _ in range(2):
            assert bench.launch(*args, SIZE=16)[4] == bench.triton(*args, SIZE=16), value


def test_the_kernel_is_the_one_that_triton_would_launch(bench: Bench) -> None:
    """For random arguments, of which half have been seen before; equal keys with unequal kernels would fail here."""
    dice = random.Random(0)
    base = [dice.choice(pool) for pool in POOLS]
    direct = 0
    for _ in range(1500):
        # One argument is changed: unequal kernels then differ in one thing, which the key must not leave out.
        place = dice.randrange(len(POOLS))
        base[place] = dice.choice(POOLS[place])
        constants = {"SIZE": dice.choice([16, 32]), "MODE": dice.choice([7, False, None])}
        args = tuple(base)
        for _ in range(2):
            found = bench.direct(*args, **constants)
            assert bench.seen[-1][4] == bench.triton(*args, **constants), (args, constants)
            direct += found is not None
    assert direct >= 1500
    assert len(bench.compiled) > 300


def test_arguments_arrive_as_from_triton(bench: Bench) -> None:
    first = bench.launch(*usual(), grid=(3, 2), SIZE=16)
    args = usual(X=tensor(shift=16), scale=0.25, n=9)
    second = bench.launch(*args, grid=(4, 5), SIZE=16)
    bench.kernel[(4, 5)](*args, SIZE=16)
    third = bench.seen[-1]
    assert [*second[:6]] == [*third[:6]] == [4, 5, 1, 0, "kernel 0", ("packed", 0)]
    assert first[:3] == (3, 2, 1)
    assert len(second) == len(third) == ARGUMENTS + 9
    assert all(a is b for a, b in zip(second[ARGUMENTS:], third[ARGUMENTS:], strict=True))
    assert bench.launch(*args, grid=(4, 5, 6), SIZE=16)[:3] == (4, 5, 6)


def test_the_stream_is_that_of_the_call(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = itertools.count(10)
    monkeypatch.setattr(bench.driver, "get_current_stream", lambda device: next(streams))
    assert [bench.launch(*usual(), SIZE=16)[3] for _ in range(3)] == [10, 11, 12]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_handed_to_the_launcher(bench: Bench, name: str) -> None:
    assert [bench.direct(*usual(), SIZE=16) is None for _ in range(2)] == [True, False]
    called: list[Any] = []
    chain = getattr(knobs.runtime, name)
    chain.add(called.append)
    try:
        *_, metadata, enter, leave = bench.launch(*usual(), SIZE=16)[:ARGUMENTS]
        {"launch_enter_hook": enter, "launch_exit_hook": leave}[name](metadata)  # as Triton's launcher does
    finally:
        chain.remove(called.append)
    assert [each.get()["name"] for each in called] == ["body"]
    assert bench.direct(*usual(), SIZE=16) is not None


def replaced_run(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    """As `tools.audit` and Proton do."""
    run = JITFunction.run
    patch.setattr(JITFunction, "run", lambda self, *args, **options: run(self, *args, **options))


def own_hook(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    bench.kernel.add_pre_run_hook(lambda *args, **options: None)


def one_function_as_hook(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)


def unknown_triton(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "KNOWN", False)


def stages(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *args: ("key", "hash"), raising=False)


def other_backend(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    bench.backend = "hip"


@pytest.mark.parametrize("cause", [replaced_run, own_hook, one_function_as_hook, unknown_triton, stages, other_backend])
def test_what_must_go_the_plain_way_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, cause: Callable[[Bench, pytest.MonkeyPatch], None]
) -> None:
    if cause is not other_backend:
        bench.launch(*usual(), SIZE=16)
        assert bench.direct(*usual(), SIZE=16) is not None
    cause(bench, monkeypatch)
    for _ in range(2):
        assert bench.direct(*usual(), SIZE=16) is None


def test_arguments_that_no_key_describes_go_the_plain_way(bench: Bench) -> None:
    for _ in range(2):
        assert bench.direct(*usual(X=(tensor(), 3)), SIZE=16) is None


def test_what_is_not_compiled_by_triton_runs_as_it_is() -> None:
    """As in the interpreter."""
    seen: list[Any] = []

    class Interpreted:
        def run(self) -> None:
            pass

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: seen.append((grid, args, constants))

    launch(Interpreted(), (2,), 1, 2, SIZE=3)
    assert seen == [((2,), (1, 2), {"SIZE": 3})]


def test_a_named_argument_must_be_a_constant(bench: Bench) -> None:
    with pytest.raises(TypeError, match="flag is no compile-time argument, so it must be passed by position"):
        launch(bench.kernel, (1,), *usual()[:-1], flag=True, SIZE=16)


def test_ever_new_values_do_not_fill_the_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    for stride in range(2, 20):
        assert bench.launch(*usual(stride=stride), SIZE=16)[4] == bench.triton(*usual(stride=stride), SIZE=16)
    (form,) = module._forms.values()
    assert len(form.compiled) <= 3


def test_integer_arithmetic_is_that_of_triton() -> None:
    for a in (0, 1, 15, 16, 17, 255, 256, 257):
        assert [ceil_div(a, b) for b in (1, 16, 100)] == [triton.cdiv(a, b) for b in (1, 16, 100)]
        assert power_of_2(a + 1) == triton.next_power_of_2(a + 1)
