"""Patterns against definitions written out here, and block lists against the dense mask."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from igpt_kernels import block_lists, layouts
from igpt_kernels.block_lists import FULL, BlockLists, fit_tile
from igpt_kernels.layouts import SparseLayout
from tests.fuzz import check_refusal, hostile_values
from tests.hostile import at_most

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (8, 8), (16, 16), (5, 13), (17, 9), (1, 30), (30, 1), (32, 20)]
TEXTS = [
    "dense", "local2d:0", "local2d:3", "local2d:7", "row", "column", "row_column", "strided", "strided:5", "strided:128",
    "fixed:6,2", "fixed:16,8", "fixed:1,1", "local2d:2+column", "local2d:4&row_column", "strided:7+local2d:2",
    "local2d:3+fixed:10,3+column", "local2d:3&strided:6", "row+row", "local2d:2&column+row",
]  # fmt: skip

# Each pattern as a sentence about one query (y, x) = divmod(i, w) and one key (v, u) = divmod(j, w): Child et al. 2019,
# section 4.2, and the definitions of README and DESIGN.
Rule = Callable[[int, int, int, int, int, int], bool]
RULES: dict[str, Rule] = {
    "dense": lambda i, j, y, x, v, u: True,
    "local2d:0": lambda i, j, y, x, v, u: i == j,
    "local2d:3": lambda i, j, y, x, v, u: abs(y - v) <= 3 and abs(x - u) <= 3,
    "row": lambda i, j, y, x, v, u: y == v,
    "column": lambda i, j, y, x, v, u: x == u,
    "row_column": lambda i, j, y, x, v, u: y == v or x == u,
    "strided:5": lambda i, j, y, x, v, u: abs(i - j) <= 5 or (i - j) % 5 == 0,
    "fixed:6,2": lambda i, j, y, x, v, u: i // 6 == j // 6 or j % 6 in (4, 5),
    "local2d:2+column": lambda i, j, y, x, v, u: (abs(y - v) <= 2 and abs(x - u) <= 2) or x == u,
    "local2d:4&row_column": lambda i, j, y, x, v, u: abs(y - v) <= 4 and abs(x - u) <= 4 and (y == v or x == u),
    "local2d:2&column+row": lambda i, j, y, x, v, u: (abs(y - v) <= 2 and x == u) or y == v,
}


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (7, 3), (5, 8)])
@pytest.mark.parametrize("text", RULES)
def test_patterns_are_what_their_sentences_say(text: str, height: int, width: int, causal: bool) -> None:
    layout = layouts.parse(text, height, width, causal=causal)
    mask = layout.dense_mask()
    for i in range(height * width):
        for j in range(height * width):
            wanted = RULES[text](i, j, *divmod(i, width), *divmod(j, width)) and (j <= i or not causal)
            assert bool(mask[i, j]) == wanted, (i, j)
            assert bool(layout.permits(i, j)) == wanted


def test_the_stride_is_the_width_unless_said() -> None:
    assert torch.equal(layouts.strided(6, 7).dense_mask(), layouts.strided(6, 7, 7).dense_mask())
    assert torch.equal(layouts.fixed(6, 9).dense_mask(), layouts.fixed(6, 9, 9, 8).dense_mask())
    # "True row" is the first set of fixed, "true column" the second of strided, when the stride is the width.
    assert torch.equal((layouts.fixed(6, 9) & layouts.row(6, 9)).dense_mask(), layouts.row(6, 9).dense_mask())
    assert torch.equal((layouts.strided(6, 9) & layouts.column(6, 9)).dense_mask(), layouts.column(6, 9).dense_mask())


def tokens_of(first: int, tile: tuple[int, int], lists: BlockLists) -> Tensor:
    """Tokens of a tile, -1 where there is none."""
    i = torch.arange(tile[0] * tile[1])
    token = first + i // tile[1] * lists.pitch + i % tile[1]
    return torch.where((first % lists.pitch + i % tile[1] < lists.pitch) & (token < lists.tokens), token, -1)


def dense_counts(parts: tuple[BlockLists, ...], tokens: int) -> tuple[Tensor, Tensor]:
    """How often each pair stands in the lists by query, and in those by key: [T,T] each."""
    by_query, by_key = (torch.zeros(tokens, tokens, dtype=torch.int32) for _ in range(2))
    for lists in parts:
        bits = lists.bits()
        turned = replace(lists, masks=lists.key_masks, q_tile=lists.k_tile, k_tile=lists.q_tile).bits()
        assert torch.equal(turned, bits.transpose(1, 2))
        for counts, pointer, others, masks, mine, theirs in (
            (by_query, lists.q_ptr, lists.q_keys, lists.q_masks, lists.q_tile, lists.k_tile),
            (by_key, lists.k_ptr, lists.k_queries, lists.k_masks, lists.k_tile, lists.q_tile),
        ):
            across = -(-lists.pitch // mine[1])
            for tile in range(len(pointer) - 1):
                own = tokens_of(tile // across * mine[0] * lists.pitch + tile % across * mine[1], mine, lists)
                for entry in range(int(pointer[tile]), int(pointer[tile + 1])):
                    row, col = others[entry].tolist()
                    other = tokens_of(row * lists.pitch + col, theirs, lists)
                    number = int(masks[entry])
                    queries, keys = (own, other) if counts is by_query else (other, own)
                    seen = torch.ones(len(queries), len(keys), dtype=torch.bool) if number == FULL else bits[number]
                    assert seen.any(), "a listed pair of tiles has a visible pair"
                    assert number == FULL or not seen.all(), "a full pair of tiles needs no mask"
                    q, k = seen.nonzero(as_tuple=True)
                    assert (queries[q] >= 0).all()
                    assert (keys[k] >= 0).all()
                    counts.index_put_((queries[q], keys[k]), torch.ones(len(q), dtype=torch.int32), accumulate=True)
        assert len(torch.unique(lists.masks.flatten(1), dim=0)) == len(lists.masks), "equal masks are kept once"
    return by_query, by_key


def touched_pairs(lists: BlockLists) -> int:
    """Pairs of existing tokens in the listed pairs of tiles, tile by tile."""
    total = 0
    for tile in range(lists.q_tiles):
        first = tile // -(-lists.pitch // lists.q_tile[1]), tile % -(-lists.pitch // lists.q_tile[1])
        mine = existing(lists, first[0] * lists.q_tile[0], first[1] * lists.q_tile[1], lists.q_tile)
        for y, x in lists.q_keys[lists.q_ptr[tile] : lists.q_ptr[tile + 1]].tolist():
            total += mine * existing(lists, y, x, lists.k_tile)
    return total


def existing(lists: BlockLists, y: int, x: int, tile: tuple[int, int]) -> int:
    """How many tokens a tile has whose first one is in row y, column x."""
    rows, columns = torch.arange(y, y + tile[0])[:, None], torch.arange(x, x + tile[1])
    return int(((columns < lists.pitch) & (rows * lists.pitch + columns < lists.tokens)).sum())


def check_lists(layout: SparseLayout, block_m: int, block_n: int) -> None:
    dense = layout.dense_mask().int()
    by_query, by_key = dense_counts(layout.block_lists(block_m, block_n), layout.tokens)
    assert torch.equal(by_query, dense)
    assert torch.equal(by_key, dense)
    assert layout.pairs == int(dense.sum())
    for lists in layout.block_lists(block_m, block_n):
        assert lists.touched_pairs == touched_pairs(lists)
    query = random.Random(layout.key).randrange(layout.tokens)
    assert torch.equal(layout.keys_of(query), dense[query].nonzero()[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("text", TEXTS)
def test_lists_are_the_dense_mask(text: str, height: int, width: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"{text} {height} {width}")
    layout = layouts.parse(text, height, width, causal=causal)
    for few in (0, block_lists._FEW):  # with classes of tiles that lie alike, and without
        monkeypatch.setattr(block_lists, "_FEW", few)
        layouts.lists_of.cache_clear()
        for some in (layout, layout.prefix(rng.randint(1, height * width)), layout.with_tile(4, 16)):
            check_lists(some, rng.choice([16, 32, 64, 128]), rng.choice([16, 32, 64, 128]))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("local2d:4+local2d:12", 20),
        ("local2d:6", 16),
        ("fixed:40,9", 24),
        ("fixed:64,20", 24),
        ("strided:17", 12),
        ("strided:1", 9),
    ],
)
def test_lists_where_many_tiles_lie_alike(text: str, side: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles wholly inside of one box and outside of another; columns that some tiles have; lags that end where a tile does."""
    monkeypatch.setattr(block_lists, "_FEW", 0)
    layout = layouts.parse(text, side, side, causal=causal)
    for some in (layout, layout.with_tile(4, 4), layout.with_tile(2, 8)):
        layouts.lists_of.cache_clear()
        check_lists(some, 16, 16)


