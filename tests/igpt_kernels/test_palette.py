"""The palette contract, held for all 16,777,216 colours; then shapes, strides, dtypes, errors, files and copies."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from igpt_kernels import PaletteTable, palette_lookup
from igpt_kernels.reference import palette_lookup_reference, palette_table_reference

COLOURS = 1 << 24


def _random(size: int, low: float = 0, high: float = 255, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (size, 3))


def _clusters(size: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = rng.uniform(0, 255, (5, 3))
    return centres[rng.integers(0, 5, size)] + rng.normal(0, 6, (size, 3))


def _grid(levels: int) -> np.ndarray:
    steps = np.linspace(0, 255, levels)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)


def _sphere(size: int) -> np.ndarray:
    around = np.random.default_rng(2).normal(size=(size, 3))
    return 128 + 100 * around / np.linalg.norm(around, axis=1, keepdims=True)


def _permutations_around(centre: float) -> np.ndarray:
    """48 integer colours at exactly the same distance from the grey colour `centre`: nothing but ties there."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    orders = [[10, 20, 30], [10, 30, 20], [20, 10, 30], [20, 30, 10], [30, 10, 20], [30, 20, 10]]
    return np.concatenate([centre + signs * np.array(order) for order in orders])


def _with_duplicates() -> np.ndarray:
    few = _random(6, seed=3).round()
    return few[np.random.default_rng(4).integers(0, 6, 24)]


def _last_bits_apart() -> np.ndarray:
    """Colours that differ by one unit in the last place: many evaluated distances tie, where the true ones do not."""
    colors = np.repeat(_random(4, seed=5), 4, axis=0)
    for step in range(1, 4):
        colors[step::4, step - 1] = np.nextafter(colors[step::4, step - 1], np.inf)
    return colors[::-1].copy()


PALETTES: dict[str, Callable[[], np.ndarray]] = {
    "random_2": lambda: _random(2),
    "random_3_integers": lambda: _random(3, seed=6).round(),
    "random_16": lambda: _random(16),
    "random_64": lambda: _random(64),
    "random_512": lambda: _random(512),
    "integers_40": lambda: _random(40, seed=7).round(),
    "multiples_of_2**-16": lambda: np.round(_random(32, seed=8) * 65536) / 65536,
    "float32_24": lambda: _random(24, seed=9).astype(np.float32),
    "clusters_64": lambda: _clusters(64),
    "one_tight_cluster_16": lambda: 77.3 + 1e-3 * _random(16),
    "duplicates_24": _with_duplicates,
    "all_equal_5": lambda: np.full((5, 3), 31.5),
    "last_bits_apart_16": _last_bits_apart,
    "grid_2x2x2": lambda: _grid(2),
    "grid_3x3x3": lambda: _grid(3),
    "grid_4x4x4_descending": lambda: _grid(4)[::-1].copy(),
    "greys_18": lambda: np.repeat(np.arange(0, 256, 15.0)[:, None], 3, 1),
    "equidistant_48": lambda: _permutations_around(127),
    "sphere_40": lambda: _sphere(40),
    "partly_outside_24": lambda: _random(24, -300, 600, seed=10),
    "far_outside_32": lambda: 1000 + 10 * _random(32, -1, 1, seed=11),
    "farthest_allowed_8": lambda: 2.0**20 * (_grid(2) / 127.5 - 1),
}


@pytest.fixture(scope="module")
def all_colours() -> Tensor:
    """uint8 [2²⁴, 3] in the order of the table."""
    number = torch.arange(COLOURS, dtype=torch.int32)
    return torch.stack([number >> 16 & 255, number >> 8 & 255, number & 255], -1).to(torch.uint8)


def _report(got: Tensor, wanted: Tensor, colors: np.ndarray) -> str:
    wrong = (got != wanted).nonzero().flatten()
    first = int(wrong[0])
    red, green, blue = first >> 16, first >> 8 & 255, first & 255
    answers = f"{int(got[first])}, not {int(wanted[first])}, of {len(colors)}"
    return f"{len(wrong)} colours differ; ({red}, {green}, {blue}) gives {answers}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PALETTES)
