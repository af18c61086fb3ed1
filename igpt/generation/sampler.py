"""One colour from logits: temperature, top-k, top-p, and random numbers that are a pure function of where they are used.

Letters: B images drawn at once, V colours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.checks import AtLeast, Between, check_int, check_number
from igpt.errors import ConfigError
from igpt_kernels.messages import shown

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): number k of a stream is a few
# integer operations on (stream, k), the same on every device and in every version of torch and NumPy.
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def stream(*parts: int) -> int:
    """The random stream that belongs to some non-negative integers, as a signed 64-bit number."""
    state = 0
    for part in parts:
        for place in range(max(1, -(-part.bit_length() // 64))):  # 64 bits at a time; a seed may be longer
            state = _mixed((state ^ (part >> 64 * place & _ALL)) + (place + 1) * _GAMMA & _ALL)
    return _signed(state)


def exponential_noise(streams: Tensor, position: int, colors: int) -> Tensor:
    """Exponential random numbers of mean 1 for one pixel: number ``position * V + v`` of each stream.

    Args:
        streams: int64 [B], from `stream`.
        position: pixel, 0 or above.
        colors: V.

    Returns:
        float64 [B, V], above 0, on the device of `streams`.
    """
    count = torch.arange(position * colors + 1, (position + 1) * colors + 1, device=streams.device)
    z = streams[:, None] + count * _signed(_GAMMA)  # int64 wraps round, as the 64 bits of SplitMix64 do
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    z = z ^ _shifted(z, 31)
    # 52 bits and a half: exact in float64, and neither 0 nor 1.
    return -torch.log((_shifted(z, 12).double() + 0.5) * 2.0**-52)


class TokenSampler:
    """How a colour is drawn from logits: temperature, then top-k, then top-p, then the Gumbel-max trick.

    The colour with the least E_v / p_v is drawn, where the E_v are exponential with mean 1: it is v with probability p_v.
    A change of the p by rounding then changes the winner with a probability of that change's size. The inverse of the
    cumulative distribution, with one random number for a pixel, adds the changes up over the colours: with float32 logits
    of batch sizes 1 and 64 (`tiny`, CPU), 65 pixels in a million differed instead of 0.7.

    Raises:
        ConfigError: temperature, top_k or top_p out of range.
    """

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, colors: int) -> None:
        self.temperature = check_number("temperature", temperature, AtLeast(0))
        self.top_k = colors if top_k is None else check_int("top_k", top_k, 1)
        if self.top_k > colors:
            raise ConfigError(f"top_k must be from 1 to the model's {colors} colours, got {shown(top_k)}")
        self.top_p = 1.0 if top_p is None else check_number("top_p", top_p, Between(0, 1, low_open=True))
        self.colors = colors

    def probabilities(self, logits: Tensor) -> Tensor:
        """float64 [B, V]: what a colour is drawn with; temperature above 0."""
        # The maximum goes first, so that a tiny temperature cannot overflow; float64, because near-equal logits of two
        # batch sizes should give near-equal sums over V terms.
        wide = logits.double()
        p = ((wide - wide.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_k == self.colors and self.top_p == 1.0:
            return p
        order = logits.argsort(stable=True, dim=-1, descending=True)
        ranked = p.gather(-1, order)
        ranked[:, self.top_k :] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)
        if self.top_p < 1.0:
            above = F.pad(ranked.cumsum(-1)[:, :-1], (1, 0))  # sum over the likelier colours; 0 for the likeliest, so it stays
            # The margin lets 6 of 12 equal colours count as half, whatever the rounding of their sum.
            ranked = ranked.where(above < self.top_p * (1 - 1e-9), 0)
            ranked = ranked / ranked.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, order, ranked)

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """int64 [B]: one colour a row of logits [B, V], by its row of `exponential_noise` [B, V], unless temperature is 0."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return (self.probabilities(logits).log() - noise.log()).argmax(-1)


def _mixed(z: int) -> int:
    z = (z ^ z >> 30) * _FIRST & _ALL
    z = (z ^ z >> 27) * _SECOND & _ALL
    return z ^ z >> 31


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: torch's own shift of int64 repeats it."""
    return (z >> bits) & ((1 << 64 - bits) - 1)
