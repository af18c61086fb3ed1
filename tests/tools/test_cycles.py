"""The cycle model gives what a hand computes for small loops, and what the calibration holds for a real one."""

from __future__ import annotations

import pytest

from tests.tools.test_sass import LOOPS, listing
from tools import cycles, sass, speed

BRANCH = "@P0 BRA 0x0"
"""The next iteration begins 10 cycles after it."""
PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R212, gdesc[UR24], R24, gsb0"
COPY = "LDGSTS.E.BYPASS.128 [R37], desc[UR24][R28.64]"


def period(*code: str, warps: int = 4, programs: int = 1) -> float:
    """Cycles of an iteration; every instruction stalls one cycle."""
    return cycles.iteration_cycles(sass.read(listing(*code, BRANCH)), warps, programs, iterations=10)


def test_issue() -> None:
    assert period(*["FFMA R1, R2, R3, R4"] * 10) == 10 + 10
    assert period(*["IADD3 R1, R2, R3, R4"] * 10) == 9 * 2 + 1 + 10, "half the lanes"
    assert cycles.iteration_cycles(sass.read(listing("FFMA R1, R2, R3, R4", BRANCH, control=0x7E6)), 4, 1) == 6 + 10, "stalls"


def test_a_pipe_is_shared() -> None:
    code = ["MUFU.EX2 R1, R2"] * 4
    assert period(*code) == 3 * 8 + 1 + 10
    assert period(*code * 4, programs=2) == pytest.approx(16 * 8, abs=1), "the pipe is never idle"
    assert period(*code * 4, warps=8) == pytest.approx(2 * 16 * 8, abs=1), "two warps of each quarter"


def test_a_scoreboard_holds_what_reads_it() -> None:
    def words(text: str, control: int) -> str:
        return listing(text, control=control)

    writes = 1 | 0 << 5 | 7 << 8  # stall 1, writes scoreboard 0
    waits = 1 | 7 << 5 | 7 << 8 | 1 << 11  # waits for scoreboard 0
    loop = [
        *sass.read(words("MUFU.EX2 R1, R2", writes)),
        *sass.read(words("FADD R1, R1, R1", waits)),
        *sass.read(words(BRANCH, 0x7E1)),
    ]
    assert cycles.iteration_cycles(loop, 4, 1) == 8 + 22 + 1 + 10


def test_products() -> None:
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert period(PRODUCT, wait) == 8 + 64 + 40 + 1 + 10, "queued after 8, 128 / 2 for a product, 40 to its waiter"
    assert period(PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1") == pytest.approx(64, abs=8), "overlapped with the next one"
    assert period(PRODUCT, wait, programs=2) < 123, "another program fills the gap"
    columns = {n: sass.decode(0, f"HGMMA.64x{n}x16.F32.BF16 R24, gdesc[UR8], R24", 0) for n in (16, 32, 64, 128)}
    assert [cycles.tensor_cycles(one) for one in columns.values()] == [20, 24, 32, 64], "narrow ones wait for shared memory"


def test_other_instructions_are_slower_beside_a_product() -> None:
    code = [PRODUCT, *["FFMA R1, R2, R3, R4"] * 100]
    assert period(*code) == 1 + 24 * 3 + 76 + 10, "24 of 100 issue three cycles apart, in the 72 of the product"


def test_copies() -> None:
    assert period(COPY, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0") == 550 + 1 + 10, "all of the latency"
    assert period(COPY, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1") == (550 + 1 + 10) / 2, "half, an iteration ahead"
    burst = period(*[COPY] * 32, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    assert burst == pytest.approx(32 * 512 / 12 + 550 / 2 + 11, abs=20), "the bandwidth"


def test_a_barrier_joins_the_warps_of_a_program() -> None:
    slow = ["MUFU.EX2 R1, R2"] * 8
    alone, joined = period(*slow, warps=8), period(*slow, "BAR.SYNC 0x0", warps=8)
    assert alone == pytest.approx(128, abs=1)
    assert joined == pytest.approx(120 + 8 + 20 + 10, abs=9), "the pipe is idle while both wait and begin again"


def test_resident_programs() -> None:
    assert cycles.resident(121, 65536, 8) == 2, "registers, in steps of 8 a thread"
    assert cycles.resident(64, 112 << 10, 4) == 2, "shared memory"
    assert cycles.resident(32, 0, 32) == 2, "warps"
    assert cycles.resident(255, 229376, 8) == 1


@pytest.mark.parametrize(
    ("name", "config"), [("flash_forward", [128, 64, 8, 3]), ("flash_backward_queries", [128, 64, 8, 3, 128])]
)
def test_the_calibration_is_of_this_model(name: str, config: list[int]) -> None:
    """A change of the model asks for ``python -m tools.calibrate``."""
    loop = sass.hot_loop(sass.read((LOOPS / f"{name}_64.sass").read_text(encoding="utf-8")))
    (row,) = [r for r in speed.calibration()["rows"] if (r["kernel"], r["head_dim"], r["config"]) == (name, 64, config)]
    assert speed.cost(loop, 121, 65536 if name == "flash_forward" else 81920, 8) == speed.Cost(2, row["cycles"], row["full"])
    work = speed.work(name, 64, 128, 64, "causal")
    fitted = speed.calibration()
    guess = speed.milliseconds(
        speed.Cost(2, row["cycles"], row["full"]), work, fitted["clock_ghz"]["dense"], fitted["start_cycles"]
    )
    assert abs(row["ms"] / guess - 1) <= fitted["error"]["dense"]["p80"]