def test_every_colour_agrees_with_the_reference(name: str, all_colours: Tensor) -> None:
    colors = PALETTES[name]()
    wanted = palette_table_reference(torch.as_tensor(colors, dtype=torch.float64))
    for backend in ("ext", "torch"):
        got = PaletteTable(colors, backend=backend).lookup(all_colours)
        assert torch.equal(got, wanted), f"{backend}: {_report(got, wanted, colors)}"


LARGE: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "grid_8x8x8": (lambda: _grid(8), 1 << 18),
    "halves_4096": (lambda: np.concatenate([_random(2048, seed=12), _clusters(2048)]), 1 << 15),
    "halves_65536": (lambda: np.concatenate([_random(32768, seed=12), _clusters(32768)]), 1 << 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_palettes_agree_on_every_colour(name: str, all_colours: Tensor) -> None:
    make, sample = LARGE[name]
    colors = make()
    got = PaletteTable(colors, backend="ext").lookup(all_colours, dtype=torch.int32)
    other = PaletteTable(colors, backend="torch").lookup(all_colours, dtype=torch.int32)
    assert torch.equal(got, other), _report(got, other, colors)
    some = torch.randint(0, COLOURS, (sample,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(got[some].long(), palette_lookup_reference(all_colours[some], torch.as_tensor(colors)))
    assert int(got.max()) > 0.9 * len(colors)  # indices beyond int16 are met where there are such


def test_the_two_references_agree() -> None:
    colors = torch.as_tensor(_permutations_around(40))
    pixels = torch.randint(0, 256, (5000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    number = pixels.long() @ torch.tensor([1 << 16, 1 << 8, 1])
    assert torch.equal(palette_lookup_reference(pixels, colors), palette_table_reference(colors)[number])


def test_the_references_do_what_the_contract_says() -> None:
    """Python floats are float64: the definition, word by word, for one pixel at a time."""
    colors = _last_bits_apart().tolist()
    pixels = [(0, 0, 0), (255, 255, 255), (12, 200, 99), (163, 70, 11)]
    wanted = []
    for r, g, b in pixels:
        distances = [(r - red) ** 2 + (g - green) ** 2 + (b - blue) ** 2 for red, green, blue in colors]
        wanted.append(distances.index(min(distances)))
    got = palette_lookup_reference(torch.tensor(pixels, dtype=torch.uint8), torch.tensor(colors, dtype=torch.float64))
    assert got.tolist() == wanted


BACKENDS = ("ext", "torch", "reference")


def _layouts() -> dict[str, tuple[Tensor, int]]:
    """Pixels in every order of memory, and where their channels are."""
    images = torch.randint(0, 256, (2, 9, 11, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    storage = torch.randint(0, 256, (2000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return {
        "contiguous": (images, -1),
        "one_pixel": (images[0, 0, 0], 0),
        "one_row": (images[0, :1], -1),
        "chw": (images.movedim(-1, 1).contiguous(), 1),
        "chw_negative_dim": (images.movedim(-1, 1).contiguous(), -3),
        "chw_view_of_hwc": (images.movedim(-1, 1), 1),
        "hwc_view_of_chw": (images.movedim(-1, 0).contiguous().movedim(0, -1), -1),
        "channels_first_of_all": (images.movedim(-1, 0).contiguous(), 0),
        "bgr_order_of_dims": (images.permute(3, 2, 0, 1), 0),
        "transposed": (images.transpose(1, 2), -1),
        "cropped": (images[:, 2:7, 3:10], -1),
        "every_other_pixel": (images[:, ::2, ::3], -1),
        "storage_offset": (storage[7 : 7 + 300].view(10, 10, 3), -1),
        "four_channel_rows": (storage[:1600].view(20, 20, 4)[..., :3], -1),
        "expanded": (images[:1].expand(4, 9, 11, 3), -1),
        "grey_as_rgb": (images[..., :1].expand(2, 9, 11, 3), -1),
        "overlapping": (storage.as_strided((6, 50, 3), (10, 1, 2)), -1),
        "no_images": (images[:0], -1),
        "no_columns": (images[:, :, :0], -1),
        "six_dimensions": (images.view(1, 2, 9, 1, 11, 3), -1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", _layouts())
def test_layouts(layout: str, backend: str) -> None:
    pixels, channel_dim = _layouts()[layout]
    colors = torch.as_tensor(_random(40))
    before = pixels.clone()
    got = PaletteTable(colors, backend=backend).lookup(pixels, channel_dim=channel_dim)
    wanted = palette_lookup_reference(pixels.movedim(channel_dim, -1).contiguous(), colors)
    assert torch.equal(got, wanted)
    assert got.is_contiguous()
    assert torch.equal(pixels, before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.uint8, 256), (torch.int16, 32768), (torch.uint16, 65536), (torch.int32, 65536), (torch.int64, 65536)],
    ids=["uint8", "int16", "uint16", "int32", "int64"],
)
def test_every_dtype_holds_the_largest_palette_it_may(dtype: torch.dtype, size: int, backend: str) -> None:
    if backend == "reference":
        size = 256  # 65,536 colours one after another take seconds
    colors = np.full((size, 3), 200.0)
    colors[-1] = 10
    table = PaletteTable(colors)
    pixels = torch.tensor([[200, 201, 199], [9, 10, 11]] * 3, dtype=torch.uint8)
    tokens = palette_lookup(pixels, table, dtype=dtype, backend=backend)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, size - 1] * 3


def test_a_dtype_too_small_for_the_palette_is_refused() -> None:
    pixels = torch.zeros(4, 3, dtype=torch.uint8)
    for size, dtype in ((257, torch.uint8), (32769, torch.int16)):
        with pytest.raises(ValueError, match=rf"at most {size - 1} colors, the palette has {size}"):
            PaletteTable(np.zeros((size, 3))).lookup(pixels, dtype=dtype)


def test_many_callers_and_pixels_beyond_one_share_of_work() -> None:
    """Shares of work begin in the middle of rows, and rows in the middle of shares."""
    images = torch.randint(0, 256, (3, 211, 307, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    cropped = images[:, 1:-1, 5:-3]
    table = PaletteTable(_random(300))
    wanted = palette_lookup(cropped, table, backend="torch")
    found: list[Tensor] = []
    callers = [threading.Thread(target=lambda: found.append(table.lookup(cropped))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(tokens, wanted) for tokens in found)
    assert torch.equal(palette_lookup(images.movedim(-1, 0).movedim(0, -1), table), palette_lookup(images, table))


@pytest.mark.parametrize(
    ("colors", "error", "words"),
    [
        ([[0, 0, 0]], ValueError, r"2 <= V <= 65536, got \[1, 3\]"),
        (np.zeros((65537, 3)), ValueError, r"2 <= V <= 65536, got \[65537, 3\]"),
        (np.zeros((4, 4)), ValueError, r"shape \[V, 3\] .* got \[4, 4\]"),
        (np.zeros((2, 2, 3)), ValueError, r"got \[2, 2, 3\]"),
        ([], ValueError, r"got \[0\]"),
        ([[0, 0, 0], [1, math.nan, 1]], ValueError, r"finite.*colors\[1, 1\] is nan"),
        ([[0, 0, 0], [1, 1, -math.inf]], ValueError, r"colors\[1, 2\] is -inf"),
        ([[0, 0, 0], [1e9, 1, 1]], ValueError, r"0\.\.255 scale.*colors\[1, 0\] is 1000000000"),
        ("red", TypeError, r"colors must be real numbers \[V, 3\], got an array of <U3"),
        ([[0, 0, 0], [1, 1]], TypeError, r"colors must be numbers \[V, 3\].*inhomogeneous"),
        (None, TypeError, "got an array of object"),
        (np.zeros((4, 3), bool), TypeError, "got an array of bool"),
        (np.zeros((4, 3), complex), TypeError, "got an array of complex128"),
        (torch.zeros(4, 3, dtype=torch.bool), TypeError, "got a tensor of torch.bool"),
        (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "got a tensor of torch.complex64"),
        (torch.zeros(3, 4), ValueError, r"got \[3, 4\]"),
    ],
)
def test_bad_colors(colors: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PaletteTable(colors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pixels", "options", "error", "words"),
    [
        (np.zeros((4, 3), np.uint8), {}, TypeError, "pixels must be a torch.Tensor, got ndarray"),
        (torch.zeros(4, 3), {}, TypeError, "pixels must have dtype uint8; got float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), {}, ValueError, r"size 3 .* in dimension -1, got shape \[3, 8, 8\]"),
        (torch.zeros(8, 3, dtype=torch.uint8), {"channel_dim": 0}, ValueError, "in dimension 0"),
        (torch.zeros(8, 3, dtype=torch.uint8), {"channel_dim": 2}, ValueError, "channel_dim=2 is no dimension"),
        (torch.zeros(8, 3, dtype=torch.uint8), {"channel_dim": -3}, ValueError, "channel_dim=-3 is no dimension"),
        (torch.tensor(3, dtype=torch.uint8), {}, ValueError, r"shape \[\]"),
        (torch.zeros(8, 3, dtype=torch.uint8), {"channel_dim": 1.0}, TypeError, "channel_dim must be an int, got 1.0"),
        (torch.zeros(8, 3, dtype=torch.uint8), {"dtype": torch.float32}, TypeError, "dtype must be one of uint8, int16"),
    ],
)
def test_bad_pixels(pixels: Tensor, options: dict[str, object], error: type[Exception], words: str, backend: str) -> None:
    table = PaletteTable(_random(8), backend=backend)
    with pytest.raises(error, match=words):
        table.lookup(pixels, **options)


def test_bad_table_and_backend() -> None:
    pixels = torch.zeros(4, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match="table must be a PaletteTable, got ndarray"):
        palette_lookup(pixels, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="backend must be auto, ext, torch, reference"):
        palette_lookup(pixels, PaletteTable(_random(4)), backend="cuda")
    with pytest.raises(ValueError, match="backend must be auto, ext, torch, reference"):
        PaletteTable(_random(4), backend="fast")


def test_colors_of_every_kind_keep_their_digits() -> None:
    rows = [[0.1, 0.2, 0.3], [255 / 7, -1e-9, 128.3]]
    wanted = np.array(rows)
    for colors in (rows, wanted, wanted.astype(">f8"), np.asfortranarray(wanted), torch.tensor(rows, dtype=torch.float64)):
        assert PaletteTable(colors).colors.tolist() == rows
    integers = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    for whole in (integers, integers.numpy().astype(np.uint16), integers.bfloat16().requires_grad_(), integers.T.clone().T):
        assert PaletteTable(whole).colors.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_colors_are_a_copy_both_ways() -> None:
    given = torch.tensor([[0.0, 0, 0], [255, 255, 255]], dtype=torch.float64)
    table = PaletteTable(given)
    given[0] = 255
    table.colors[1] = 0
    assert table.colors.tolist() == [[0, 0, 0], [255, 255, 255]]
    assert table.colors.dtype == torch.float64
    assert table.size == 2
    assert repr(table) == "PaletteTable(2 colors, backend='auto')"


def test_the_table_is_made_once() -> None:
    table = PaletteTable(_random(16), backend="torch")
    pixels = torch.zeros(1, 3, dtype=torch.uint8)
    table.lookup(pixels)
    first = dict(table._tables)
    table.lookup(pixels)
    assert {key: id(value) for key, value in first.items()} == {key: id(value) for key, value in table._tables.items()}
    assert len(first) == 1


def test_colors_of() -> None:
    colors = torch.as_tensor(_random(300))
    table = PaletteTable(colors)
    tokens = torch.tensor([[0, 299], [17, 3]])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint16):
        assert torch.equal(table.colors_of(tokens.to(dtype)), colors[tokens])
    assert table.colors_of(tokens[:0]).shape == (0, 2, 3)
    for bad, error, words in (
        (tokens + 1, ValueError, r"tokens must be in 0\.\.299 for a palette of 300 colors, got 1\.\.300"),
        (tokens - 1, ValueError, r"got -1\.\.298"),
        (tokens.float(), TypeError, r"tokens must have dtype int64.*got float32"),
        (tokens > 3, TypeError, r"tokens must have dtype int64.*got bool"),
        ([1, 2], TypeError, r"tokens must be a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=words):
            table.colors_of(bad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_of(backend: str) -> None:
    """Every size of the vectorised inner loop, both places of the channels, every integer dtype, strides."""
    colors = torch.as_tensor(_random(300))
    colors[0], colors[1] = torch.tensor([-3, 256.5, 0.5]), torch.tensor([1.5, 2.5, 254.5])
    wanted_colors = colors.round().clamp(0, 255).to(torch.uint8)
    assert wanted_colors[:2].tolist() == [[0, 255, 0], [2, 2, 254]]
    table = PaletteTable(colors, backend=backend)
    for shape in ((0,), (1,), (17,), (3, 5, 7), (2, 16, 16), (1, 0, 3)):
        tokens = torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(7))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint32):
            for channel_dim in (-1, 0, len(shape) - 2):
                pixels = table.pixels_of(tokens.to(dtype), channel_dim=channel_dim)
                wanted = wanted_colors[tokens].movedim(-1, channel_dim % (len(shape) + 1))
                assert torch.equal(pixels, wanted)
                assert pixels.is_contiguous()
    turned = torch.randint(0, 256, (9, 11), dtype=torch.uint8).T
    assert torch.equal(table.pixels_of(turned), wanted_colors[turned.long()])
    assert torch.equal(table.pixels_of(torch.tensor(5)), wanted_colors[5])
    for bad, options, error, words in (
        (tokens.new_tensor([3, 300, 5]), {}, ValueError, r"tokens must be in 0\.\.299 .* got 3\.\.300"),
        (tokens.new_tensor([-1, 4]), {}, ValueError, r"got -1\.\.4"),
        (tokens.float(), {}, TypeError, r"tokens must have dtype int64.*got float32"),
        (tokens, {"channel_dim": 4}, ValueError, "channel_dim=4 is no dimension"),
        (tokens, {"channel_dim": True}, TypeError, "channel_dim must be an int"),
    ):
        with pytest.raises(error, match=words):
            table.pixels_of(bad, **options)


def test_save_and_load(tmp_path: Path) -> None:
    table = PaletteTable(_random(33) - 0.1)
    path = tmp_path / "palette.safetensors"
    path.write_bytes(b"what was there before")
    table.save(path)
    loaded = PaletteTable.load(path, backend="torch")
    assert torch.equal(loaded.colors, table.colors)
    assert repr(loaded) == "PaletteTable(33 colors, backend='torch')"
    assert [entry.name for entry in tmp_path.iterdir()] == ["palette.safetensors"]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "palette.safetensors"
    PaletteTable(_random(4)).save(path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        PaletteTable(_random(5)).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "palette.safetensors"
    with pytest.raises(FileNotFoundError):
        PaletteTable.load(path)
    PaletteTable(_random(4)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x00" * 7, whole[:-1], whole[:20], b"\xff" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"palette.safetensors is not a safetensors file"):
            PaletteTable.load(path)
    save_file({"weights": torch.zeros(4, 3)}, path)
    with pytest.raises(ValueError, match=r'must hold "colors" \[V, 3\], and holds weights'):
        PaletteTable.load(path)
    save_file({"colors": torch.full((4, 3), torch.nan)}, path)
    with pytest.raises(ValueError, match=r"palette.safetensors: colors must be finite"):
        PaletteTable.load(path)


def _pickled(table: PaletteTable) -> PaletteTable:
    return pickle.loads(pickle.dumps(table))


@pytest.mark.slow
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, _pickled])
def test_copies_work_and_stay_small(way: Callable[[PaletteTable], PaletteTable]) -> None:
    table = PaletteTable(_random(20), backend="torch")
    pixels = torch.randint(0, 256, (50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    wanted = table.lookup(pixels)
    assert len(pickle.dumps(table)) < 5000
    assert torch.equal(way(table).lookup(pixels), wanted)
    assert repr(way(table)) == repr(table)


@pytest.mark.parametrize("backend", ["ext", "torch"])
def test_compiles_into_one_graph(backend: str) -> None:
    table = PaletteTable(_random(20), backend=backend)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    wanted = table.lookup(images, channel_dim=1)

    def tokens_plus_one(pixels: Tensor) -> Tensor:
        return table.lookup(pixels, channel_dim=1) + 1

    compiled = torch.compile(tokens_plus_one, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), wanted + 1)
