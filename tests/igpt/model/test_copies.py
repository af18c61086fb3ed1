"""Copies, pickles and processes of models with a used palette, and of palettes alone: equal, apart, and in plain mode."""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import igpt
from igpt.model.image_gpt import ImageGPT
from igpt.palette.palette import Palette
from tests.models import greys, random_model

TOKENS = torch.randint(0, 7, (2, 24), generator=torch.Generator().manual_seed(0))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)


def small() -> ImageGPT:
    torch.manual_seed(0)
    model = random_model(0.3, n_layer=2, n_head=2, n_embd=16, vocab_size=7, height=4, width=6)
    model.palette = greys(7)
    model.palette.encode(IMAGES)  # makes its table, under its lock
    return model


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model: ImageGPT) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda given: pickle.loads(pickle.dumps(given)),
    "save": saved,
}


@pytest.mark.parametrize("swap", [False, True], ids=["plain", "swapped"])
@pytest.mark.parametrize("how", [*COPIES, "average"])
def test_copies_of_models(how: str, swap: bool) -> None:
    model = small()
    expected = model(TOKENS).logits
    report = igpt.use_kernels(model, attention="torch", norm="torch", mlp="torch", loss="torch") if swap else None
    again = averaged(model) if how == "average" else COPIES[how](model)
    calls = report.calls("norm") if report is not None else 0
    torch.testing.assert_close(again(TOKENS).logits, expected)
    assert again.palette is not None
    assert torch.equal(again.palette.encode(IMAGES), model.palette.encode(IMAGES))
    assert torch.equal(igpt.sample(again, 2), igpt.sample(small(), 2))
    if report is not None:
        # A shallow copy shares the modules, and so their kernels. Others carry no swap.
        assert (report.calls("norm") > calls) == (how == "copy")
        report.restore()
    with torch.no_grad():
        again.wte.weight.mul_(2)
    torch.testing.assert_close(model(TOKENS).logits, again(TOKENS).logits if how == "copy" else expected)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_palettes(how: str) -> None:
    palette = Palette(greys(7).colors, height=4, width=6)
    tokens = palette.encode(IMAGES)
    for given in (palette, Palette.uniform(8)):  # with a table, and without
        again = COPIES[how](given)
        assert (again.colors == given.colors).all()
        assert (again.height, again.width) == (given.height, given.width)
        assert not again.colors.flags.writeable
        assert torch.equal(again.encode(IMAGES), given.encode(IMAGES))
    table = COPIES[how](palette.table)
    assert torch.equal(table.lookup(torch.from_numpy(IMAGES)).flatten(1), tokens)


def test_quantized_models_draw() -> None:
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for kernels in ("off", "torch"):
        with igpt.use_kernels(loss=kernels, norm=kernels, attention=kernels, mlp=kernels), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert quantized(TOKENS, TOKENS).loss.item() == pytest.approx(model(TOKENS, TOKENS).loss.item(), rel=0.05)
            assert igpt.sample(quantized, 2).shape == (2, 24)
            assert quantized.features(TOKENS).shape == (3, 2, 16)
    assert quantized.palette is not None


def work(rank: int, model: ImageGPT, folder: Path) -> None:
    """What a process of its own does with a model that it was sent; one of two ranks, of which the second has no image."""
    torch.set_num_threads(1)
    assert model.palette is not None
    drawn = igpt.sample(model, 1)
    tokens = model.palette.encode(IMAGES)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(model)
    given = tokens[: 0 if rank else 2]
    parallel(given, given).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    torch.save({"drawn": drawn, "tokens": tokens, "gradients": gradients}, folder / f"{rank}.pt")
    while not (folder / f"{1 - rank}.pt").exists():
        time.sleep(0.01)
    # Without destructors. That of gloo's group joins, with the GIL held, a thread that may wait for the GIL (torch 2.13).
    os._exit(0)


@pytest.mark.slow
def test_models_are_sent_to_processes_and_a_rank_without_images_waits_for_none(tmp_path: Path) -> None:
    model = small()
    torch.multiprocessing.start_processes(work, (model, tmp_path), nprocs=2, start_method="spawn")
    given = model.palette.encode(IMAGES)
    model(given, given).loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["drawn"], igpt.sample(model, 1))
        assert torch.equal(found["tokens"], given)
        for name, value in model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], value.grad / 2)
