"""Colour quantisation of photographs: this library, transformers, SciPy; and what making a table costs.

    pytest benchmarks/bench_palette.py --benchmark-only

The pixels are the two photographs that come with scikit-learn (2 · 427 · 640), the palette is 512 colours fitted to them. The
rate of transformers is that of the function its ImageGPTImageProcessor spends its time in, on the very arrays it is given.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import scipy
import sklearn
import torch
import transformers
from pytest_benchmark.fixture import BenchmarkFixture
from scipy.spatial import cKDTree
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_sample_images
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from transformers.models.imagegpt.image_processing_pil_imagegpt import color_quantize

from igpt_kernels import PaletteTable, palette_lookup
from igpt_kernels.reference import palette_lookup_reference

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = sorted({1, CORES})


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the block torch and NumPy's BLAS use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with threadpool_limits(limits=count, user_api="blas"):
        yield
    torch.set_num_threads(before)


@dataclass
class Bench:
    """The input, the right answer, and the rows of the table that is printed in the end."""

    images: Tensor  # uint8 [n, h, w, 3]
    colors: np.ndarray[Any, np.dtype[np.float64]]  # [512, 3]
    tokens: Tensor  # int64 [n, h, w]: the reference's answer
    rows: list[str] = field(default_factory=list)
    transformers_rate: dict[int, float] = field(default_factory=dict)  # pixels a second, by threads

    @property
    def pixels(self) -> int:
        return self.tokens.numel()

    def normalised(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [n·h·w, 3] in [-1, 1]: what transformers quantises."""
        scaled: np.ndarray[Any, np.dtype[np.float32]] = self.images.numpy().reshape(-1, 3) / np.float32(127.5)
        scaled -= 1
        return scaled

    def rate_of_transformers(self, threads: int) -> float:
        """The best of two runs with `threads` threads, measured once."""
        if threads not in self.transformers_rate:
            pixels, clusters = self.normalised(), self.colors / 127.5 - 1
            seconds = []
            with _threads(threads):
                for _ in range(2):
                    start = time.perf_counter()
                    color_quantize(pixels, clusters)
                    seconds.append(time.perf_counter() - start)
            self.transformers_rate[threads] = self.pixels / min(seconds)
        return self.transformers_rate[threads]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    photos = np.stack(load_sample_images().images)
    sample = photos.reshape(-1, 3)[::7].astype(np.float64)
    fitted = MiniBatchKMeans(512, random_state=0, n_init=1, max_iter=20).fit(sample).cluster_centers_
    colors = np.round(fitted * 65536) / 65536
    unique, place = np.unique(photos.reshape(-1, 3), axis=0, return_inverse=True)
    answer = palette_lookup_reference(torch.from_numpy(unique), torch.from_numpy(colors))
    tokens = answer[torch.from_numpy(place.reshape(-1))].reshape(photos.shape[:-1])
    state = Bench(torch.from_numpy(photos), colors, tokens)
    yield state
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        plugins.getplugin("terminalreporter").write_line("\n" + "\n".join(state.rows))


def _measure(benchmark: BenchmarkFixture, call: Callable[[], object], *, rounds: int, threads: int) -> list[float]:
    """The seconds of each round; the conditions go to extra_info."""
    with _threads(threads):
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=min(3, rounds - 1))  # type: ignore[no-untyped-call]
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np, scipy, sklearn)}
    machine = {"threads": threads, "cores": CORES, "processor": platform.processor() or platform.machine()}
    benchmark.extra_info.update(machine, python=platform.python_version(), **versions)
    assert benchmark.stats is not None
    return list(benchmark.stats.stats.data)