@pytest.mark.parametrize("seed", range(30))
def test_lists_of_random_predicates(seed: int) -> None:
    rng = random.Random(seed)
    height, width = rng.randint(1, 20), rng.randint(1, 20)
    tokens = height * width
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(seed)) < rng.choice([0.003, 0.1, 0.97])
    layout = layouts.from_predicate(height, width, lambda q, k: seen[q, k], causal=rng.random() < 0.7)
    assert torch.equal(layout.dense_mask(), seen & torch.ones(tokens, tokens).tril().bool() if layout.causal else seen)
    other = layouts.parse(rng.choice(["local2d:2", "row_column", f"fixed:{width},1"]), height, width, causal=layout.causal)
    for some in (layout, layout & other, other & layout, layout | other, other | layout):
        check_lists(some, rng.choice([16, 64]), rng.choice([16, 64]))
    assert torch.equal((layout | other).dense_mask(), layout.dense_mask() | other.dense_mask())
    assert torch.equal((layout & other).dense_mask(), layout.dense_mask() & other.dense_mask())


def test_pairs_and_densities() -> None:
    """Numbers that were derived elsewhere, by hand or by counting."""
    assert layouts.dense(6, 7).pairs == 42 * 43 // 2
    assert layouts.dense(6, 7).density == 1.0
    assert layouts.row(64, 64).pairs == 64 * 64 * 65 // 2
    assert layouts.column(64, 64).pairs == 64 * 64 * 65 // 2
    assert layouts.row_column(64, 64).pairs == 64 * 64 * 64
    assert round(layouts.local2d(64, 64, 7).pairs / 4096) == 100  # keys a query inside 64 x 64
    assert round(layouts.local2d(128, 128, 7).pairs / 16384) == 107
    for side, share in ((32, 0.092), (48, 0.062), (64, 0.046)):  # strided, both sets
        assert round(layouts.strided(side, side).density, 3) == share
    local = layouts.local2d(128, 128, 7)
    assert round(local.density / local.tile_density, 2) == 0.30  # of the pairs in 8 x 8 tiles of both
    strips = layouts.row(128, 128)
    assert strips.tile_density / strips.density < 1.5


