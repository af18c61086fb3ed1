"""The CUDA palette on a GPU: the bits of the CPU, in every layout and dtype, on the right device and stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igpt_kernels import PaletteTable, palette_lookup
from igpt_kernels._native import load

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _loaded() -> None:
    """Tests that call an operator first need the library: they may be the first of a process."""
    load.status("cuda")


def _levels() -> Tensor:
    levels = torch.arange(256, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels)


def _random(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 255


def _palettes() -> dict[str, Tensor]:
    line = torch.linspace(0, 255, 300, dtype=torch.float64)[:, None].expand(300, 3)
    grid = torch.arange(0, 256, 17, dtype=torch.float64)
    return {
        **{f"random_{size}": _random(size) for size in (2, 3, 256, 257, 512, 4096, 65536)},
        "grid_of_2_to_minus_16": (_random(512, 1) * 65536).round() / 65536,
        "even_with_ties": torch.cartesian_prod(grid, grid, grid),
        "duplicates": _random(5).repeat(60, 1),
        "grey_line": line.contiguous(),
        "one_corner": 100 + _random(2000, 2) / 64,
        "outside": _random(300, 3) * 3 - 255,
        "all_equal": torch.full((700, 3), 127.5, dtype=torch.float64),
    }


def test_the_library_is_loaded() -> None:
    """Where this fails the rest of the file does: the message says what to do."""
    assert load.status("cuda").loaded, load.status("cuda").reason


@pytest.mark.parametrize("name", _palettes())
def test_the_table_has_the_bits_of_the_cpu(name: str) -> None:
    colors = _palettes()[name]
    on_gpu = torch.ops.igpt_kernels.palette_table(colors.cuda()).cpu()
    assert torch.equal(on_gpu.view(torch.int16), torch.ops.igpt_kernels.palette_table(colors).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
def test_every_colour_in_every_dtype(dtype: torch.dtype) -> None:
    table = PaletteTable(_random(256), backend="ext")
    pixels = _levels()
    tokens = table.lookup(pixels.cuda(), dtype=dtype)
    assert tokens.dtype == dtype
    assert torch.equal(tokens.cpu().to(torch.int64), table.lookup(pixels))


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 31, 32, 33, 4095, 4096, 4097])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8, 13])
def test_sizes_and_misaligned_memory(count: int, offset: int) -> None:
    """Pixels begin anywhere, tokens lie between guards, packed and planar."""
    table = PaletteTable(_random(200), backend="ext")
    memory = torch.randint(0, 256, (offset + 3 * count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    there = memory.cuda()
    entries = table._table("ext", there.device)
    for shape, channel_dim in (((count, 3), 1), ((3, count), 0)):
        wanted = table.lookup(memory[offset:].view(shape), channel_dim=channel_dim)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
            buffer = torch.full((64 + count + 64,), 77, dtype=dtype, device="cuda")
            for begin in (64, 63):
                buffer.fill_(77)
                tokens = buffer[begin : begin + count]
                torch.ops.igpt_kernels.palette_lookup(entries, there[offset:].view(shape), channel_dim, tokens)
                assert torch.equal(tokens.cpu().long(), wanted)
                assert bool((buffer[:begin] == 77).all())
                assert bool((buffer[begin + count :] == 77).all())


def _views(images: Tensor) -> dict[str, tuple[Tensor, int]]:
    planar = images.movedim(-1, 1).contiguous()
    return {
        "hwc": (images, -1),
        "chw": (planar, 1),
        "chw_of_hwc": (images.movedim(-1, 1), 1),
        "hwc_of_chw": (planar.movedim(1, -1), -1),
        "channels_first_of_all": (images.movedim(-1, 0).contiguous(), 0),
        "cropped": (images[:, 2:-3, 5:-1], -1),
        "cropped_planes": (planar[:, :, 1:, 1:-2], 1),
        "every_other": (images[:, ::2, 1::3], -1),
        "transposed": (images.transpose(1, 2), -1),
        "four_channels": (torch.cat([images, images[..., :1]], -1)[..., :3], -1),
        "expanded": (images[:1].expand(4, *images.shape[1:]), -1),
        "grey_as_rgb": (images[..., :1].expand(*images.shape), -1),
        "no_images": (images[:0], -1),
        "eight_dimensions": (images.view(1, *images.shape[:1], 1, *images.shape[1:3], 1, 3, 1).squeeze(-1), -1),
    }


@pytest.mark.parametrize("width", [48, 61])
@pytest.mark.parametrize("name", _views(torch.zeros(1, 6, 8, 3, dtype=torch.uint8)))
def test_layouts(name: str, width: int) -> None:
    images = torch.randint(0, 256, (3, 33, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    table = PaletteTable(_random(512), backend="ext")
    pixels, channel_dim = _views(images.cuda())[name]
    mine, their_dim = _views(images)[name]
    assert torch.equal(table.lookup(pixels, channel_dim=channel_dim).cpu(), table.lookup(mine, channel_dim=their_dim))
    tokens = table.lookup(mine, channel_dim=their_dim)
    for place in (-1, 0):
        assert torch.equal(table.pixels_of(tokens.cuda(), channel_dim=place).cpu(), table.pixels_of(tokens, channel_dim=place))


def test_a_batch_is_one_launch() -> None:
    from torch.profiler import ProfilerActivity, profile

    table = PaletteTable(_random(64), backend="ext")
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8).cuda()
    table.lookup(images, channel_dim=1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        table.lookup(images, channel_dim=1)
        torch.cuda.synchronize()
    launched = [event.name for event in seen.events() if "palette_lookup_kernel" in event.name]
    assert len(launched) == 1


def test_the_current_stream_is_used() -> None:
    """Pixels written late on another stream are seen, because the launch comes after them there."""
    table = PaletteTable(_random(64), backend="ext")
    wanted = torch.randint(0, 256, (1 << 20, 3), dtype=torch.uint8)
    table.lookup(wanted[:1].cuda())
    pixels = torch.zeros(1 << 20, 3, dtype=torch.uint8, device="cuda")
    source = wanted.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        pixels.copy_(source)
        tokens = table.lookup(pixels)
    stream.synchronize()
    assert torch.equal(tokens.cpu(), table.lookup(wanted))


def test_a_captured_graph_replays() -> None:
    table = PaletteTable(_random(64), backend="ext")
    pixels = torch.zeros(1000, 3, dtype=torch.uint8, device="cuda")
    table.lookup(pixels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = table.lookup(pixels)
    fresh = torch.randint(0, 256, (1000, 3), dtype=torch.uint8)
    pixels.copy_(fresh)
    graph.replay()
    assert torch.equal(tokens.cpu(), table.lookup(fresh))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_pixels_is_used() -> None:
    table = PaletteTable(_random(64), backend="ext")
    pixels = torch.randint(0, 256, (1000, 3), dtype=torch.uint8)
    with torch.cuda.device(0):
        tokens = table.lookup(pixels.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert tokens.device == torch.device("cuda:1")
    assert torch.equal(tokens.cpu(), table.lookup(pixels))


def test_more_than_2_to_31_bytes() -> None:
    count = (1 << 31) // 3 + 1000
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip(f"needs {6 * count >> 30} GiB of free memory")
    table = PaletteTable(_random(200), backend="ext")
    pixels = torch.zeros(count, 3, dtype=torch.uint8, device="cuda")
    last = torch.randint(0, 256, (5000, 3), dtype=torch.uint8)
    pixels[-5000:] = last.cuda()
    assert torch.equal(table.lookup(pixels, dtype=torch.uint8)[-5000:].cpu().long(), table.lookup(last))


def test_wrong_tokens_are_refused() -> None:
    table = PaletteTable(_random(200), backend="ext")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        tokens = torch.tensor([0, 199, 200, 3] * 9, device="cuda").to(dtype)
        with pytest.raises(ValueError, match=r"tokens must be in 0\.\.199 .* got 0\.\.200"):
            table.pixels_of(tokens)
    assert table.pixels_of(torch.tensor([199], device="cuda")).shape == (1, 3)


def test_auto_takes_the_library_and_torch_agrees() -> None:
    table = PaletteTable(_random(300))
    pixels = torch.randint(0, 256, (100, 100, 3), dtype=torch.uint8).cuda()
    tokens = table.lookup(pixels)
    assert ("ext", pixels.device) in table._tables
    assert torch.equal(tokens, palette_lookup(pixels, table, backend="torch"))


def test_operators_pass_opcheck() -> None:
    table = torch.ops.igpt_kernels.palette_table(_random(40).cuda())
    pixels = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8).cuda()
    tokens = torch.empty(2, 9, 11, dtype=torch.int64, device="cuda")
    torch.library.opcheck(
        torch.ops.igpt_kernels.palette_lookup.default, (table, pixels.permute(3, 1, 0, 2), 1, tokens.view(-1))
    )
    colors = torch.zeros(40, 4, dtype=torch.uint8, device="cuda")
    beyond = torch.zeros(1, dtype=torch.int32, device="cuda")
    tokens.zero_()
    torch.library.opcheck(torch.ops.igpt_kernels.palette_pixels.default, (colors, tokens, 99, torch.empty_like(pixels), beyond))


def test_operators_refuse_tensors_of_two_devices() -> None:
    table = torch.ops.igpt_kernels.palette_table(_random(40).cuda())
    pixels = torch.zeros(5, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        torch.ops.igpt_kernels.palette_lookup(table, pixels.cuda(), 1, torch.empty(5, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        torch.ops.igpt_kernels.palette_lookup(table, pixels, 1, torch.empty(5, dtype=torch.int64, device="cuda"))
