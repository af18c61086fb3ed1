"""Configurations: every shipped one is found and valid."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from igpt_kernels import tuning
from tools.kernels import KERNELS

TABLES = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))


def test_families_have_tables() -> None:
    assert {"sm_80", "sm_90", "sm_100", "default", "amd"} <= set(TABLES)
    assert {*tuning.FAMILIES.values(), tuning.AMD} <= set(TABLES)


def test_tables_of_amd_chips_name_nothing_that_their_compiler_does_not_know() -> None:
    tables = [table for table in TABLES if table.startswith(("amd", "gfx"))]
    assert tables
    for table in tables:
        assert tuning.measured(table) == {}
        for kernel, by_bits in tuning.table(table).items():
            for config in (config for sizes in by_bits.values() for config in sizes.values()):
                assert len(config.entry) == 4, (table, kernel, config)
                assert set(config.options) == {"num_warps", "num_stages"}
                assert config.num_warps * 64 <= 1024, "threads of a program"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_size_has_a_configuration(table: str, kernel: str) -> None:
    configs = tuning.table(table)
    assert set(configs) == set(KERNELS)
    largest = 256 if KERNELS[kernel].operation.name in ("attention", "sparse") else tuning.WIDEST
    for bits in (16, 32):
        for size in range(1, largest + 1):
            tuning.nearest(configs, kernel, bits, size)
    with pytest.raises(ValueError, match=f"head_dim {largest + 1}"):
        tuning.nearest(configs, kernel, 16, largest + 1)


def test_the_smallest_entry_that_fits_is_taken() -> None:
    small, large = tuning.Config(16, 16, 4, 1), tuning.Config(32, 32, 4, 1)
    configs = {"k": {"16": {"64": small, "128": large}}}
    assert [tuning.nearest(configs, "k", 16, d) for d in (1, 64, 65, 128)] == [small, small, large, large]
    assert tuning.lookup("decode", dtype=torch.float16, head_dim=64, device=torch.device("cpu")) == tuning.nearest(
        tuning.table("default"), "decode", 16, 64
    )


def test_entries_that_a_device_timed_are_entries() -> None:
    assert tuning.measured("default") == {}
    for table in TABLES:
        for kernel, sizes in tuning.measured(table).items():
            assert sizes <= {int(size) for size in tuning.table(table)[kernel]["16"]}
    bounded = tuning.table("sm_90")["flash_backward_keys"]["16"]["64"]
    assert bounded.options == {"num_warps": 4, "num_stages": 3, "maxnreg": 168}


@pytest.mark.parametrize("entry", [[128, 64, 8, 3], [64, 64, 4, 3, "descriptors"], [192, 64, 4, 2, 96, "whole_head", "gluon"]])
def test_an_entry_is_numbers_and_then_flags(entry: list[int | str]) -> None:
    config = tuning.Config.read(entry)
    assert config.entry == entry
    assert str(config) == ",".join(map(str, entry)).replace(",", "x", 1)
    assert [flag for flag in tuning.FLAGS if getattr(config, flag)] == [value for value in entry if isinstance(value, str)]
    for wrong, error in (([64, 64, 4], TypeError), ([*entry, "fast"], ValueError), ([64, 64, 4, 1, 8, 9], TypeError)):
        with pytest.raises(error, match=r"flags must be|four or five"):
            tuning.Config.read(wrong)


@pytest.mark.parametrize(
    "numbers", [(64, 128, 4, 2), (256, 128, 4, 2), (160, 64, 4, 2), (128, 32, 4, 2), (128, 128, 8, 2), (128, 128, 4, 1)]
)
def test_gluon_takes_the_tiles_it_has(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"with gluon block_m must be 128 or 192.*got " + ", ".join(map(str, numbers))):
        tuning.Config(*numbers, gluon=True)
    with pytest.raises(ValueError, match=r"block_m must be a power of two.*192"):
        tuning.Config(192, 64, 4, 2)


def test_bad_tables_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "odd.json").write_text(json.dumps({"kernels": {"k": {"16": {"64": [48, 64, 4, 1]}}}}))
    with pytest.raises(ValueError, match=r"block_m must be a power of two.*48"):
        tuning.table("odd")
    (tmp_path / "short.json").write_text(json.dumps({"kernels": {"k": {"16": {"64": [64, 64]}}}}))
    with pytest.raises(ValueError, match=r"short\.json"):
        tuning.table("short")


def test_a_device_takes_its_own_table_then_its_family_then_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for capability, name in (((9, 0), "sm_90"), ((8, 9), "default"), ((10, 3), "sm_100")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        tuning.table_for.cache_clear()
        assert tuning.table_for(torch.device("cuda:0")) == name
    (tmp_path / "nvidia-h200.json").write_text("{}")
    tuning.table_for.cache_clear()
    assert tuning.table_for(torch.device("cuda:0")) == "nvidia-h200"
    tuning.table_for.cache_clear()


def test_an_amd_device_takes_its_own_table_then_its_family_then_that_of_its_maker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def table(arch: str) -> str:
        found = SimpleNamespace(gcnArchName=arch)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        tuning.table_for.cache_clear()
        name = tuning.table_for(torch.device("cuda:0"))
        tuning.table_for.cache_clear()
        return name

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "hip", "7.0.2")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI250X/MI250")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))  # gfx90a: not a Hopper
    for arch in ("gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-", "gfx950", "gfx1201", ""):
        assert table(arch) == "amd"
    (tmp_path / "gfx942.json").write_text("{}")
    assert table("gfx942:sramecc+:xnack-") == "gfx942"
    assert table("gfx90a:sramecc+:xnack-") == "amd"
    (tmp_path / "amd-instinct-mi250x-mi250.json").write_text("{}")
    assert table("gfx942:sramecc+:xnack-") == "amd-instinct-mi250x-mi250"
    assert tuning.table_for(torch.device("cpu")) == "default"