def test_lists_of_an_image_of_65536_tokens_are_small() -> None:
    """No T x T tensor on the way: that would be 4 GiB."""
    for text in ("local2d:7", "row_column", "strided", "fixed", "local2d:7+column"):
        layout = layouts.parse(text, 256, 256)
        layouts.lists_of.cache_clear()
        tracemalloc.start()
        lists = layout.block_lists()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20, text
        assert sum(part.blocks for part in lists) < 40_000
        assert layout.block_lists() is lists, "lists are kept"
        assert all(len(part.masks) <= 16 for part in lists)


def test_tiles_keep_their_kind_and_fit_the_grid() -> None:
    assert [fit_tile((8, 8), n, 64, 64) for n in (16, 32, 64, 128)] == [(4, 4), (4, 8), (8, 8), (8, 16)]
    assert [fit_tile((1, 64), n, 256, 256) for n in (16, 64, 128)] == [(1, 16), (1, 64), (1, 128)]
    assert [fit_tile((64, 1), n, 256, 256) for n in (16, 64, 128)] == [(16, 1), (64, 1), (128, 1)]
    assert fit_tile((1, 64), 64, 10, 10) == (4, 16)
    assert fit_tile((64, 1), 64, 32, 32) == (32, 2)
    assert layouts.local2d(9, 9, 2).tile == (8, 8)
    assert layouts.local2d(9, 9, 2).with_tile(4, 16).tile == (4, 16)
    assert layouts.row(9, 9).tile == (1, 64)


