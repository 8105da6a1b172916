"""The randomness of coupled sampling: Gumbel noise fixed by a seed, a position and a token.

``argmax over tokens of (log p + Gumbel noise)`` samples from p. If the noise is a function of the
sample's seed and of the token's position, and of nothing else, then what is sampled is fixed by the
seed and the weights: by no draft, no batch, no worker. A drafter that knows the noise guesses
argmax(log q̂ + the same noise) for its estimate q̂ of p, and is right with a probability of at least
(1 - TV(p, q̂)) / (1 + TV(p, q̂)); see Daliri et al., "Coupling without communication and
drafter-invariant speculative decoding" (arXiv 2408.07978).

The numbers come from three streams of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), one within
the other: number ``seed`` of the first is the state of a second, whose number ``position`` is the
state of a third, whose number ``token`` is drawn. All of it is integer arithmetic modulo 2**64: the
same bits in numpy, in torch on any device and in ``native/noise.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Integers = TypeVar("Integers", NDArray[np.int64], "Tensor")
"""An int64 array, not a scalar: in arrays both libraries wrap around silently."""

UNIFORM_BITS = 52
"""Random bits of a float64 strictly between 0 and 1."""


def draw(stream: Integers, index: Integers) -> Integers:
    """Draw number ``index``, int64, of SplitMix64's stream from the state ``stream``."""
    bits = stream + (index + 1) * signed(0x9E3779B97F4A7C15)
    bits = (bits ^ shifted(bits, 30)) * signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ shifted(bits, 27)) * signed(0x94D049BB133111EB)
    return bits ^ shifted(bits, 31)


def position_streams(seeds: Integers, positions: Integers) -> Integers:
    """Return the stream of each pair's tokens: int64 [N] from int64 [N] and [N].

    ``positions`` count a sample's tokens from the first one of its prompt.
    """
    return draw(draw(seeds * 0, seeds), positions)


def gumbel(streams: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return standard Gumbel noise of tokens in their positions' streams; arguments broadcast."""
    uniform = (shifted(draw(streams, tokens), 64 - UNIFORM_BITS) + 0.5) * 2.0**-UNIFORM_BITS
    return -np.log(-np.log(uniform))


def shifted(bits: Integers, count: int) -> Integers:
    """Shift to the right logically, which int64 does not have."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def signed(bits: int) -> int:
    """Return the int64 that has the bits of an unsigned number."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
