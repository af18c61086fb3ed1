"""Used sources and batches in DataLoader workers: forked, spawned, kept; and copies and pickles of them."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from igpt.data.array import ArraySource
from igpt.data.batches import TokenBatches
from igpt.data.open import open_source
from igpt.data.source import Source
from igpt.data.threads import Threads
from igpt.palette.palette import Palette
from tests.pictures import noise

SECONDS = 60  # a fork that inherited a dead pool waits for ever


class Items(Dataset[np.ndarray]):
    """What a user of torch writes around a source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source.tokens([index])[0] if self.source.kind == "tokens" else self.source.images([index], seed=7)[0]


class Steps(Dataset[torch.Tensor]):
    """Whole batches as items."""

    def __init__(self, batches: TokenBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.batches.batch(index)


def loaded(items: Dataset[Any], method: str, epochs: int = 1, workers: int = 2) -> list[torch.Tensor]:
    loader = DataLoader(
        items,
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=method,
        persistent_workers=epochs > 1,
        timeout=SECONDS,
        generator=torch.Generator().manual_seed(0),
    )
    return [torch.cat([torch.as_tensor(part) for part in loader]) for _ in range(epochs)]


def pictures(folder: Path) -> str:
    for i in range(7):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(noise(20, 30, i)).save(folder / "ab"[i % 2] / f"{i}.png")
    return str(folder)


def photos(folder: Path) -> Source:
    return open_source(f"photos:{pictures(folder)}", height=8, width=8, split="all", augment=True)


def classes(folder: Path) -> Source:
    return open_source(f"folder:{pictures(folder)}", height=8, width=8, split="all")


def digits(folder: Path) -> Source:
    return open_source("digits", split="val", val_fraction=0.005)


def archive(folder: Path) -> Source:
    """What CIFAR is once it is read."""
    return ArraySource("cifar10:x", np.stack([noise(32, 32, i) for i in range(5)]), np.arange(5), (), 16, 16)


def tokens(folder: Path) -> Source:
    np.save(folder / "x.npy", np.arange(160, dtype=np.uint8).reshape(10, 16))
    return open_source(f"tokens:{folder / 'x.npy'}", split="all")


OPENERS: list[Callable[[Path], Source]] = [photos, classes, digits, archive, tokens]


@pytest.mark.parametrize("opener", OPENERS)
def test_forked_workers(opener: Callable[[Path], Source], tmp_path: Path) -> None:
    with opener(tmp_path) as source:
        items = Items(source)
        wanted = torch.stack([torch.as_tensor(items[i]) for i in range(len(source))])
        for found in loaded(items, "fork", epochs=2):
            assert torch.equal(found, wanted)
        again = torch.stack([torch.as_tensor(items[i]) for i in range(len(source))])
        assert torch.equal(again, wanted), "the parent's threads go on"


@pytest.mark.parametrize("opener", OPENERS)
def test_pickles_and_copies_after_use(opener: Callable[[Path], Source], tmp_path: Path) -> None:
    """What spawn and forkserver do."""
    with opener(tmp_path) as source:
        wanted = torch.stack([torch.as_tensor(Items(source)[i]) for i in range(len(source))])
        for other in (pickle.loads(pickle.dumps(source)), copy.deepcopy(source), copy.copy(source)):
            with other:
                found = torch.stack([torch.as_tensor(Items(other)[i]) for i in range(len(source))])
            assert torch.equal(found, wanted)
            assert (other.name, len(other), other.classes) == (source.name, len(source), source.classes)


@pytest.mark.parametrize(("method", "opener"), [("spawn", photos), ("forkserver", tokens)])
def test_spawned_workers(method: str, opener: Callable[[Path], Source], tmp_path: Path) -> None:
    with opener(tmp_path) as source:
        items = Items(source)
        wanted = torch.stack([torch.as_tensor(items[i]) for i in range(len(source))])
        for found in loaded(items, method, epochs=2, workers=1):  # a worker imports torch for seconds
            assert torch.equal(found, wanted)


def test_batches_that_prepare_the_next_one(tmp_path: Path) -> None:
    """The thread that prepares a batch, and the lock that it holds, stay behind in the parent."""
    palette = Palette.uniform(8)
    with photos(tmp_path) as source, TokenBatches(source, palette, 3, seed=1) as batches:
        wanted = [batches.batch(step) for step in range(6)]
        batches.batch(0)  # the next one is being prepared
        with batches._threads.lock:
            found = loaded(Steps(batches), "fork", epochs=2)
        for other in (pickle.loads(pickle.dumps(batches)), copy.deepcopy(batches)):
            with other:
                assert torch.equal(other.batch(1), wanted[1])
    for part in found:
        assert torch.equal(part, torch.stack(wanted))


def test_a_worker_replaces_damage_as_the_parent_does(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"no")
    with open_source(f"photos:{tmp_path}", height=8, width=8, split="all", bad_images="skip") as source:
        wanted = source.images(range(len(source)))
        assert torch.equal(loaded(Items(source), "fork")[0], torch.from_numpy(wanted))
        assert source.skipped == 1


def _in_child(threads: Threads, sender: Any) -> None:
    with threads.lock:
        sender.send((threads.pool.submit(pow, 2, 5).result(SECONDS), threads.is_inherited))
    threads.close()


def test_threads_of_a_fork() -> None:
    threads = Threads(2, "test")
    assert threads.pool.submit(pow, 2, 3).result() == 8
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with threads.lock:
        child = context.Process(target=_in_child, args=(threads, sender))
        child.start()
        assert receiver.poll(SECONDS)
        assert receiver.recv() == (32, False)
    child.join(SECONDS)
    assert child.exitcode == 0
    threads.close()
    threads.close()
