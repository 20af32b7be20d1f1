"""Random numbers that stay the same for ever: SplitMix64, keyed by names.

RefShapes must be the same on every machine and with every library version, so it does not use
NumPy's or Python's generators, whose streams may change. Source of the mixer: Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def key_of(*names: object) -> int:
    """64 bits that depend on every name and on nothing else."""
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Stream:
    """A stream of integers, reals and choices, fixed by the names it is made from."""

    def __init__(self, *names: object) -> None:
        self._state = key_of(*names)

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + _GAMMA) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return z ^ (z >> 31)

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return (self.bits() * limit) >> 64

    def between(self, low: float, high: float) -> float:
        """A real in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.between(0.0, 1.0) < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in a random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def field(self, *shape: int) -> npt.NDArray[np.uint8]:
        """An array of independent bytes; one draw of the stream, mixed once per element."""
        count = int(np.prod(shape))
        with np.errstate(over="ignore"):
            z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(
                self.bits()
            )
            z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        return (z >> np.uint64(56)).astype(np.uint8).reshape(shape)
