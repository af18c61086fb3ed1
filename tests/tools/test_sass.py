"""Machine code is read as it is encoded: control bits, loops, pipes, products."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import sass

LOOPS = Path(__file__).parent / "loops"
"""Hot loops of shipped kernels for sm_90, from Triton 3.6.0: real encodings."""


def listing(*instructions: str, control: int = 0x7E1) -> str:
    """What cuobjdump would print for these instructions: each 16 bytes after the one before, all with the same control bits."""
    lines = []
    for i, text in enumerate(instructions):
        lines += [f" /*{16 * i:04x}*/ {text} ; /* 0x0000000000000000 */", f" /* 0x{control << 41:016x} */"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def forward() -> list[sass.Instruction]:
    return sass.read((LOOPS / "flash_forward_64.sass").read_text(encoding="utf-8"))


# Text and upper word as the assembler wrote them; stall, hint, scoreboards by hand from the bits.
@pytest.mark.parametrize(
    ("text", "upper", "expected"),
    [
        ("SHFL.BFLY PT, R88, R89, 0x2, 0x1f", 0x000E6400000E0000, (2, True, 1, None, (), "shared")),
        ("MUFU.EX2 R108, R108", 0x000EB00000000800, (8, True, 2, None, (), "mufu")),
        ("LDGSTS.E.BYPASS.128 [R37], desc[UR24][R28.64], !P0", 0x0003E8000C101C58, (4, True, None, 1, (), "copy")),
        ("@!P0 BRA 0x3460", 0x002FEA000383FFFF, (5, True, None, None, (1,), "control")),
        ("DEPBAR.LE SB0, 0x2", 0x000FC80000000000, (4, False, None, None, (), "control")),
        ("LDGDEPBAR", 0x000E280000000000, (4, True, 0, None, (), "control")),
    ],
)
def test_control_bits(text: str, upper: int, expected: tuple[object, ...]) -> None:
    one = sass.decode(0, text, upper)
    assert (one.stall, one.hint, one.writes, one.reads, one.waits, one.pipe) == expected


def test_what_an_instruction_says() -> None:
    branch, wait, first, more = (
        sass.decode(0x46C0, text, 0)
        for text in (
            "@!P0 BRA 0x3460",
            "DEPBAR.LE SB0, 0x2",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0",
            "HGMMA.64x128x16.F32.BF16 R24, R212, gdesc[UR24].tnspB, R24",
        )
    )
    assert (branch.predicate, branch.opcode, branch.target) == ("@!P0", "BRA", 0x3460)
    assert (wait.number, wait.target, wait.columns) == (2, None, 0)
    assert (first.columns, first.accumulator, first.starts, first.left_in_shared) == (64, "R24", True, True)
    assert (more.columns, more.accumulator, more.starts, more.left_in_shared) == (128, "R24", False, False)
    assert [sass.decode(0, text, 0).bits for text in ("LDG.E.128 R1, R2", "LDS.64 R1", "LDG.E R1", "LDG.E.U16 R1")] == [
        128,
        64,
        32,
        32,
    ]


def test_pipes_of_a_real_loop(forward: list[sass.Instruction]) -> None:
    """Of 128 x 64 at head dim 64: two products of 4 steps, 32 exponentials of scores and 2 of rows, 4 copies a thread."""
    assert len(forward) == 295
    assert sass.hot_loop(forward) == forward
    counts = sass.pipes(forward)
    assert (counts["tensor"], counts["mufu"], counts["copy"], counts["fp32"]) == (8, 34, 4, 104)
    assert sum(counts.values()) == 295
    assert not counts["other"]
    assert [len(product) for product in sass.products(forward)] == [4, 4]


def test_opcodes_are_classified() -> None:
    opcodes = "HGMMA.64x64x16 MUFU.EX2 FFMA IMAD.WIDE ISETP.GT UIADD3 R2UR LDS.128 LDL LDG.E LDGSTS.E BAR.SYNC S2R FMNMX NEW"
    pipes = "tensor mufu fp32 integer integer uniform uniform shared shared global copy control constant alu other"
    assert [sass.classify(opcode) for opcode in opcodes.split()] == pipes.split()


def test_the_loop_with_most_products_is_found() -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"
    code = [
        "MOV R1, R2", product, product, "MOV R3, R4", "@P0 BRA 0x10",  # 0x00: two products and a move
        product, product, "@P0 BRA 0x50",  # 0x50: two products, shorter
        product, "@P0 BRA 0x80",  # 0x80: one product
        "MOV R1, R2", "@P0 BRA 0xa0", "BRA 0xc0",  # without products; no way out
    ]  # fmt: skip
    instructions = sass.read(listing(*code))
    assert sass.loops(instructions) == [(1, 4), (5, 7), (8, 9)]
    assert [one.address for one in sass.hot_loop(instructions)] == [0x50, 0x60, 0x70]
    outer = sass.read(listing("MOV R1, R2", product, "@P0 BRA 0x10", "@P1 BRA 0x0"))
    assert sass.loops(outer) == [(1, 2)], "the innermost"
    assert sass.hot_loop(sass.read(listing("EXIT"))) == []


def test_branches_inside_are_taken_or_not() -> None:
    loop = sass.read(listing("@P0 BRA 0x20", "MOV R1, R2", "@P1 BRA 0x90", "@!P0 BRA 0x0"))
    assert [one.address for one in sass.path(loop)] == [0, 0x10, 0x20, 0x30]
    assert [one.address for one in sass.path(loop, jump=True)] == [0, 0x20, 0x30], "0x90 is outside, 0x0 the next iteration"


def test_products_are_told_apart_by_result_and_start() -> None:
    def one(register: str, rest: str) -> str:
        return f"HGMMA.64x64x16.F32.BF16 {register}, gdesc[UR8], {rest}"

    code = [one("R24", "RZ, !UPT"), one("R24", "R24"), one("R88", "R88"), one("R24", "RZ, !UPT"), one("R88", "R88")]
    assert [len(product) for product in sass.products(sass.read(listing(*code)))] == [2, 2, 1]


def test_what_is_no_machine_code_is_refused() -> None:
    with pytest.raises(ValueError, match="must be what cuobjdump -sass prints, got 'nothing'"):
        sass.read("nothing")
    with pytest.raises(ValueError, match="two words of encoding"):
        sass.read(listing("EXIT").splitlines()[0])
