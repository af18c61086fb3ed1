"""The compiled library: loaded or not, why not, and what its operators guarantee about memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igpt_kernels import PaletteTable, backends, palette, palette_lookup
from igpt_kernels._native import load

load.status()  # loads the operators, whichever test runs first

COLORS = torch.rand(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 255
PIXELS = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_library_is_loaded() -> None:
    """Where this fails the rest of the file does: the message says what to do."""
    assert load.status().loaded, load.status().reason
    assert load.status().reason == ""
    assert load.status().path is not None
    load.require()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if nothing had been built, and nothing may be."""
    libraries = {device: tmp_path / path.name for device, path in load._LIBRARIES.items()}
    monkeypatch.setattr(load, "_LIBRARIES", libraries)
    monkeypatch.setattr(load, "_statuses", {})
    monkeypatch.setattr(load, "_tried_to_build", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IGPT_JIT", "0")


@pytest.mark.usefixtures("no_library")
def test_without_the_library_auto_is_torch_and_ext_is_refused() -> None:
    status = load.status()
    assert (status.loaded, status.path) == (False, None)
    assert "was not built" in status.reason
    assert "python3 setup.py build_ext --inplace" in status.reason
    with pytest.raises(RuntimeError, match="was not built"):
        load.require()

    table = PaletteTable(COLORS)
    tokens = table.lookup(PIXELS)
    assert {maker for maker, _ in table._tables} == {"torch"}
    assert torch.equal(tokens, palette_lookup(PIXELS, table, backend="reference"))
    with pytest.raises(ValueError, match=r"backend='ext'.*was not built"):
        palette_lookup(PIXELS, table, backend="ext")
    with pytest.raises(ValueError, match=r"PaletteTable cannot run with backend='ext'.*was not built.*IGPT_JIT=0 forbids"):
        PaletteTable(COLORS, backend="ext")
    assert table.pixels_of(tokens).shape == PIXELS.shape
    for op, size in (("decode_attention", 64), ("linear_cross_entropy", 512)):
        assert backends.select(op, "auto", (torch.zeros(2, 3),), size) == "torch"
        with pytest.raises(backends.BackendUnavailable, match=r"backend='ext'.*was not built"):
            backends.select(op, "ext", (torch.zeros(2, 3),), size)


def test_auto_is_ext_and_torch_by_name_never_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PaletteTable(COLORS)
    wanted = table.lookup(PIXELS)
    assert set(table._tables) == {("ext", torch.device("cpu"))}

    def refuse(*_: object) -> None:
        raise AssertionError("the extension was called")

    monkeypatch.setattr(torch.ops.igpt_kernels, "palette_table", refuse)
    monkeypatch.setattr(torch.ops.igpt_kernels, "palette_lookup", refuse)
    assert torch.equal(palette_lookup(PIXELS, table, backend="torch"), wanted)
    assert torch.equal(palette_lookup(PIXELS, PaletteTable(COLORS), backend="torch"), wanted)
    assert torch.equal(palette_lookup(PIXELS, PaletteTable(COLORS, backend="torch")), wanted)
    assert torch.equal(palette_lookup(PIXELS, table, backend="reference"), wanted)
    with pytest.raises(AssertionError, match="the extension was called"):
        table.lookup(PIXELS)


def test_ext_by_name_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match=r"backend='ext'.*device meta is not one of cpu, cuda"):
        PaletteTable(COLORS, backend="ext").lookup(PIXELS.to("meta"))
    assert PaletteTable(COLORS).lookup(PIXELS.to("meta")).shape == (40, 50)


@pytest.mark.usefixtures("no_library")
def test_a_library_that_does_not_load_says_why() -> None:
    broken = load._LIBRARIES["cpu"]
    broken.write_bytes(b"not a library")
    status = load.status()
    assert (status.loaded, status.path) == (False, broken)
    assert torch.__version__ in status.reason
    assert "python3 setup.py build_ext --inplace" in status.reason
    assert "\n" not in status.reason


def test_a_library_of_older_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load._OPERATORS, "cpu", (*load._OPERATORS["cpu"], "palette_dither"))
    status = load._load("cpu")
    assert not status.loaded
    assert "is out of date (it lacks palette_dither)" in status.reason


@pytest.mark.slow
def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, igpt_kernels; assert 'torch' not in sys.modules; import igpt_kernels._native.load; "
        "assert 'torch' not in sys.modules; igpt_kernels.PaletteTable; assert 'torch' in sys.modules; "
        "assert not igpt_kernels._native.load._statuses; assert 'palette_lookup' in dir(igpt_kernels)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(load.__file__).parents[2])


def test_an_unknown_name_is_an_attribute_error() -> None:
    import igpt_kernels

    with pytest.raises(AttributeError, match="has no attribute 'palette_loookup'"):
        _ = igpt_kernels.palette_loookup


@pytest.mark.slow
def test_the_library_uses_only_the_stable_abi() -> None:
    """A symbol of C++ torch (at::, c10::, torch::) would tie the library to one release."""
    nm = shutil.which("nm")
    assert nm is not None, "nm comes with every compiler"
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", load.status().path], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    assert not {name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)|Py|_Py", name)}
    assert {name for name in names if name.startswith("aoti_torch_")}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 2000])