def _lookup_row(
    benchmark: BenchmarkFixture, bench: Bench, name: str, threads: int, call: Callable[[], object], rounds: int = 60
) -> None:
    """Time `call`, and set it against transformers in the same run and with as many threads."""
    seconds = _measure(benchmark, call, rounds=rounds, threads=threads)
    rate, median = bench.pixels / min(seconds), bench.pixels / statistics.median(seconds)
    ratio = rate / bench.rate_of_transformers(threads)
    benchmark.extra_info.update(pixels_per_s=rate, median_pixels_per_s=median, ratio_to_transformers=ratio)
    bench.rows.append(f"{name:<28} {threads} threads {rate / 1e6:9.2f} Mpixel/s {ratio:9.1f} x transformers")


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16], ids=["int64", "int32", "uint16"])
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_lookup_ext(benchmark: BenchmarkFixture, bench: Bench, layout: str, dtype: torch.dtype, threads: int) -> None:
    table = PaletteTable(bench.colors, backend="ext")
    images, channel_dim = (bench.images, -1) if layout == "hwc" else (bench.images.movedim(-1, 1).contiguous(), 1)
    assert torch.equal(table.lookup(images, channel_dim=channel_dim, dtype=dtype).long(), bench.tokens)
    name = f"ext {layout} {str(dtype).removeprefix('torch.')}"
    _lookup_row(benchmark, bench, name, threads, lambda: table.lookup(images, channel_dim=channel_dim, dtype=dtype))


@pytest.mark.parametrize("threads", THREADS)
def test_lookup_torch(benchmark: BenchmarkFixture, bench: Bench, threads: int) -> None:
    table = PaletteTable(bench.colors)
    assert torch.equal(palette_lookup(bench.images, table, backend="torch"), bench.tokens)
    _lookup_row(
        benchmark, bench, "torch hwc int64", threads, lambda: palette_lookup(bench.images, table, backend="torch"), rounds=20
    )


@pytest.mark.parametrize("threads", THREADS)
def test_lookup_transformers(benchmark: BenchmarkFixture, bench: Bench, threads: int) -> None:
    pixels, clusters = bench.normalised(), bench.colors / 127.5 - 1
    wrong = int((torch.from_numpy(color_quantize(pixels, clusters)) != bench.tokens.flatten()).sum())
    assert wrong < bench.pixels / 1000  # its a² - 2ab + b² rounds differently: near ties may go to another colour
    benchmark.extra_info["other_than_reference"] = wrong
    _lookup_row(benchmark, bench, "transformers", threads, lambda: color_quantize(pixels, clusters), rounds=1)


@pytest.mark.parametrize("threads", THREADS)
def test_lookup_kd_tree(benchmark: BenchmarkFixture, bench: Bench, threads: int) -> None:
    tree, pixels = cKDTree(bench.colors), bench.images.reshape(-1, 3).numpy().astype(np.float64)
    found = torch.from_numpy(tree.query(pixels)[1])
    assert (found != bench.tokens.flatten()).sum() < bench.pixels / 1000  # it knows no rule for ties
    _lookup_row(benchmark, bench, "scipy cKDTree", threads, lambda: tree.query(pixels, workers=threads), rounds=3)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("backend", "size"),
    [("ext", size) for size in (16, 64, 256, 512, 1024, 4096, 16384, 65536)] + [("torch", size) for size in (16, 512, 4096)],
)
def test_make_table(
    benchmark: BenchmarkFixture, bench: Bench, backend: Literal["ext", "torch"], size: int, threads: int
) -> None:
    colors = bench.colors if size == 512 else np.random.default_rng(0).uniform(0, 255, (size, 3))
    pixel = bench.images[0, 0, :1]

    def make() -> Tensor:
        return PaletteTable(colors, backend=backend).lookup(pixel)

    assert torch.equal(make(), palette_lookup_reference(pixel, torch.from_numpy(colors)))
    seconds = min(_measure(benchmark, make, rounds=5, threads=threads))
    benchmark.extra_info.update(colors=size)
    bench.rows.append(f"make table, {backend} V={size:<12} {threads} threads {1e3 * seconds:9.1f} ms")
