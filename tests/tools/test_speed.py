"""What costs time in a loop is named; rates are predicted at the timed shapes, beside what was measured and published."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from igpt_kernels import layouts
from igpt_kernels.tuning import Config
from tests.tools.test_sass import LOOPS, listing
from tools import sass, speed
from tools.kernels import KERNELS, Inputs

COPY = ["LDGSTS.E.BYPASS.128 [R37], desc[UR24][R28.64]", "LDGDEPBAR"]
FIRST, MORE = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
FLOAT = ["FFMA R1, R2, R3, R4"] * 12


def loop(*code: str) -> list[sass.Instruction]:
    return sass.read(listing(*code, "@P0 BRA 0x0"))


def wait(groups: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {groups:#x}"


def arrive(groups: int) -> str:
    return f"DEPBAR.LE SB0, {groups:#x}"


def test_a_good_loop_has_no_problem() -> None:
    assert not speed.problems(loop(arrive(1), FIRST, MORE, wait(0), *FLOAT, *COPY), 64)
    real = sass.hot_loop(sass.read((LOOPS / "flash_forward_64.sass").read_text(encoding="utf-8")))
    assert not speed.problems(real, 64)
    assert speed.address_share(real) == pytest.approx(0.24, abs=0.005)


def test_more_waits_than_products() -> None:
    code = [FIRST, wait(0), MORE, wait(0), *FLOAT]
    assert speed.problems(loop(*code), 64) == ["2 waits for 1 products"]
    assert not speed.problems(loop(FIRST, MORE, wait(0), *FLOAT), 64)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ([arrive(0), FIRST, MORE, *COPY], True),  # the copy of the iteration before, at its end
        ([arrive(1), FIRST, MORE, *COPY], False),  # the one before that
        ([*COPY, arrive(0), FIRST, MORE], True),
        ([*COPY, FIRST, MORE, arrive(0)], False),  # its own, behind the products
        ([arrive(1), FIRST, MORE, *COPY, *COPY], True),  # two groups an iteration: the older of the last
        ([arrive(2), FIRST, MORE, *COPY, *COPY], False),
        ([arrive(0), *COPY, FIRST, MORE], False),  # the whole iteration lies between
        (["LDG.E.128 R4, desc[UR4][R2.64]", "STS.128 [R1], R4", FIRST, MORE], True),  # no copy: through registers
        (["LDG.E.U16 R4, desc[UR4][R2.64]", "STS.U16 [R1], R4", FIRST, MORE], False),  # too narrow for a copy
        (["LDG.E.128 R4, desc[UR4][R2.64]", FIRST, MORE], False),  # not what the product reads
    ],
)
def test_exposed_loads(code: list[str], expected: bool) -> None:
    assert speed.exposed(loop(*code)) is expected
    found = speed.problems(loop(*code, *FLOAT), 64)
    assert found == ["loads are waited for with no product in between"] * expected


def test_narrow_products() -> None:
    thin = [FIRST, MORE.replace("64x64x16", "64x32x16"), wait(0), *FLOAT]
    assert speed.problems(loop(*thin), 64) == ["products of 32 columns"]
    assert not speed.problems(loop(*thin), 96), "its second part has 32 columns"
    assert not speed.problems(loop(*thin), 32)
    assert [speed.narrowest(dim) for dim in (32, 64, 80, 96, 128, 192, 256)] == [32, 64, 16, 32, 64, 64, 64]


def test_address_arithmetic() -> None:
    code = [FIRST, MORE, wait(0), *["IADD3 R1, R2, R3, R4"] * 5, *["UIADD3 UR1, UR2, UR3, URZ"] * 5]
    assert speed.address_share(loop(*code)) == 10 / 14
    assert speed.problems(loop(*code), 64) == ["71% of the loop computes addresses"]
    assert not speed.problems(loop(*code), 64, heads=False), "the loss has little else in its loop"
    assert not speed.problems(loop(*[one.replace("UIADD3", "FADD").replace("IADD3", "ISETP") for one in code]), 64)


def test_tensors_that_allow_no_wide_load() -> None:
    x = torch.empty(2, 256, 3, 2, 64, dtype=torch.bfloat16)
    q, lengths = x[:, :, 0].transpose(1, 2), torch.tensor([1, 2])
    moved = speed.unaligned(Inputs((q, None, lengths), {"causal": True}))
    y, nothing, same = moved.tensors
    assert nothing is None
    assert same is lengths
    assert moved.how == {"causal": True}
    assert y is not None
    assert y.shape == q.shape
    assert y.data_ptr() % 16 == 8
    assert y.stride(3) == 1
    assert y.stride(1) % 2 == 1
    assert sorted(speed.ATTENTION) == sorted(name for name in KERNELS if name.startswith(("flash", "sparse", "decode")))


def test_the_work_of_a_launch() -> None:
    pairs = 16384 * 16385 / 2
    forward = speed.work("flash_forward", 64, 128, 64, "causal")
    assert forward == speed.Work(128, sum(2 * tile for tile in range(1, 129)), 0, 4 * 64 * pairs, 16)
    keys = speed.work("flash_backward_keys", 128, 64, 128, "causal")
    assert keys == speed.Work(128, sum(2 * tile for tile in range(1, 129)), 0, 8 * 128 * pairs, 16)
    sparse = speed.work("sparse_backward_queries", 96, 64, 64, "local2d:7")
    assert sparse.programs == 256
    assert sparse.masked == sparse.iterations, "no tile of 8 x 8 pixels lies inside the window"
    wide = speed.work("sparse_backward_queries", 96, 64, 64, "local2d:15")
    assert 0 < wide.masked < wide.iterations
    assert sparse.iterations * 64 * 64 > layouts.local2d(128, 128, 7).pairs
    assert (sparse.flops, sparse.heads) == (6 * 96 * layouts.local2d(128, 128, 7).pairs, 32)


def test_time_and_rate() -> None:
    work, cost = speed.Work(132, 1320, 0, 1e9, 16), speed.Cost(2, 1000.0, 1.0)
    assert speed.milliseconds(cost, work, 1.0, 0.0) == pytest.approx(16 * 10 * 1000 / 1e6)
    assert speed.milliseconds(cost, work, 2.0, 500.0) == pytest.approx(16 * (10 * 1000 + 250) / 2e6)
    masked = speed.Work(132, 1320, 330, 1e9, 16)
    assert speed.milliseconds(speed.Cost(1, 1000.0, 600.0), masked, 1.0, 0.0) == pytest.approx(16 * (2500 + 7.5 * 600) / 1e6)
    slow, fast = (
        speed.predict("flash_forward", 64, Config(128, 64, 8, 3), speed.Cost(2, c, c), None) for c in (2000.0, 1000.0)
    )
    assert fast == pytest.approx(2 * slow, rel=0.02)


def test_measured_rates_are_found_by_configuration() -> None:
    assert speed.measured("flash_forward", 64, Config(128, 64, 8, 3)) == pytest.approx(462, abs=2)
    assert speed.measured("sparse_forward", 64, Config(64, 64, 4, 2)) == pytest.approx(60, abs=2), "radius 7, not 15"
    assert speed.measured("sparse_forward", 64, Config(64, 64, 4, 2, descriptors=True)) == pytest.approx(75, abs=2)
    assert speed.measured("flash_forward", 64, Config(128, 64, 8, 3, descriptors=True)) == 0
    assert speed.both(8.0, 6.0) == 5
    assert speed.both(8.0, 0.0) == 0


def test_kernels_without_a_rate() -> None:
    code = sass.read((LOOPS / "flash_forward_64.sass").read_text(encoding="utf-8"))
    config = Config(128, 64, 8, 3)
    assert speed.look(code, "flash_forward", 64, config, 121, 65536).predicted == pytest.approx(450, rel=0.1)
    assert speed.look(code, "flash_forward", 64, Config(128, 64, 4, 3, gluon=True), 121, 65536).predicted == 0
    assert speed.look(code, "cross_entropy_forward", 64, config, 121, 65536) == speed.Look()
    assert speed.look(code[:3], "flash_forward", 64, config, 121, 65536).problems == ("no loop of warpgroup products",)


def test_two_stages_of_descriptors_are_exposed() -> None:
    code = loop("UTMALDG.4D [UR8], [UR4]", FIRST, MORE, wait(0), *FLOAT)
    two, three = (speed.look(code, "flash_forward", 64, Config(128, 64, 8, s, descriptors=True), 128, 65536) for s in (2, 3))
    assert two == speed.Look((speed.EXPOSED,))
    assert three == speed.Look(), "no rate: the model does not time what a descriptor copies"


def test_operands_that_a_loop_writes_over() -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
    for written, wrong in (("FADD R90, R1, R2", True), ("FADD R92, R1, R2", False), ("LDS.128 R88, [R1]", True)):
        code = loop(product, wait(0), *FLOAT, written)
        assert (speed.OVERWRITTEN in speed.look(code, "flash_forward", 64, Config(128, 64, 8, 3), 128, 65536).problems) == wrong
    fresh = loop(
        "F2FP.BF16.F32.PACK_AB R88, R1, R2", "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0", wait(0), *FLOAT
    )
    found = speed.look(fresh, "flash_forward", 64, Config(128, 64, 8, 3), 128, 65536).problems
    assert speed.OVERWRITTEN not in found, "written before it is read"


@dataclass(frozen=True)
class Row:
    """What the second table needs."""

    kernel: str
    size: int
    predicted: float
    measured: float = 0.0
    config: tuple[int, int, int, int] = (128, 64, 8, 3)


def test_the_second_table() -> None:
    rows = [
        Row("flash_forward", 64, 450.0, 461.9), Row("flash_forward", 192, 400.0), Row("decode", 64, 0.0),
        Row("flash_backward_keys", 64, 400.0, 480.0), Row("flash_backward_queries", 64, 600.0, 540.0),
        Row("sparse_forward", 96, 50.0),
    ]  # fmt: skip
    text = "\n".join(speed.lines(rows))
    error = speed.calibration()["error"]
    assert f"±{error['dense']['p80']:.0%} dense and ±{error['sparse']['p80']:.0%} sparse (80% of the rows" in text
    forward, keys, _, sparse, pair = text.splitlines()[-5:]
    assert forward.split()[:7] == [
        "flash_forward",
        "64",
        "128,64,8,3",
        "450",
        "±",
        f"{450 * error['dense']['p80']:.0f}",
        "461.9",
    ]
    assert "FA3 473" in forward
    assert "FA3" not in keys
    assert sparse.split()[3:] == ["50", "±", f"{50 * error['sparse']['p80']:.0f}"]
    assert pair.split()[:8] == ["both,", "as", "5", "products", "64", "333", "±", f"{1000 / 3 * error['dense']['p80']:.0f}"]
    assert "FA3 432" in pair
    assert " 192 " not in text
    assert not list(speed.lines([Row("decode", 64, 0.0)]))
