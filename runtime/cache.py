"""A least-recently-used cache of arrays, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

from .backends.protocol import Arrays


class ArrayCache:
    """Keeps what a part made of an input; ``limit`` bytes in all, the oldest goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[bytes, Arrays] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: bytes) -> Arrays | None:
        """What was stored under the key, which thereby becomes the newest."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: bytes, arrays: Arrays) -> None:
        """Store, and drop the oldest until all fits; what is larger than the cache is not kept."""
        size = _size(arrays)
        if size > self._limit:
            return
        if key in self._held:
            self.bytes -= _size(self._held.pop(key))
        self._held[key] = arrays
        self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= _size(self._held.popitem(last=False)[1])


def _size(arrays: Arrays) -> int:
    return sum(a.nbytes for a in arrays.values())
