"""What is kept of layouts: bounded in bytes, right after it was dropped, free of modes, and safe between threads."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from igpt_kernels import block_sparse_attention, caches, layouts
from igpt_kernels._torch import sparse_plan
from igpt_kernels.block_lists import BlockLists
from igpt_kernels.caches import LIMIT, SHARED, Cache, bytes_of


@dataclass
class Two:
    a: torch.Tensor
    b: tuple[np.ndarray, ...]


def test_bytes_are_those_of_all_tensors() -> None:
    value = Two(torch.zeros(1000), (np.zeros(500), np.zeros(500)))
    assert 12_000 <= bytes_of(value) < 16_000
    assert bytes_of(torch.zeros(1000)[:1]) >= 4000, "a view holds all of its memory"
    assert 0 < bytes_of(None) < 1000


def test_the_oldest_goes_first() -> None:
    cache = Cache(11_000)
    for name in "abcd":
        cache.put(name, torch.zeros(500))
        assert cache.held <= 11_000
    assert cache.find("a") is not None
    cache.put("e", torch.zeros(500))
    assert cache.find("b") is None, "a was used since"
    assert cache.find("a") is not None
    cache.put("a", torch.zeros(1))
    assert cache.held == sum(bytes_of(torch.zeros(n)) for n in (500, 500, 500, 1))
    cache.forget(lambda key: key in "ae")
    assert len(cache) == 2
    cache.forget(lambda key: True)
    assert (cache.held, len(cache)) == (0, 0)


def test_one_value_above_the_limit_drives_nothing_out() -> None:
    """A plan that is made in a second must not cost the lists of a predicate, which take minutes."""
    cache = Cache(10_000)
    cache.put("small", torch.zeros(100))
    for name in ("large", "larger"):
        cache.put(name, torch.zeros(10_000))
        assert cache.find(name) is not None
        assert cache.find("small") is not None
    assert len(cache) == 2
    for number in range(100):
        cache.put(number, torch.zeros(500))
    assert cache.find("larger") is not None
    assert cache.held <= 10_000 + bytes_of(torch.zeros(10_000))


def test_sixty_layouts_keep_no_more_than_the_limit() -> None:
    """Before, they kept 1.55 GB."""
    q = torch.randn(1, 1, 4096, 8, requires_grad=True)
    texts = [f"{name}:{number}" for name in ("strided", "fixed") for number in range(26, 46)]
    texts += [f"local2d:{number}" for number in range(20)]
    for text in texts:
        block_sparse_attention(q, q, q, layouts.parse(text, 64, 64)).sum().backward()
        assert SHARED.held <= LIMIT


def test_what_was_dropped_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts.parse("local2d:2+column", 20, 20)
    q, k, v = (torch.randn(1, 2, 400, 8, requires_grad=True) for _ in range(3))
    wanted = torch.autograd.grad(block_sparse_attention(q, k, v, layout).square().sum(), (q, k, v))
    monkeypatch.setattr(SHARED, "limit", 20_000)  # less than lists and plans of one layout
    predicate = layouts.from_predicate(20, 20, layout._permits)
    outs = [block_sparse_attention(q, k, v, each).square().sum() for each in (layout, predicate)]
    del predicate
    SHARED.forget(lambda key: True)
    gc.collect()
    for out in outs:
        for mine, right in zip(torch.autograd.grad(out, (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(mine, right)


def test_predicates_are_freed() -> None:
    class Table:
        """What a function may hold: a mask of gigabytes."""

    table = Table()

    def sees(q: torch.Tensor, k: torch.Tensor, held: Table = table) -> torch.Tensor:
        return q - k < 5

    watched = weakref.ref(table)
    layout = layouts.from_predicate(8, 8, sees)
    both = (layout | layouts.row(8, 8)).prefix(40).with_tile(4, 4)
    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    block_sparse_attention(q, q, q, layout).sum().backward()
    assert both.pairs > 0
    assert len(layout.keys_of(9)) == 5
    del layout, both, table, sees
    gc.collect()
    assert watched() is None


def test_no_mode_of_the_caller_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layouts.local2d(12, 12, 2)
    modes = (FakeTensorMode(), torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"))
    for mode in modes:
        SHARED.forget(lambda key: True)
        with mode:
            assert layout.pairs > 0
            lists = layout.block_lists()
            plan = sparse_plan.plan(layout.key, 0)
        for tensor in (lists[0].q_keys, lists[0].masks, plan.bias, plan.queries):
            assert not isinstance(tensor, FakeTensor)
            assert not tensor.is_inference()
            assert tensor.device.type == "cpu"
        assert plan.bias.dtype == torch.float32


def test_an_error_of_the_function_comes_through() -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    layout = layouts.from_predicate(3, 3, wrong)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            layout.block_lists()


def test_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SHARED, "limit", 200_000)
    wanted = {side: layouts.local2d(side, side, 2).pairs for side in range(4, 24)}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for side in np.random.default_rng(seed).permutation(np.repeat(list(wanted), 3)).tolist():
                assert sum(part.pairs for part in layouts.local2d(side, side, 2).block_lists()) == wanted[side]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert SHARED.held == sum(size for _, size in SHARED._values.values()) <= 200_000


def _make(sender: Connection) -> None:
    sender.send(layouts.local2d(15, 15, 2).pairs)


def test_a_fork_while_a_thread_holds_the_lock() -> None:
    wanted = layouts.local2d(15, 15, 2).pairs
    SHARED.forget(lambda key: True)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with SHARED._lock:
        child = context.Process(target=_make, args=(sender,))
        child.start()
        assert receiver.poll(60), "the child waits for a lock that no thread will free"
    assert receiver.recv() == wanted
    child.join()


def test_lists_of_a_captured_graph_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reads their memory whenever it is replayed."""
    monkeypatch.setattr(layouts, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(BlockLists, "to", lambda self, device: self)
    layout = layouts.local2d(12, 12, 3)
    found = layouts.lists_on(layout.key, 64, 64, torch.device("cuda", 0))
    watched = weakref.ref(found[0])
    del found
    SHARED.forget(lambda key: True)
    gc.collect()
    assert watched() is not None
    layouts.lists_on(layout.key, 64, 64, torch.device("cpu"))
    assert len(layouts._captured) == 1


def test_a_quick_function_stays_in_its_thread() -> None:
    @caches.kept
    def apart(number: int) -> int:
        return threading.get_ident()

    def here(number: int) -> int:
        return threading.get_ident()

    quick = caches.kept(here, apart=False)
    assert apart(1) != threading.get_ident() == quick(1)
    assert apart(1) == apart(1)
    apart.cache_clear()
    quick.cache_clear()