def reach(*texts: str, side: int = 12) -> float:
    """The share of the causal triangle that stacked layers reach, the first layer first."""
    seen = torch.eye(side * side)
    for text in texts:
        seen = (layouts.parse(text, side, side).dense_mask().float() @ seen > 0).float()
    return float(seen.sum()) / (side * side * (side * side + 1) / 2)


def test_two_layers_reach() -> None:
    """Docs and README say which pairs of layers see all earlier pixels (docs/patterns.md)."""
    assert reach("strided", "strided") == 1.0
    assert reach("fixed:12,2", "fixed:12,2") == 1.0
    assert reach("row_column", "row_column") < 0.7
    assert reach("local2d:2", "local2d:2") < 0.5
    assert reach("row", "column") < 0.7
    # For fixed, the rows must come first (Child et al.; the other order sees summaries of unfinished rows).
    row = "row"
    summary = layouts.fixed(12, 12, 12, 2).dense_mask() & ~layouts.row(12, 12).dense_mask() | torch.eye(144).bool()
    first = layouts.parse(row, 12, 12).dense_mask().float()
    everything = torch.ones(144, 144).tril()
    before = (summary.float() @ first > 0).sum() / everything.sum()
    after = (first @ summary.float() > 0).sum() / everything.sum()
    assert before > 0.95 > after


def test_layouts_are_values() -> None:
    one, same = layouts.local2d(6, 7, 2), layouts.parse("local2d:2", 6, 7)
    assert one == same
    assert hash(one) == hash(same)
    assert one.key == same.key == str(one)
    assert one != layouts.local2d(6, 7, 3)
    for text in TEXTS:
        layout = layouts.parse(text, 16, 16)
        assert layouts.parse(layout.pattern.spec, 16, 16) == layout, "what is printed can be read"
    assert len({one, same, layouts.row(6, 7), one.prefix(5), layouts.local2d(6, 7, 2, causal=False), one.with_tile(4, 4)}) == 5
    assert one.prefix(42) is one
    for layout in (one, one | layouts.column(6, 7), one.prefix(9), one.with_tile(4, 8).prefix(9)):
        assert pickle.loads(pickle.dumps(layout)) == layout
        assert copy.deepcopy(layout) == layout
    predicate = layouts.from_predicate(6, 7, lambda q, k: k == 0)
    assert predicate == layouts.from_predicate(6, 7, predicate.pattern.fn)  # type: ignore[union-attr]
    assert predicate != layouts.from_predicate(6, 7, lambda q, k: k == 0)
    with pytest.raises(AttributeError):
        one.height = 3  # type: ignore[misc]


def test_a_mask_belongs_to_who_asked_for_it() -> None:
    table = torch.ones(12, 12, dtype=torch.bool)
    layout = layouts.from_predicate(3, 4, lambda q, k: table, causal=False)
    layout.dense_mask().fill_(False)
    assert table.all()


def test_a_layout_from_another_process_is_known_here() -> None:
    code = (
        "import pickle, sys; from igpt_kernels import layouts; sys.stdout.buffer.write(pickle.dumps(layouts.strided(3, 5, 4)))"
    )
    sent = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout
    layout = pickle.loads(sent)
    assert len(layout.block_lists()) == 2
    assert layout.pairs == int(layout.dense_mask().sum())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "pattern must be of dense"),
        ("sparkle", "sparkle"),
        ("local2d", "local2d takes 1 numbers, got 0"),
        ("local2d:1,2", "takes 1 numbers, got 2"),
        ("local2d:x", "local2d:x"),
        ("local2d:-1", "local2d:-1"),
        ("row+", "row+"),
        ("row:3", "row takes 0 numbers"),
        ("fixed:4,9", "c must be at most the stride, 4, got 9"),
        ("strided:0", "stride must be at least 1, got 0"),
        ("strided:1,2", "strided takes 0 to 1 numbers"),
    ],
)
def test_bad_patterns_are_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        layouts.parse(text, 8, 8)


