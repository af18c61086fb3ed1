"""What is read from the assembly of AMD kernels, on a text that is short enough to count in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools import amdgcn

TEXT = """
        s_load_dwordx4 s[4:7], s[0:1], 0x0
        buffer_load_dwordx4 v[0:3], v1, s[4:7], 0 offen
        buffer_load_dwordx2 v[4:5], v1, s[4:7], 0 offen
        global_load_dword v6, v[8:9], off
        v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
        v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
        scratch_store_dwordx4 off, v[0:3], s32
        global_store_dwordx4 v[8:9], v[0:3], off
        ds_read_b128 v[0:3], v4
        .amdhsa_next_free_vgpr 256
  - .agpr_count:     12
    .private_segment_fixed_size: 212
    .sgpr_spill_count: 9
    .vgpr_count:     268
    .vgpr_spill_count: 52
"""
USAGE = amdgcn.Usage(registers=268, accumulators=12, spills=52, scalar_spills=9, scratch=212, mfma=2, wide=2, narrow=2)


def test_usage_is_read_from_the_text() -> None:
    assert amdgcn.read(TEXT) == USAGE
    for name in ("vgpr_count", "private_segment_fixed_size"):
        with pytest.raises(ValueError, match=f"the assembly has no .{name}"):
            amdgcn.read(TEXT.replace(f".{name}", ".other"))


@pytest.mark.parametrize(
    ("registers", "warps", "programs"),
    [(268, 4, 1), (256, 4, 2), (256, 8, 1), (257, 8, 0), (128, 8, 2), (129, 4, 3), (24, 4, 8), (24, 16, 2), (0, 1, 32)],
)
def test_registers_limit_the_programs_of_a_compute_unit(registers: int, warps: int, programs: int) -> None:
    assert replace(USAGE, registers=registers).programs(warps) == programs


def test_scratch_memory_and_missing_matrix_instructions_are_problems() -> None:
    fine = replace(USAGE, spills=0, scratch=0)  # scalar registers spill to lanes of vector registers
    assert fine.problems(product=True) == []
    assert USAGE.problems(product=True) == ["52 registers spill, 212 bytes of scratch memory"]
    assert replace(fine, scratch=4).problems(product=False) == ["0 registers spill, 4 bytes of scratch memory"]
    assert replace(fine, mfma=0).problems(product=True) == ["no MFMA"]
    assert replace(fine, mfma=0).problems(product=False) == []


def test_a_kernel_that_moves_memory_moves_it_in_16_bytes_and_fits() -> None:
    mover = replace(USAGE, registers=64, wide=3)
    assert mover.mover_problems(4, 8, 8192, 65536) == []
    assert mover.mover_problems(4, 9, 4096, 65536) == ["9 programs of 64 registers and 4096 bytes do not fit on a compute unit"]
    assert "8 programs" in mover.mover_problems(4, 8, 8193, 65536)[0]
    assert replace(mover, narrow=3).mover_problems(4, 1, 0, 65536) == ["3 of 6 loads and stores are narrow"]
