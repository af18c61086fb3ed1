"""One colour from logits: the colours that top-k and top-p keep, and the random numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from igpt.generation import sampler
from igpt.generation.sampler import TokenSampler, exponential_noise, stream


@pytest.mark.parametrize("top_k", [None, 1, 3, 12])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 0.999999])
def test_top_k_and_top_p_keep_the_right_colours(top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    logits[0] = 0
    logits[1, 3:9] = 2.0
    found = TokenSampler(0.7, top_k, top_p, 12).probabilities(logits).numpy()
    for row, p in zip(logits.double().numpy() / 0.7, found, strict=True):
        ranked = sorted(range(12), key=lambda color: (-row[color], color))[:top_k]
        weights = {color: math.exp(row[color]) for color in ranked}
        total, kept = sum(weights.values()), []
        for color in ranked:  # the shortest beginning that reaches top_p
            kept.append(color)
            if top_p is not None and sum(weights[color] for color in kept) / total >= top_p - 1e-12:
                break
        expected = np.zeros(12)
        for color in kept:
            expected[color] = weights[color] / sum(weights[color] for color in kept)
        np.testing.assert_allclose(p, expected, atol=1e-12)


def test_ties_go_to_the_lower_colour() -> None:
    found = TokenSampler(1.0, 5, None, 4096).probabilities(torch.zeros(1, 4096))
    assert found[0, :5].tolist() == pytest.approx([0.2] * 5)
    assert TokenSampler(0, None, None, 9).choose(torch.zeros(2, 9), torch.ones(2, 9)).tolist() == [0, 0]
    assert TokenSampler(0, None, None, 3).choose(torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3)).tolist() == [1]


def test_temperature_may_be_tiny_or_huge() -> None:
    logits = torch.tensor([[-3e38, 1.0, 3e38, 2.0]])
    assert TokenSampler(1e-300, None, None, 4).probabilities(logits).tolist() == [[0, 0, 1, 0]]
    assert TokenSampler(1e300, None, None, 4).probabilities(torch.randn(1, 4)).tolist() == [pytest.approx([0.25] * 4)]


def test_a_colour_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]).expand(5000, 5)
    streams = torch.tensor([stream(0, i) for i in range(5000)])
    drawn = TokenSampler(3.0, 3, None, 5).choose(logits, exponential_noise(streams, 0, 5))
    assert sorted(drawn.unique().tolist()) == [0, 1, 2]


def test_colours_are_drawn_with_their_probability() -> None:
    n, logits = 200_000, torch.tensor([0.0, 1.0, -2.0, 0.5, 0.5, -6.0])
    streams = torch.arange(n) * 7919
    counts = (
        TokenSampler(1.0, None, None, 6)
        .choose(logits.expand(n, 6), exponential_noise(streams, 3, 6))
        .bincount(minlength=6)
        .double()
    )
    expected = n * logits.double().softmax(0)
    assert float(((counts - expected) ** 2 / expected).sum()) < 25  # chi-square with 5 degrees: 1 in 7,000


def splitmix(state: int, number: int) -> int:
    """SplitMix64 as published, in whole numbers: output `number` (from 0) of the generator that starts at `state`."""
    state = (state + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_the_stream_is_splitmix64() -> None:
    assert [splitmix(1234567, k) for k in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for start in (1234567, -1, 2**63 - 1, -(2**63)):
        for position, colors in ((0, 3), (5, 7), (65535, 512)):
            expected = [-math.log(((splitmix(start, position * colors + v) >> 12) + 0.5) / 2**52) for v in range(colors)]
            found = exponential_noise(torch.tensor([start]), position, colors)[0]
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
    assert (exponential_noise(torch.arange(1000), 0, 100) > 0).all()


def test_streams_differ_and_are_signed_64_bit_numbers() -> None:
    keys = [
        *itertools.product(range(12), repeat=2),
        *itertools.product(range(6), repeat=3),
        (2**70,),
        (2**70 + 1,),
        (2**64,),
        (1,),
    ]
    found = [stream(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert all(-(2**63) <= number < 2**63 for number in found)
    assert min(found) < 0 < max(found)
    assert stream(3, 5) == stream(3, 5)
    assert sampler._signed(2**64 - 1) == -1