def test_bad_arguments_are_named() -> None:
    layout = layouts.local2d(6, 7, 2)
    for kind, words, call in (
        (TypeError, "pattern must be a string, got int", lambda: layouts.parse(7, 8, 8)),  # type: ignore[arg-type]
        (TypeError, "radius must be an int, got float", lambda: layouts.local2d(6, 7, 2.0)),  # type: ignore[arg-type]
        (ValueError, "radius must be 0 or more, got -1", lambda: layouts.local2d(6, 7, -1)),
        (ValueError, "height must be at least 1, got 0", lambda: layouts.row(0, 7)),
        (TypeError, "width must be an int, got str", lambda: layouts.row(3, "7")),  # type: ignore[arg-type]
        (TypeError, "causal must be a bool, got int", lambda: layouts.row(3, 7, causal=1)),  # type: ignore[arg-type]
        (TypeError, r"fn must be a function of \(q, k\), got int", lambda: layouts.from_predicate(3, 3, 5)),  # type: ignore[arg-type]
        (TypeError, "bool tensor, got bool", lambda: layouts.from_predicate(3, 3, lambda q, k: True).dense_mask()),
        (TypeError, "got torch.int64 tensor", lambda: layouts.from_predicate(3, 3, lambda q, k: q + k).dense_mask()),
        (
            ValueError,
            "must give a tensor of shape",
            lambda: layouts.from_predicate(3, 3, lambda q, k: (q == q)[:2]).dense_mask(),
        ),
        (ValueError, "block_m must be 16, 32, 64 or 128, got 48", lambda: layout.block_lists(48)),
        (ValueError, "tokens must be at most 42, got 43", lambda: layout.prefix(43)),
        (ValueError, "rows must be a power of two, got 3", lambda: layout.with_tile(3, 8)),
        (ValueError, "from 16 to 128 tokens, got 2 x 4", lambda: layout.with_tile(2, 4)),
        (ValueError, "the same width, got 7 and 8", lambda: layout | layouts.row(6, 8)),
        (ValueError, "the same tokens, got 42 and 9", lambda: layout | layout.prefix(9)),
        (ValueError, "the same causal, got True and False", lambda: layout & layouts.row(6, 7, causal=False)),
        (TypeError, "combined with a layout, got int", lambda: layout | 3),  # type: ignore[operator]
        (ValueError, "k must lie from 0 to 41, got 42 to 42", lambda: layout.permits(0, 42)),
        (TypeError, "q must be an int or an integer tensor, got torch.float32", lambda: layout.permits(torch.ones(2), 0)),
        (TypeError, "q must be an int or an integer tensor, got str", lambda: layout.permits("0", 0)),  # type: ignore[arg-type]
        (ValueError, "query must be at most 41, got 42", lambda: layout.keys_of(42)),
    ):
        with pytest.raises(kind, match=words):
            call()