def test_nothing_is_written_around_the_tokens(dtype: torch.dtype, count: int) -> None:
    table = torch.ops.igpt_kernels.palette_table(COLORS)
    guard = 64
    buffer = torch.full((guard + count + guard,), 123, dtype=torch.int64).to(dtype)
    pixels = PIXELS.view(-1, 3)[:count]
    torch.ops.igpt_kernels.palette_lookup(table, pixels, 1, buffer[guard : guard + count])
    assert set(buffer[:guard].tolist()) == {123}
    assert set(buffer[guard + count :].tolist()) == {123}
    assert buffer[guard : guard + count].tolist() == PaletteTable(COLORS).lookup(pixels).tolist()


def test_operators_check_what_memory_safety_needs() -> None:
    make, find = torch.ops.igpt_kernels.palette_table, torch.ops.igpt_kernels.palette_lookup
    for colors in (COLORS.float(), COLORS[:, :2], COLORS.T, COLORS[0], COLORS[:0], COLORS[::2]):
        with pytest.raises(RuntimeError, match="colors must be a contiguous float64 CPU tensor"):
            make(colors)
    table, tokens = make(COLORS), torch.empty(40, 50, dtype=torch.int64)
    for bad in (table[:-1], table.view(torch.int16), torch.zeros(1 << 25, dtype=torch.uint16)[::2]):
        with pytest.raises(RuntimeError, match="table must be"):
            find(bad, PIXELS, 2, tokens)
    for pixels, channel_dim in ((PIXELS.int(), 2), (PIXELS, 1), (PIXELS, 3), (PIXELS, -1), (PIXELS[..., :2], 2)):
        with pytest.raises(RuntimeError, match="pixels must be"):
            find(table, pixels, channel_dim, tokens)
    for out in (tokens[1:], tokens.T, torch.empty(40, 100, dtype=torch.int64)[:, ::2], tokens.float()):
        with pytest.raises(RuntimeError, match="tokens must be"):
            find(table, PIXELS, 2, out)


def test_palette_pixels_checks_what_memory_safety_needs() -> None:
    colors, tokens = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    pixels, beyond = torch.zeros(6, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    run = torch.ops.igpt_kernels.palette_pixels
    for bad in (colors[:, :3], colors.int(), colors[::2], colors[:, None]):
        with pytest.raises(RuntimeError, match="colors must be"):
            run(bad, tokens, 1, pixels, beyond)
    for bad_tokens, bad_run in ((tokens, 0), (tokens, 4), (torch.zeros(12, dtype=torch.int64)[::2], 1)):
        with pytest.raises(RuntimeError, match="tokens must be a contiguous"):
            run(colors, bad_tokens, bad_run, pixels, beyond)
    with pytest.raises(RuntimeError, match="tokens must be uint8"):
        run(colors, tokens.float(), 1, pixels, beyond)
    for bad in (pixels[1:], pixels.int(), torch.zeros(6, 6, dtype=torch.uint8)[:, ::2]):
        with pytest.raises(RuntimeError, match="pixels must be"):
            run(colors, tokens, 1, bad, beyond)
    for bad in (beyond.long(), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="beyond must be"):
            run(colors, tokens, 1, pixels, bad)


@pytest.mark.slow
def test_operators_pass_opcheck() -> None:
    table = torch.ops.igpt_kernels.palette_table(COLORS)
    torch.library.opcheck(torch.ops.igpt_kernels.palette_table.default, (COLORS,))
    for pixels, channel_dim in ((PIXELS, 2), (PIXELS.permute(2, 1, 0), 0), (PIXELS[:0], 2)):
        count = pixels.numel() // 3
        tokens = torch.empty(count, dtype=torch.int64)
        torch.library.opcheck(torch.ops.igpt_kernels.palette_lookup.default, (table, pixels, channel_dim, tokens))
    colors, beyond = torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    pixels = torch.empty(2, 3, 5, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.igpt_kernels.palette_pixels.default, (colors, torch.ones(2, 5, dtype=torch.int64), 5, pixels, beyond)
    )


def test_the_cuda_library_needs_a_torch_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it is not even looked for, and the reason says what is missing."""
    monkeypatch.setattr(load, "_statuses", {})
    monkeypatch.setattr(torch.version, "cuda", None)
    status = load.status("cuda")
    assert not status.loaded
    assert status.reason == f"torch {torch.__version__} has no CUDA; install one that has"
    load._statuses.clear()
    monkeypatch.setattr(torch.version, "hip", "7.0.2")
    assert load.status("cuda").reason == f"the CUDA library is for NVIDIA GPUs, torch {torch.__version__} is for ROCm"


@pytest.mark.usefixtures("no_library")
def test_cuda_tensors_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fine = load.ExtensionStatus(True, Path("x"), "")
    monkeypatch.setitem(load._statuses, "cpu", fine)
    with pytest.raises(ValueError, match=r"the CUDA library _C_cuda.abi3.so was not built; run `igpt info --build`"):
        palette._choose("ext", torch.device("cuda"), "palette_lookup")
    assert palette._choose("auto", torch.device("cuda"), "palette_lookup") == "torch"
    monkeypatch.setitem(load._statuses, "cuda", fine)
    assert palette._choose("auto", torch.device("cuda"), "palette_lookup") == "ext"