@pytest.mark.parametrize(
    "text",
    [
        "strided:1e30", "local2d:99999999999999999999", "local2d:" + "9" * 5000, "row+" * 5000 + "row", "row&" * 5000 + "row",
        "(" * 100_000 + "row" + ")" * 100_000, "(" * 40 + "row" + ")" * 40, "(" * 100_000, " " * 100_000, "row" * 100_000,
        "fixed:" + "1," * 100_000, "local2d:\x1b[31m", "row\n", "local2d:\u0663", "row+(", ")row(", "+", "&", "()", "row&+row",
        "row" + " " * 3000 + "x", "local2d:1" + " ," * 1500,
    ],
)  # fmt: skip
def test_patterns_of_strangers(text: str) -> None:
    """One line, soon; no matter what it says."""
    if text == "row\n":
        assert layouts.parse(text, 8, 8) == layouts.row(8, 8), "space around a pattern is welcome"
        return
    with at_most(2.0), pytest.raises(ValueError, match="pattern") as caught:
        layouts.parse(text, 64, 64)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "text", ["fixed:99999999,8", "fixed:99999999,99999998", "strided:99999999", "strided:64", "fixed:64,3"]
)
def test_strides_beyond_the_image(text: str, causal: bool) -> None:
    """The grid is one row then: what they see, and soon."""
    layout = layouts.parse(text, 8, 8, causal=causal)
    stride = int(text.partition(":")[2].partition(",")[0])
    c = int(text.partition(",")[2] or 0)
    i, j = torch.arange(64)[:, None], torch.arange(64)
    wanted = ((i - j).abs() <= stride) | ((i - j) % stride == 0)
    if text.startswith("fixed"):
        wanted = (i // stride == j // stride) | (j % stride >= stride - c)
    wanted &= (j <= i) | (not causal)
    with at_most(2.0):
        assert torch.equal(layout.dense_mask(), wanted)
        assert layout.pairs == int(wanted.sum())
        large = layouts.parse(text, 64, 64, causal=causal)
        assert large.pairs > 4096
        assert len(layouts._read_key(large.key).keys_of(4095)) == len(large.keys_of(4095))


def test_most_patterns_in_one() -> None:
    texts = [f"local2d:{radius}" for radius in range(layouts.MOST_TERMS)]
    layout = layouts.parse("+".join(texts), 32, 32)
    assert layout.pattern.terms == layouts.MOST_TERMS
    with at_most(20):
        assert layout.pairs == layouts.local2d(32, 32, layouts.MOST_TERMS - 1).pairs
    for join in (SparseLayout.__or__, SparseLayout.__and__):
        with pytest.raises(ValueError, match="at most 32 patterns can be joined"):
            join(layout, layouts.row(32, 32))
    nested = layouts.row(8, 8)
    for radius in range(1, layouts.MOST_TERMS):
        nested = (nested | layouts.local2d(8, 8, radius)) if radius % 2 else (nested & layouts.local2d(8, 8, radius))
    assert layouts._read_key(nested.key) == nested


def test_numbers_of_numpy_are_integers_and_booleans_are_not() -> None:
    wanted = layouts.local2d(6, 7, 2)
    assert layouts.local2d(np.int64(6), np.uint8(7), np.int16(2)) == wanted
    assert layouts.local2d(np.int64(6), np.uint8(7), np.int16(2)).key == wanted.key
    assert type(layouts.row(np.int64(6), 7).height) is int
    assert torch.equal(wanted.mask_rows(np.int64(3), np.int32(9)), wanted.mask_rows(3, 9))
    assert wanted.prefix(np.int64(9)) == wanted.prefix(9)
    assert torch.equal(wanted.keys_of(np.int64(9)), wanted.keys_of(9))
    assert wanted.with_tile(np.int64(4), 4) == wanted.with_tile(4, 4)
    assert bool(wanted.permits(np.int64(9), np.uint8(8)))
    layout = layouts.local2d(1, 99, 2)
    for words, call in (
        ("start must be 0 or more, got -1", lambda: layout.mask_rows(-1, 99)),
        ("start must be at most 5, got 6", lambda: layout.mask_rows(6, 5)),
        ("stop must be at most 99, got 100", lambda: layout.mask_rows(0, 100)),
        ("tokens must be an int, got bool", lambda: layout.prefix(True)),
        ("tokens must be at most 42, got 99", lambda: replace(wanted, tokens=99)),
        ("tokens must be at least 1, got 0", lambda: replace(wanted, tokens=0)),
        ("query must be an int, got bool", lambda: layout.keys_of(True)),
        ("height x width must be at most", lambda: layouts.dense(1 << 20, 1 << 20)),
        ("device must be a torch.device or its name, got 'nowhere'", lambda: layout.dense_mask("nowhere")),
        ("q and k must have shapes that broadcast", lambda: layout.permits(torch.arange(3), torch.arange(4))),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


CALLS: list[tuple[Callable[..., object], dict[str, object]]] = [
    (layouts.dense, {"height": 4, "width": 5, "causal": True}),
    (layouts.local2d, {"height": 4, "width": 5, "radius": 2, "causal": True}),
    (layouts.row, {"height": 4, "width": 5, "causal": False}),
    (layouts.column, {"height": 4, "width": 5, "causal": True}),
    (layouts.row_column, {"height": 4, "width": 5, "causal": True}),
    (layouts.strided, {"height": 4, "width": 5, "stride": 3, "causal": True}),
    (layouts.fixed, {"height": 4, "width": 5, "stride": 3, "c": 1, "causal": True}),
    (layouts.from_predicate, {"height": 4, "width": 5, "fn": lambda q, k: q >= k, "causal": True}),
    (layouts.parse, {"text": "local2d:2", "height": 4, "width": 5, "causal": True}),
    (SparseLayout, {"height": 4, "width": 5, "pattern": layouts.row(4, 5).pattern, "causal": True, "tokens": 9}),
    (layouts.row(4, 5).permits, {"q": 3, "k": torch.arange(4)}),
    (layouts.row(4, 5).dense_mask, {"device": None}),
    (layouts.row(4, 5).mask_rows, {"start": 2, "stop": 7, "device": "cpu"}),
    (layouts.row(4, 5).block_lists, {"block_m": 16, "block_n": 32}),
    (layouts.row(4, 5).keys_of, {"query": 7}),
    (layouts.row(4, 5).prefix, {"tokens": 7}),
    (layouts.row(4, 5).with_tile, {"rows": 4, "cols": 8}),
    (layouts.row(4, 5).__or__, {"other": layouts.column(4, 5)}),
    (layouts.row(4, 5).__and__, {"other": layouts.column(4, 5)}),
]


@pytest.mark.parametrize("place", range(len(CALLS)))
def test_wrong_values_are_refused_by_name(place: int) -> None:
    """Each argument with each hostile value, and pairs of them drawn at random."""
    function, good = CALLS[place]
    assert check_refusal(function, good) is not None
    rng = random.Random(place)
    for name in good:
        for value in hostile_values(rng):
            check_refusal(function, {**good, name: value})
    for _ in range(20):
        wrong = {name: rng.choice(hostile_values(rng)) for name in rng.sample(list(good), min(2, len(good)))}
        check_refusal(function, {**good, **wrong})


def test_registries_do_not_grow_without_bound() -> None:
    held = layouts.local2d(40, 41, 2)
    keys = []
    for number in range(1, 1001):
        keys.append(held.prefix(number).key)
        keys.append(layouts.from_predicate(3, 4, lambda q, k, number=number: q - k < number).key)  # type: ignore[misc]
    gc.collect()
    assert len(layouts._alive) <= 256 + len(TEXTS) * 10, "what a variable holds, and the newest 256"
    assert layouts.registered(held.key) is held
    assert layouts.registered(keys[0]) == held.prefix(1), "made again from its key"
    with pytest.raises(KeyError, match=r"its pattern is a function: keep the layout that from_predicate returned"):
        layouts.registered(keys[1])
    for key in ("", "nonsense", "local2d:2@3", "sparkle@3x4"):
        with pytest.raises(KeyError, match="no layout"):
            layouts.registered(key)


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_is_enough_to_make_a_layout_again(text: str) -> None:
    whole = layouts.parse(text, 16, 16)
    for layout in (whole, whole.prefix(99), whole.with_tile(4, 8), layouts.parse(text, 16, 16, causal=False).prefix(7)):
        assert layouts._read_key(layout.key) == layout
    both = (whole | layouts.row(16, 16)) & (layouts.column(16, 16) | layouts.local2d(16, 16, 1))
    assert layouts._read_key(both.key) == both


def test_a_pattern_of_a_function_outlives_its_layout_until_backward() -> None:
    """Operators know a layout by its key; the graph holds it, whoever else lets it go."""
    from igpt_kernels import block_sparse_attention

    q = torch.randn(1, 2, 12, 8, requires_grad=True)
    out = block_sparse_attention(q, q, q, layouts.from_predicate(3, 4, lambda query, key: query - key < 3))
    layouts._newest.clear()
    layouts.lists_of.cache_clear()
    gc.collect()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("first_goes", [False, True])
def test_a_layout_is_found_while_one_of_its_key_lives(first_goes: bool) -> None:
    """Two layouts of one function may be equal. The key of the one that lives was lost with the other."""
    some = layouts.from_predicate(3, 4, lambda q, k: q >= k)
    two = [some | layouts.row(3, 4), some | layouts.row(3, 4)]
    two.pop(0 if first_goes else 1)
    gc.collect()
    assert layouts.registered(two[0].key) == two[0]
    key = two.pop().key
    gc.collect()
    with pytest.raises(KeyError, match=r"no layout .* is alive"):
        layouts.registered(key)
